from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reactor.native import CData, ffi, lib
from tests.support.driver import Driver

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
def drive(native: CData, ramdisk: CData) -> Iterator[Callable[..., Driver]]:
    """Make drivers of queues that are served from the malloc disk."""
    drivers: list[Driver] = []

    def make(**options: Any) -> Driver:
        drivers.append(Driver(native, options.pop("bdev", ramdisk), **options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()
