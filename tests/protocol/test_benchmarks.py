"""Every benchmark runs, in its quick mode: figures are not looked at, only that there are some."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.series import Run

ROOT = Path(__file__).parent.parent.parent
CPUS = sorted(os.sched_getaffinity(0))
NULL_PEER = (
    "peer=exec qemu-storage-daemon --blockdev driver=null-co,node-name=d,size={size} --export"
    " type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on"
)

pytestmark = pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="takes too long with sanitizers")


def quick(folder: Path, *args: str) -> Run:
    """Run benchmarks in quick mode, and return what they measured."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(folder)]
    command += [
        "--folder",
        str(folder),
        "--driver-cpu",
        str(CPUS[0]),
        "--server-cpu",
        str(CPUS[-1]),
    ]
    done = subprocess.run(
        [*command, *args], cwd=ROOT, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open it: xdg-open" in done.stdout
    (saved,) = folder.glob("*.json")
    return Run.load(saved)


# bench-check counts the same instructions, and fails if that does not work.
@pytest.mark.parametrize("name", sorted(set(suite.find()) - {"instructions"}))
def test_a_benchmark_runs_and_every_series_has_samples(name: str, tmp_path: Path) -> None:
    (result,) = quick(tmp_path, name).results
    assert result.name == name
    assert result.series
    assert all(each.samples for each in result.series)


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="the peer is not there")
def test_any_server_that_a_command_starts_is_measured_in_turn(tmp_path: Path) -> None:
    (result,) = quick(tmp_path, "blk", "--only", "disk=null", "--peer", NULL_PEER).results
    assert {"vhost-reactor", "peer", "bare ring"} <= set(result.contenders("rate"))
