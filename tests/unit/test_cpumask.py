"""CPU masks and lists: what they mean, what is refused and why, and who has which CPU."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor import cpumask
from reactor.lockfile import InUse

MANY = range(1024)
cpu_sets = st.sets(st.integers(0, 1023), min_size=1)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0x3", [0, 1]),
        ("3", [0, 1]),
        ("10", [4]),
        ("0XfF", list(range(8))),
        (" 0x1 ", [0]),
        ("0x" + "1" + "0" * 50, [200]),
        ("[0,2]", [0, 2]),
        ("[3]", [3]),
        ("0-3,7", [0, 1, 2, 3, 7]),
        ("[0-3, 7]", [0, 1, 2, 3, 7]),
        ("7,3,7", [3, 7]),
        ("4-4", [4]),
        ("3 - 5", [3, 4, 5]),
        ("[00005]", [5]),
    ],
)
def test_a_mask_or_list_means_these_cpus(text, cpus):
    assert cpumask.parse(text, MANY) == cpus


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("0", "has no CPU in it"),
        ("0x0", "has no CPU in it"),
        ("0x", "not hexadecimal"),
        ("zz", "not hexadecimal"),
        ("1_0", "not hexadecimal"),
        ("\u0663", "not hexadecimal"),
        ("[]", "has no CPU in it"),
        ("[ ]", "has no CPU in it"),
        ("[1", "unmatched bracket"),
        ("1]", "unmatched bracket"),
        ("[[1]]", "neither a CPU nor a range"),
        ("-", "neither a CPU nor a range"),
        ("-1", "neither a CPU nor a range"),
        ("1-", "neither a CPU nor a range"),
        ("1-2-3", "neither a CPU nor a range"),
        ("5,", "'' is neither a CPU nor a range"),
        ("0x1,0x2", "'0x1' is neither a CPU nor a range"),
        ("\u0661,2", "neither a CPU nor a range"),
        ("3-1", "range 3-1 is reversed"),
        ("0-99999999999", "CPU 99999999999 is out of range"),
        ("f" * 100_000, "too wide"),
    ],
)
def test_a_refusal_says_what_is_wrong(text, reason):
    with pytest.raises(ValueError, match=reason):
        cpumask.parse(text, MANY)


def test_cpus_that_are_not_available_are_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"CPUs 2,5-6 of '0x67' not available.*available: 0-1,8"):
        cpumask.parse("0x67", [0, 1, 8])
    with pytest.raises(ValueError, match=r"CPU 2 of .* available: none"):
        cpumask.parse("[2]", [])


@given(cpu_sets)
def test_a_mask_round_trips(cpus):
    assert cpumask.parse(cpumask.format_mask(cpus), MANY) == sorted(cpus)
    assert cpumask.parse(cpumask.format_mask(cpus).removeprefix("0x"), MANY) == sorted(cpus)


@given(cpu_sets)
def test_a_list_round_trips(cpus):
    assert cpumask.parse(f"[{cpumask.format_list(cpus)}]", MANY) == sorted(cpus)
    assert cpumask.parse(",".join(map(str, cpus)) + f",{min(cpus)}", MANY) == sorted(cpus)


@given(st.text(max_size=30) | st.text("0123456789abcxf-,[] ", max_size=30))
def test_any_text_is_a_set_of_available_cpus_or_a_value_error(text):
    try:
        cpus = cpumask.parse(text, MANY)
    except ValueError:
        return
    assert cpus
    assert cpus == sorted(set(cpus) & set(MANY))


def test_the_mask_of_no_cpu_is_zero():
    assert cpumask.format_mask([]) == "0x0"


def test_available_is_the_affinity_of_this_process():
    assert cpumask.available() == sorted(os.sched_getaffinity(0))


def test_a_claimed_cpu_is_refused_to_another_process_with_its_holder(tmp_path):
    other = (
        "import sys; from reactor import cpumask, lockfile\n"
        "try: cpumask.claim([1, 2, 3], 'other', sys.argv[1])\n"
        "except lockfile.InUse as error: print(error)\n"
    )
    with cpumask.claim([3], "the owner", str(tmp_path)):
        command = [sys.executable, "-c", other, str(tmp_path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"CPU 3 is in use by pid {os.getpid()} (the owner)")
        assert [entry.name for entry in tmp_path.iterdir()] == ["vhost-reactor-cpu-3.lock"]


def test_a_refused_claim_claims_nothing(tmp_path):
    with cpumask.claim([5], "one", str(tmp_path)):
        with pytest.raises(InUse, match="CPU 5"):
            cpumask.claim([4, 5, 6], "two", str(tmp_path))
        cpumask.claim([4, 6], "two", str(tmp_path)).close()


def test_released_cpus_leave_no_files(tmp_path):
    cpumask.claim([0, 1], "one", str(tmp_path)).close()
    assert list(tmp_path.iterdir()) == []
