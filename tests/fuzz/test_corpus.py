"""Replays the corpus of fuzzing, built with sanitizers; ``make fuzz`` looks for new inputs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from reactor._native_build import ROOT, sources
from tests.fuzz import seeds

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target of rings as a program that runs files."""
    program = tmp_path_factory.mktemp("fuzz") / "replay"
    compiler = shutil.which("gcc") or "cc"
    flags = ["-std=gnu17", "-D_GNU_SOURCE", "-O1", "-g", "-fno-strict-aliasing", f"-I{ROOT}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [HERE / "fuzz_ring.c", HERE / "replay.c", *(ROOT / name for name in sources())]
    wrap = ["-Wl,--wrap=mmap,--wrap=munmap", "-luring", "-lcrypto"]
    # Without what another sanitizer put into the environment of these tests.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [compiler, *flags, *map(str, files), *wrap, "-o", str(program)]
    subprocess.run(command, check=True, env=environment)
    return program


def run(replay: Path, *inputs: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    # LeakSanitizer cannot stop processes that are traced, as containers sometimes have them.
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    ran = subprocess.run(
        [str(replay), *map(str, inputs)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_rings_of_the_corpus_are_served_or_break(replay: Path) -> None:
    inputs = sorted(seeds.CORPUS.iterdir())
    assert len(inputs) > len(seeds.seeds())
    run(replay, *inputs)


@pytest.mark.parametrize("name", sorted(seeds.seeds()))
def test_seeds_are_what_the_script_writes(name: str) -> None:
    assert (seeds.CORPUS / name).read_bytes() == seeds.seeds()[name]
