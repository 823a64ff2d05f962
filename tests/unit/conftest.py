"""What the unit tests share. Coroutine tests run on asyncio's own loop and on ours."""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reactor.loop import ReactorLoop
from reactor.native import CData, ffi, lib
from tests.support.driver import Driver, PackedDriver

DISK_BLOCKS = 2048
LOOPS = {"asyncio": asyncio.SelectorEventLoop, "reactor": ReactorLoop}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have each coroutine test once for every kind of loop."""
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("loop_kind")
        metafunc.parametrize("loop_kind", LOOPS)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    factory = LOOPS[pyfuncitem.callspec.params["loop_kind"]]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="vr-") as path:
        yield Path(path)


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
