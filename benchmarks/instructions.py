"""Instructions of the hot path, counted by callgrind: they do not depend on the machine's load.

``make bench-check`` (``python -m benchmarks.instructions``) fails when one of them is more than 3 %
above the checked-in baseline; ``--update`` writes that anew. Counts depend on the compiler, which
the baseline names; which copies the C library makes is fixed, so that the CPU does not matter.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks import _bare_build, hot_path, nvme
from benchmarks.series import Quantity
from benchmarks.suite import OURS, Benchmark, Session

BASELINE = Path(__file__).with_suffix(".json")
TOLERANCE = 0.03
INSTRUCTIONS = Quantity("instructions", "a request")
# Copies as any x86-64 has them: the same on each machine.
COPIES = (
    "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-AVX2_Usable,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM"
)
NAME = re.compile(r"^desc: Trigger: Client Request: (.*)\|(\d+)$", re.M)
TOTAL = re.compile(r"^(?:summary|totals): (\d+)$", re.M)

# What the latency histogram costs: where a request ends in the turn of its submission, and later.
HISTOGRAM = "bdev/histogram.h"
HISTOGRAM_OF = ("blk null read 512 B, split", "blk file read 4 KiB, split")
FILE = re.compile(r"^(?:fl|fi|fe)=\((\d+)\)(?: (.*))?$")
COST = re.compile(r"^[+*\d-]\S* (\d+)$")

Counts = dict[str, float]


def count(*paths: str) -> Counts:
    """Return instructions a request by the name of the way, of all or those that match."""
    _bare_build.load("counting")  # the compiler need not run under valgrind
    with tempfile.TemporaryDirectory(prefix="callgrind-") as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", "--combine-dumps=no"]
        command += [sys.executable, "-m", "benchmarks.hot_path", *paths]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=_bare_build.ROOT,
            env={**os.environ, "GLIBC_TUNABLES": COPIES, "PYTHONHASHSEED": "0"},
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        totals = dict(filter(None, map(_parse, Path(folder).iterdir())))
    less, more = hot_path.BATCHES
    requests = (more - less) * hot_path.DEPTH
    names = sorted({name for name, _ in totals})
    counts = {}
    for name in names:
        (all_more, histogram_more), (all_less, histogram_less) = (
            totals[name, more],
            totals[name, less],
        )
        counts[name] = (all_more - all_less) / requests
        if name in HISTOGRAM_OF:
            counts[f"{name}: histogram"] = (histogram_more - histogram_less) / requests
    return counts


def _parse(path: Path) -> tuple[tuple[str, int], tuple[int, int]] | None:
    """Return name, batches, total and the histogram's part of a dump; None of what ends a run."""
    text = path.read_text()
    name, total = NAME.search(text), TOTAL.search(text)
    if not name or not total:
        return None
    return (name[1], int(name[2])), (int(total[1]), _of_file(text, HISTOGRAM))


def _of_file(dump: str, path: str) -> int:
    """Return how many instructions were made of the lines of one file, wherever they are inlined.

    The format is in callgrind's manual: ``fl=``, ``fi=`` and ``fe=`` name the file of the lines
    that follow, by number after the first time; after ``calls=`` is the cost of what was called.
    """
    names: dict[str, str] = {}
    inside = called = False
    total = 0
    for line in dump.splitlines():
        file, cost = FILE.match(line), COST.match(line)
        if file:
            name = names.setdefault(file[1], file[2] or "")
            inside = name.endswith(path)
        elif line.startswith("calls="):
            called = True
        elif cost:
            total += int(cost[1]) if inside and not called else 0
            called = False
    return total


def count_all() -> Counts:
    """Return the counts of everything that the baseline has."""
    with tempfile.TemporaryDirectory() as folder:
        driver = nvme.count(nvme.build(Path(folder)), hot_path.DEPTH, 50).driver
    return {**count(), "nvme driver read 4 KiB": driver}


def compiler() -> str:
    """Return what decides over counts."""
    done = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return f"gcc {done.stdout.strip()}, {platform.machine()}"


def compare(counts: Counts, baseline: Counts) -> list[str]:
    """Return a line for everything that is worse than it was, or not counted on one side."""
    lines = []
    for name in sorted(counts.keys() | baseline.keys()):
        if name not in counts or name not in baseline:
            side = "the baseline" if name in counts else "what was counted"
            lines.append(f"{name}: not in {side}")
        elif counts[name] > baseline[name] * (1 + TOLERANCE):
            change = counts[name] / baseline[name] - 1
            lines.append(f"{name}: {counts[name]:.1f}, was {baseline[name]:.1f} ({change:+.1%})")
    return lines


def run(session: Session) -> None:
    """Count, for the report; in quick mode one way only."""
    for name, value in (
        count("null read 512 B, split") if session.options.quick else count_all()
    ).items():
        session.add({"path": name}, OURS, INSTRUCTIONS, value)
        if BASELINE.exists():
            before = json.loads(BASELINE.read_text())["counts"].get(name)
            if before is not None:
                session.add({"path": name}, "baseline", INSTRUCTIONS, before)


benchmark = Benchmark(
    "instructions", "The hot path", run, base="baseline", needs=("gcc", "valgrind")
)


@click.command()
@click.option("--update", is_flag=True, help="Write the baseline anew.")
def main(update: bool) -> None:
    """Fail when the hot path takes more than 3 % more instructions than the baseline says."""
    counts = count_all()
    for name, value in counts.items():
        click.echo(f"{value:8.1f}  {name}")
    if update:
        made = {"compiler": compiler(), "counts": {n: round(v, 2) for n, v in counts.items()}}
        BASELINE.write_text(json.dumps(made, indent=2) + "\n")
        click.echo(f"written: {BASELINE}")
        return
    baseline = json.loads(BASELINE.read_text())
    if baseline["compiler"] != compiler():
        raise click.ClickException(
            f"the baseline is of {baseline['compiler']}, this is {compiler()}: counts cannot be "
            "compared; on a version known to be good, run it with --update"
        )
    worse = compare(counts, baseline["counts"])
    if worse:
        hint = "\nif that is meant: python -m benchmarks.instructions --update"
        raise click.ClickException("\n".join(worse) + hint)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.instructions")
