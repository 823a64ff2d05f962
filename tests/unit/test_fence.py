"""Waiting for what a dead reactor had handed to the kernel."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self

import pytest

from bdev import fence
from bdev.engine import Engine
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors
from reactor.vault import NoVault
from tests.support.descriptors import open_fds


class DeadReactor:
    name = "reactor-0"


class Lender:
    """A cluster whose reactors all lend one fence, which is locked until ``finish``."""

    def __init__(self) -> None:
        self.vault = NoVault()
        self.fd = os.memfd_create("fence")
        self.holder = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR)
        fcntl.flock(self.holder, fcntl.LOCK_EX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        os.close(self.fd)

    def finish(self) -> None:
        if self.holder >= 0:
            os.close(self.holder)
            self.holder = -1

    async def call_for_fds(self, *_: Any) -> tuple[None, FileDescriptors]:
        return None, FileDescriptors([os.dup(self.fd)])


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


async def several_polls() -> None:
    await asyncio.sleep(10 * fence.POLL)


def test_waits_until_the_lock_is_let_go() -> None:
    async def main() -> None:
        reactor = DeadReactor()
        with Lender() as lender:
            await fence.hold(lender, reactor)
            waiting = asyncio.create_task(fence.drained(reactor))
            await several_polls()
            assert not waiting.done()
        await waiting

    run(main())


def test_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        monkeypatch.setattr(fence, "PATIENCE", 0.001)
        reactor = DeadReactor()
        with Lender() as lender:
            await fence.hold(lender, reactor)
            waiting = asyncio.create_task(fence.drained(reactor))
            await several_polls()
        await waiting
        assert "wait for requests" in caplog.text

    run(main())


def test_reactor_without_file_disks_is_not_waited_for() -> None:
    run(fence.drained(DeadReactor()))


def test_fence_goes_with_the_last_disk() -> None:
    async def main() -> None:
        reactor = DeadReactor()
        with Lender() as lender:
            before = open_fds()
            for _ in range(2):
                await fence.hold(lender, reactor)
            assert len(open_fds()) > len(before)
            fence.release(reactor)
            assert len(open_fds()) > len(before)
            fence.release(reactor)
            assert open_fds() == before

    run(main())


def test_another_fence_takes_the_place_of_one_that_is_gone() -> None:
    async def main() -> None:
        reactor = DeadReactor()
        with Lender() as lender, Lender() as again:
            await fence.hold(lender, reactor)
            await fence.hold(again, reactor)
            again.finish()
            await fence.drained(reactor)

    run(main())


@pytest.mark.parametrize("engine", list(Engine))
def test_an_engine_holds_the_fence_until_the_kernel_has_let_go_of_it(
    native: CData, tmp_path: Path, engine: Engine
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    setup = {
        "fd": os.open(path, os.O_RDWR),
        "block_size": 512,
        "block_count": 8,
        "memory_alignment": 1,
        "offset_alignment": 1,
        "engine": engine.native,
    }
    disk = lib.file_bdev_open(native, 1, 0, ffi.new("struct file_setup *", setup))
    assert disk != ffi.NULL
    held = fence.Fence(os.dup(lib.file_fence(native)))
    assert not held.is_open
    lib.bdev_close(disk)
    assert lib.file_fence(native) < 0
    fcntl.flock(held.fd, fcntl.LOCK_EX)  # waits
    assert held.is_open
    os.close(held.fd)


OPEN_AND_WAIT = """
import os, sys, time
from reactor.loop import PollSelector
from reactor.native import ffi, lib
from tests.support.descriptors import open_fds

native = PollSelector("never").native
setup = {"fd": os.open(sys.argv[1], os.O_RDWR), "block_size": 512, "block_count": 8,
         "memory_alignment": 1, "offset_alignment": 1, "engine": int(sys.argv[2])}
assert lib.file_bdev_open(native, 1, 0, ffi.new("struct file_setup *", setup)) != ffi.NULL
print(lib.file_fence(native), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("engine", list(Engine))
def test_the_fence_of_a_process_that_was_killed_opens(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    command = [sys.executable, "-c", OPEN_AND_WAIT, str(path), str(engine.native)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        held = fence.Fence(os.open(f"/proc/{process.pid}/fd/{number}", os.O_RDWR))
        assert not held.is_open
        process.kill()
    fcntl.flock(held.fd, fcntl.LOCK_EX)  # waits
    os.close(held.fd)
