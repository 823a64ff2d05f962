"""Locks on the files of disks: when they are free again."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from bdev.file import FileBdev
from reactor.errors import OperationError
from tests.support.bdevs import Bench, on_bench


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


async def create(bench: Bench, path: Path) -> FileBdev:
    await bench.rpc("bdev_uring_create", name="F", filename=str(path))
    return bench.registry.find_as("F", FileBdev)


def is_locked(path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@on_bench()
async def test_a_file_of_a_deleted_disk_is_free_though_the_kernel_has_it_open(
    bench: Bench, path: Path
) -> None:
    disk = await create(bench, path)
    await bench.open("F")
    kept = os.dup(disk.backing.fd)  # as io_uring keeps it, for as long as it likes
    await bench.close("F")
    assert is_locked(path)
    await bench.rpc("bdev_uring_delete", name="F")
    assert not is_locked(path)
    os.close(kept)


@on_bench()
async def test_a_file_that_a_dead_reactor_may_write_to_stays_locked(
    bench: Bench, path: Path
) -> None:
    disk = await create(bench, path)
    await bench.open("F")
    bench.cluster.refuse["bdev_close"] = OperationError(-errno.ECONNRESET, "it is dead")
    await bench.close("F")
    await bench.rpc("bdev_uring_delete", name="F")
    assert is_locked(path)
    del bench.cluster.refuse["bdev_close"]
    await bench.cluster.call(bench.reactor, "bdev_close", {"id": disk.id})
