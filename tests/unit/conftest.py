from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reactor.native import CData, ffi, lib
from tests.support.driver import Driver, PackedDriver

DISK_BLOCKS = 2048


@pytest.fixture
def native() -> Iterator[CData]:
    """A poll loop without asyncio around it."""
    reactor = lib.reactor_create(lib.REACTOR_NEVER, 0, ffi.NULL, 0)
    assert reactor != ffi.NULL
    yield reactor
    lib.reactor_destroy(reactor)


@pytest.fixture
def ramdisk(native: CData) -> Iterator[CData]:
    """A malloc disk of 1 MiB."""
    fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, DISK_BLOCKS * 512)
    bdev = lib.malloc_bdev_open(native, 9, 0, 512, DISK_BLOCKS, fd, 0)
    os.close(fd)
    assert bdev != ffi.NULL
    yield bdev
    lib.bdev_close(bdev)


@pytest.fixture
def filedisk(native: CData, tmp_path: Path) -> Iterator[CData]:
    """A file disk of 1 MiB: what it is asked in one turn completes in a later one."""
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(DISK_BLOCKS * 512))
    setup = {
        "fd": os.open(path, os.O_RDWR | os.O_CLOEXEC),
        "block_size": 512,
        "block_count": DISK_BLOCKS,
        "memory_alignment": 1,
        "offset_alignment": 1,
        "unmap": True,
    }
    bdev = lib.file_bdev_open(native, 8, 0, ffi.new("struct file_setup *", setup))
    assert bdev != ffi.NULL
    yield bdev
    lib.bdev_close(bdev)


@pytest.fixture
def drive(native: CData, ramdisk: CData) -> Iterator[Callable[..., Driver]]:
    """Make drivers of queues that are served from the malloc disk."""
    drivers: list[Driver] = []

    def make(*, packed: bool = False, **options: Any) -> Driver:
        kind = PackedDriver if packed else Driver
        drivers.append(kind(native, options.pop("bdev", ramdisk), **options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()
