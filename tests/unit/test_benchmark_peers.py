"""Servers that a command starts: who runs when, and which take part."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from benchmarks.load import guest_memory
from benchmarks.peers import Peer
from benchmarks.servers import Disk

DISKS = [Disk("null", 1 << 20, Path()), Disk("malloc", 2 << 20, Path("/x"))]
COMMAND = "echo {device} {disk} {size} {file} {cpu} > {socket}.asked; touch {socket}; exec sleep 60"
TIMEOUT = 10.0


def stopped(peer: Peer, expected: set[str]) -> bool:
    """Wait until exactly these disks' processes are stopped: signals take their time."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        states = {kind: psutil.Process(pid).status() for kind, pid in peer.pids().items()}
        if {k for k, state in states.items() if state == psutil.STATUS_STOPPED} == expected:
            return True
        time.sleep(0.01)
    return False


def test_only_the_process_whose_turn_it_is_runs(tmp_path: Path) -> None:
    peer = Peer("x", COMMAND, DISKS, tmp_path, 0, "scsi")
    with peer:
        assert stopped(peer, {"null", "malloc"})
        with peer.turn("malloc"):
            assert stopped(peer, {"null"})
        assert stopped(peer, {"null", "malloc"})
        pids = peer.pids().values()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_command_is_told_what_to_serve(tmp_path: Path) -> None:
    with Peer("x", COMMAND, DISKS, tmp_path, 0, "scsi"):
        assert (tmp_path / "malloc.asked").read_text() == "scsi malloc 2097152 /x 0\n"


def test_a_command_that_ends_is_reported_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"x does not serve .*/null:\nno such thing"):
        Peer("x", "echo no such thing; exit 1", DISKS, tmp_path, 0)


def test_a_command_that_says_no_device_serves_blk_only() -> None:
    assert Peer.serves("x {socket}", "blk")
    assert not Peer.serves("x {socket}", "scsi")
    assert Peer.serves("x {socket} {device}", "scsi")


def test_too_few_huge_pages_are_reported_with_what_to_do() -> None:
    with pytest.raises(OSError, match=r"huge pages for a guest: .*nr_hugepages"):
        guest_memory(1 << 46, huge=True)
