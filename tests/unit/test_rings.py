"""Waiting for what a dead reactor had handed to the kernel."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from typing import Any

import pytest

from bdev import rings
from reactor.operations import FileDescriptors

TAKEN, COMPLETED = 64, 128


class DeadReactor:
    name = "reactor-0"


class FakeRing:
    """The counters of a ring, as the kernel shares them, and a cluster that lends it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 4096)
        self.memory = mmap.mmap(self.fd, 4096)
        self.number = 1

    def set(self, taken: int, completed: int) -> None:
        struct.pack_into("=I", self.memory, TAKEN, taken & 0xFFFFFFFF)
        struct.pack_into("=I", self.memory, COMPLETED, completed & 0xFFFFFFFF)

    async def call_for_fds(self, *_: Any) -> tuple[dict[str, int], FileDescriptors]:
        view = {"size": 4096, "taken": TAKEN, "completed": COMPLETED, "ring": self.number}
        return view, FileDescriptors([os.dup(self.fd)])


def run(main: Any) -> None:
    asyncio.run(main)


async def several_polls() -> None:
    await asyncio.sleep(10 * rings.POLL)


@pytest.mark.parametrize("taken", [5, 0x1_0000_0002])
def test_waits_until_as_many_are_completed_as_were_taken(taken: int) -> None:
    async def main() -> None:
        reactor, ring = DeadReactor(), FakeRing()
        ring.set(taken, taken - 3)
        await rings.hold(ring, reactor)
        waiting = asyncio.create_task(rings.drained(reactor))
        await several_polls()
        assert not waiting.done()
        ring.set(taken, taken - 1)
        await several_polls()
        assert not waiting.done()
        ring.set(taken, taken)
        await asyncio.wait_for(waiting, 5)

    run(main())


def test_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        monkeypatch.setattr(rings, "PATIENCE", 0.001)
        reactor, ring = DeadReactor(), FakeRing()
        ring.set(2, 0)
        await rings.hold(ring, reactor)
        waiting = asyncio.create_task(rings.drained(reactor))
        await several_polls()
        ring.set(2, 2)
        await waiting
        assert "wait for 2 requests" in caplog.text

    run(main())


def test_reactor_without_file_disks_is_not_waited_for() -> None:
    run(rings.drained(DeadReactor()))


def test_ring_goes_with_the_last_disk() -> None:
    async def main() -> None:
        reactor, ring = DeadReactor(), FakeRing()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            await rings.hold(ring, reactor)
        assert len(os.listdir("/proc/self/fd")) > before
        rings.release(reactor)
        assert len(os.listdir("/proc/self/fd")) > before
        rings.release(reactor)
        assert len(os.listdir("/proc/self/fd")) == before

    run(main())


def test_another_ring_takes_the_place_of_one_that_is_gone() -> None:
    async def main() -> None:
        reactor, ring = DeadReactor(), FakeRing()
        ring.set(9, 0)
        await rings.hold(ring, reactor)
        again = FakeRing()
        again.number = 2
        await rings.hold(again, reactor)
        await asyncio.wait_for(rings.drained(reactor), 5)

    run(main())
