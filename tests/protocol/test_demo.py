"""``make run``: two disks, a proof, and an end that leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.cluster import ROOT
from tests.support.waiting import PATIENCE, wait_until


def start(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vhost.demo", *options, "--lock-dir", str(tmp_path)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_it_proves_both_disks_and_ends(tmp_path: Path) -> None:
    with start(tmp_path, "--once") as demo:
        output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 0, output
    assert "ram0" in output
    assert "file0" in output
    assert "-device vhost-user-blk-pci,chardev=ram0" in output


def test_it_serves_until_a_signal(tmp_path: Path) -> None:
    with start(tmp_path) as demo:
        assert demo.stdout is not None
        assert any("Serving until" in line for line in demo.stdout)
        everyone = psutil.Process(demo.pid).children(recursive=True)
        demo.terminate()
        output, _ = demo.communicate(timeout=PATIENCE)
    assert (demo.returncode, output.strip()) == (0, "Stopped; nothing is left behind.")
    # What outlives its parent for a moment is reaped by init, when that comes to it.
    wait_until(lambda: not any(process.is_running() for process in everyone))


def test_a_control_process_that_is_killed_takes_everything_with_it(tmp_path: Path) -> None:
    with start(tmp_path) as demo:
        assert demo.stdout is not None
        assert any("Serving until" in line for line in demo.stdout)
        everyone = psutil.Process(demo.pid).children(recursive=True)
        psutil.Process(demo.pid).children()[0].kill()
        output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 1
    assert "the control process was killed by SIGKILL" in output
    wait_until(lambda: not any(process.is_running() for process in everyone))
