"""Waiting for what a dead reactor had handed to the kernel."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from bdev import fence
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors
from reactor.vault import NoVault


class DeadReactor:
    name = "reactor-0"


class Lender:
    """A cluster whose reactors all lend one fence, which is locked until ``finish``."""

    def __init__(self) -> None:
        self.vault = NoVault()
        self.fd = os.memfd_create("fence")
        self.holder = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR)
        fcntl.flock(self.holder, fcntl.LOCK_EX)

    def finish(self) -> None:
        os.close(self.holder)

    async def call_for_fds(self, *_: Any) -> tuple[None, FileDescriptors]:
        return None, FileDescriptors([os.dup(self.fd)])


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


async def several_polls() -> None:
    await asyncio.sleep(10 * fence.POLL)


def test_waits_until_the_lock_is_let_go() -> None:
    async def main() -> None:
        reactor, lender = DeadReactor(), Lender()
        await fence.hold(lender, reactor)
        waiting = asyncio.create_task(fence.drained(reactor))
        await several_polls()
        assert not waiting.done()
        lender.finish()
        await asyncio.wait_for(waiting, 5)

    run(main())


def test_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        monkeypatch.setattr(fence, "PATIENCE", 0.001)
        reactor, lender = DeadReactor(), Lender()
        await fence.hold(lender, reactor)
        waiting = asyncio.create_task(fence.drained(reactor))
        await several_polls()
        lender.finish()
        await waiting
        assert "wait for requests" in caplog.text

    run(main())


def test_reactor_without_file_disks_is_not_waited_for() -> None:
    run(fence.drained(DeadReactor()))


def test_fence_goes_with_the_last_disk() -> None:
    async def main() -> None:
        reactor, lender = DeadReactor(), Lender()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            await fence.hold(lender, reactor)
        assert len(os.listdir("/proc/self/fd")) > before
        fence.release(reactor)
        assert len(os.listdir("/proc/self/fd")) > before
        fence.release(reactor)
        assert len(os.listdir("/proc/self/fd")) == before

    run(main())


def test_another_fence_takes_the_place_of_one_that_is_gone() -> None:
    async def main() -> None:
        reactor, lender = DeadReactor(), Lender()
        await fence.hold(lender, reactor)
        again = Lender()
        await fence.hold(again, reactor)
        again.finish()
        await asyncio.wait_for(fence.drained(reactor), 5)

    run(main())


def test_a_ring_holds_its_fence_until_the_kernel_has_taken_it_apart(
    native: CData, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    setup = {
        "fd": os.open(path, os.O_RDWR),
        "block_size": 512,
        "block_count": 8,
        "memory_alignment": 1,
        "offset_alignment": 1,
    }
    disk = lib.file_bdev_open(native, 1, 0, ffi.new("struct file_setup *", setup))
    assert disk != ffi.NULL
    held = fence.Fence(os.dup(lib.file_fence(native)))
    assert not held.is_open
    lib.bdev_close(disk)
    assert lib.file_fence(native) < 0
    fcntl.flock(held.fd, fcntl.LOCK_SH)  # waits
    assert held.is_open
    os.close(held.fd)
