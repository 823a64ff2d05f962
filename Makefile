# The developer's commands; `make help` lists them.
#
# Each does the set-up that it needs, and none of it twice: .venv/stamps/ says what has been done, and a
# change of pyproject.toml, or of the C part, has it done again.

PYTHON ?= python3
CLANG_FORMAT ?= clang-format-14
# arguments of pytest, e.g. make test ARGS="-k discard"; of the demo; of the benchmark
ARGS ?=

BIN := .venv/bin
STAMPS := .venv/stamps
PACKAGES := reactor bdev scsi vhost
# The generated part of the extension begins with an underscore.
C_FILES := $(sort $(filter-out %/_native.c,$(foreach p,$(PACKAGES),$(wildcard $(p)/*.[ch]))))
BUILD_FILES := pyproject.toml setup.py reactor/_native_build.py

# Of fuzzing; what it finds goes to build/fuzz.
SECONDS = 60
FUZZ_FLAGS := -std=gnu17 -D_GNU_SOURCE -O1 -g -fno-strict-aliasing -Wall -Wextra -Werror \
	-Wno-unused-parameter -Wno-missing-field-initializers -I. \
	-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all

# In its own copy, so that the ordinary extension stays as it is.
SANITIZED := build/sanitize
# libstdc++ is for packages written in C++: the sanitizer must find its functions when it begins.
SANITIZE_ENV = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

.DELETE_ON_ERROR:
.PHONY: help setup setup-test run test test-nvme soak lint format sanitize fuzz bench bench-check clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMPS)/native ## system packages, virtual environment, C part

setup-test: $(STAMPS)/native-test $(STAMPS)/kernel ## the same for tests, with the guest's kernel

run: setup ## start a cluster with two disks, prove that it works, and serve
	$(BIN)/python -m vhost.demo $(ARGS)

test: setup-test ## all tests, those in a guest included
	$(BIN)/python -m pytest $(ARGS)

soak: setup-test ## kill reactors, and everything, under verified load (SOAK_KILLS, SOAK_CRASHES, SOAK_SEED); takes an hour
	$(BIN)/python -m pytest -x tests/soak $(ARGS)

lint: $(STAMPS)/native-test $(STAMPS)/packages-lint ## formatting, types, common mistakes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(CLANG_FORMAT) --dry-run -Werror $(C_FILES) tests/guest/rootfs/*.c tests/fuzz/*.c

format: $(STAMPS)/native-test $(STAMPS)/packages-lint ## put all files into the form that lint wants
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format
	$(CLANG_FORMAT) -i $(C_FILES) tests/guest/rootfs/*.c tests/fuzz/*.c

sanitize: $(STAMPS)/native-test ## unit and protocol tests with AddressSanitizer and UBSan in the C part
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	tar -c --exclude=__pycache__ --exclude='_native*.so' --exclude=_native.c \
		$(PACKAGES) benchmarks docs tests pyproject.toml setup.py LICENSE | tar -x -C $(SANITIZED)
	cd $(SANITIZED) && NATIVE_SANITIZE=address,undefined \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	@# --capture=sys leaves descriptor 2 alone: a report must not end with the process that wrote it.
	cd $(SANITIZED) && $(SANITIZE_ENV) $(abspath $(BIN))/python -m pytest -q --capture=sys \
		-o timeout=600 -m "not guest and not peer" tests/unit tests/protocol $(ARGS)

test-nvme: setup-test ## NVMe drives through VFIO, in an emulated machine with an IOMMU
	$(BIN)/python -m pytest -q tests/unit/test_nvme_*.py tests/unit/test_iommufd.py tests/unit/test_guest_dma.py tests/guest/test_nvme.py $(ARGS)

fuzz: $(STAMPS)/packages-fuzz ## look for rings that break us: make fuzz SECONDS=600
	mkdir -p build/fuzz/ring
	clang-14 $(FUZZ_FLAGS) tests/fuzz/fuzz_ring.c $(filter %.c,$(C_FILES)) \
		-Wl,--wrap=mmap,--wrap=munmap -luring -lcrypto -o build/fuzz/fuzz_ring
	build/fuzz/fuzz_ring -max_total_time=$(SECONDS) -max_len=1024 -print_final_stats=1 \
		-detect_leaks=0 -artifact_prefix=build/fuzz/ build/fuzz/ring tests/fuzz/corpus/ring

bench: $(STAMPS)/native-bench ## measure, beside qemu-storage-daemon and bare loops, and report; takes half an hour
	$(BIN)/python -m benchmarks $(ARGS)

bench-check: $(STAMPS)/native-test $(STAMPS)/packages-bench ## fail if the hot path takes 3 % more instructions than it did
	$(BIN)/python -m benchmarks.instructions

clean: ## remove what was built
	rm -rf build dist *.egg-info reactor/_native.c reactor/_native*.so $(STAMPS)/native*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment, too
	rm -rf .venv

# --- set-up -------------------------------------------------------------------------------------------

$(STAMPS)/packages-%: .ci/packages
	@mkdir -p $(@D)
	.ci/packages $*
	@touch $@

$(STAMPS)/venv: $(STAMPS)/packages-run
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: Python 3.11 is needed; try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "setuptools>=77" wheel "cffi>=1.16"
	@touch $@

# Without isolation, pip builds with what the environment has, and later builds compile only changes.
$(STAMPS)/install: $(BUILD_FILES) | $(STAMPS)/venv
	$(BIN)/pip install -q --no-build-isolation -e .
	@touch $@

$(STAMPS)/install-test: $(BUILD_FILES) $(STAMPS)/packages-test | $(STAMPS)/venv
	$(BIN)/pip install -q --no-build-isolation -e ".[test,dev]"
	@touch $@ $(STAMPS)/install

# What benchmarks draw with, and what of the tests they set devices up with.
$(STAMPS)/native-bench: $(BUILD_FILES) $(STAMPS)/native-test $(STAMPS)/packages-bench
	$(BIN)/pip install -q --no-build-isolation -e ".[test,dev,bench]"
	@touch $@

$(STAMPS)/native: $(STAMPS)/install $(C_FILES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/native-test: $(STAMPS)/install-test $(C_FILES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@ $(STAMPS)/native

$(STAMPS)/kernel: $(STAMPS)/install-test tests/guest/kernel.py
	$(BIN)/python -m tests.guest.kernel
	@touch $@
