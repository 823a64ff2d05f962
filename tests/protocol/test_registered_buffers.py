"""Guest memory as registered buffers, in a running cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartCluster
from tests.support.cluster import Cluster
from tests.support.waiting import PATIENCE
from vhost.frontend import BlkFrontend

SIZE = 16 << 20
MEMORY = 32 << 20

# Root has the privilege to exceed the limit of locked memory.
DROP = "setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock" if os.geteuid() == 0 else ""


def serve(cluster: Cluster, path: Path, **params: Any) -> str:
    with path.open("wb") as file:
        file.truncate(SIZE)
    cluster.rpc("bdev_uring_create", name="f", filename=str(path), block_size=512)
    params = {"registered_buffers": True, **params}
    cluster.rpc("vhost_create_blk_controller", ctrlr="f", dev_name="f", **params)
    return str(cluster.socket("f"))


def session(cluster: Cluster) -> dict[str, Any]:
    (controller,) = cluster.rpc("vhost_get_controllers")
    (session,) = controller["sessions"]
    found: dict[str, Any] = session
    return found


def user_buffers(pid: int) -> int:
    """Return how many buffers the io_urings of a process have registered."""
    total = 0
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        text = info.read_text()
        if "UserBufs" in text:
            total += len(re.findall(r"^\s*\d+: 0x[0-9a-f]+/[1-9]\d*$", text, re.MULTILINE))
    return total


def verify(path: str, *options: str) -> str:
    command = [sys.executable, "-m", "vhost.cli", "io", path, "--verify", "--rw", "randrw"]
    command += ["--runtime", "1", "--iodepth", "16", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("bs", ["512", "4k", "64k"])
def test_verified_io_is_right(start_cluster: StartCluster, tmp_path: Path, bs: str) -> None:
    verify(serve(start_cluster(), tmp_path / "disk"), "--bs", bs, "--queues", "2")


def test_memory_is_registered_while_a_front_end_is_there(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    cluster = start_cluster()
    path = serve(cluster, tmp_path / "disk")
    (pid,) = cluster.reactors().values()
    with BlkFrontend.connect(path, memory=MEMORY, regions=3) as front:
        assert session(cluster)["registered_bytes"] >= MEMORY
        assert user_buffers(pid) == 3
        front.write(0, b"x" * 4096)
        assert front.read(0, 4096) == b"x" * 4096
        front.stop()
        front.start()
        assert front.read(0, 4096) == b"x" * 4096
        assert user_buffers(pid) == 3
    with BlkFrontend.connect(path, memory=MEMORY, regions=1) as front:  # the first is gone by now
        assert front.read(0, 4096) == b"x" * 4096
    cluster.rpc("vhost_create_blk_controller", ctrlr="plain", dev_name="f")
    with BlkFrontend.connect(cluster.socket("plain")) as front:
        assert front.read(0, 4096) == b"x" * 4096
        sessions = [s for c in cluster.rpc("vhost_get_controllers") for s in c["sessions"]]
        assert sessions[-1]["registered_bytes"] == 0


def test_a_replaced_reactor_registers_again(start_cluster: StartCluster, tmp_path: Path) -> None:
    cluster = start_cluster()
    with BlkFrontend.connect(serve(cluster, tmp_path / "disk"), memory=MEMORY) as front:
        front.write(0, b"y" * 8192)
        (cpu,) = cluster.reactors()
        pid = cluster.kill_reactor(cpu)
        assert front.read(0, 8192) == b"y" * 8192
        assert user_buffers(pid) == 1
        assert session(cluster)["registered_bytes"] >= MEMORY


def test_other_kinds_of_disks_pin_nothing(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    cluster.rpc("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
    arguments = {"ctrlr": "m", "dev_name": "m", "registered_buffers": True}
    cluster.rpc("vhost_create_blk_controller", **arguments)
    with BlkFrontend.connect(cluster.socket("m")):
        assert session(cluster)["registered_bytes"] == 0
    (saved,) = cluster.rpc("framework_get_config", name="vhost_blk")
    assert saved["params"]["registered_buffers"] is True


def test_a_limit_of_locked_memory_costs_a_warning_and_nothing_else(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nulimit -l 1024\nexec {DROP} {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    cluster = start_cluster()
    monkeypatch.undo()
    path = serve(cluster, tmp_path / "disk")
    for _ in range(2):
        with BlkFrontend.connect(path, memory=MEMORY) as front:
            assert session(cluster)["registered_bytes"] == 0
            front.write(0, b"z" * 4096)
            assert front.read(0, 4096) == b"z" * 4096
    assert cluster.log.count("over the limit of locked memory, 1024 KiB: raise it") == 1
