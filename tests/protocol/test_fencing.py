"""What a dead reactor had in the kernel is over before its queues are served: on a disk that hangs.

The disk is a file of a FUSE file system, which holds writes back and lets them have their effect
when the test says so, however long their process has been dead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bdev.file import FileBdev
from tests.support.slowfile import Operation, SlowFile, slow_file
from tests.support.stack import CPUS, Stack, stack
from tests.support.waiting import PATIENCE
from vhost.frontend import BlkFrontend
from vhost.virtio_blk import WRITEBACK, BlkRequest

SIZE = 1 << 20
BLOCK = 4096
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowFile]:
    try:
        with slow_file(tmp_path / "mnt", SIZE, parallel=True) as file:
            yield file
    except PermissionError:
        pytest.skip("this user may not mount a file system")


@pytest.fixture
def synced(tmp_path: Path) -> Iterator[SlowFile]:
    """One of which the kernel sends the syncs that a write asks for."""
    try:
        with slow_file(tmp_path / "mnt", SIZE) as file:
            yield file
    except PermissionError:
        pytest.skip("this user may not mount a file system")


@asynccontextmanager
async def disk(file: SlowFile) -> AsyncIterator[Stack]:
    async with stack(CPUS[:1]) as made:
        path = str(file.path)
        await made.call("bdev_uring_create", name="F0", filename=path, block_size=512)
        await made.call("vhost_create_blk_controller", ctrlr="b0", dev_name="F0", packed_ring=True)
        try:
            yield made
        finally:
            file.let_go()  # whatever has failed: nothing ends before


async def kill_with_a_write_under_way(target: Stack, front: BlkFrontend, slow: SlowFile) -> Any:
    """Kill the reactor when the disk has a write of OLD, and hangs; returns that request."""
    slow.operations.clear()
    slow.holding = "write"
    pending = await target.in_thread(lambda: front.submit(BlkRequest.OUT, 0, OLD))
    await target.until(lambda: bool(slow.held))
    reactor = target.cluster.reactors[0]
    before = reactor.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    # Another process is there and ready, and might be given the queue.
    await target.until(lambda: reactor.pid not in (None, before))
    return pending


def writes(slow: SlowFile) -> list[bytes]:
    return [each.data for each in slow.operations if each.name == "write"]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_queue_waits_for_a_write_of_its_dead_reactor_and_newer_data_last(
    slow: SlowFile, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with disk(slow) as target:
        front = await target.connect("b0", packed=packed)
        pending = await kill_with_a_write_under_way(target, front, slow)
        # The log says after a second of waiting that it waits; nobody has served the queue.
        await target.until(lambda: "its disks wait for requests" in caplog.text)
        reactor = target.cluster.reactors[0]
        assert not reactor.alive
        assert writes(slow) == [OLD]
        front.poll()
        assert not pending.done

        slow.let_go()
        await target.in_thread(lambda: pending.wait(PATIENCE))
        assert pending.status == 0
        assert writes(slow) == [OLD, OLD]  # done again, since nobody has heard of the first
        await target.in_thread(lambda: front.write(0, NEW))
        assert await target.in_thread(lambda: front.read(0, BLOCK)) == NEW
        assert slow.data[:BLOCK] == NEW
        await target.close(front)


async def test_newer_data_would_be_lost_if_nobody_waited(
    slow: SlowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above is for: the same without a fence, so that it could not pass by chance."""

    async def no_fence(_self: FileBdev, _reactor: Any) -> None:
        pass

    monkeypatch.setattr(FileBdev, "fence", no_fence)
    async with disk(slow) as target:
        front = await target.connect("b0")
        pending = await kill_with_a_write_under_way(target, front, slow)
        slow.holding = ""  # what comes from now on is carried out at once
        await target.in_thread(lambda: pending.wait(PATIENCE))
        await target.in_thread(lambda: front.write(0, NEW))
        assert await target.in_thread(lambda: front.read(0, BLOCK)) == NEW
        slow.let_go()
        assert await target.in_thread(lambda: front.read(0, BLOCK)) == OLD
        await target.close(front)


# --- what is durable when ------------------------------------------------------------------------


def named(operations: list[Operation]) -> list[tuple[str, bool]]:
    return [(each.name, each.datasync) for each in operations if each.name != "read"]


async def test_a_flush_is_answered_when_the_file_has_been_synced(synced: SlowFile) -> None:
    async with disk(synced) as target:
        front = await target.connect("b0")
        await target.in_thread(lambda: front.write(0, NEW))
        synced.operations.clear()
        synced.holding = "fsync"
        pending = await target.in_thread(lambda: front.submit(BlkRequest.FLUSH))
        await target.until(lambda: bool(synced.held))
        assert named(synced.operations) == [("fsync", True)]
        front.poll()
        assert not pending.done
        synced.let_go()
        await target.in_thread(lambda: pending.wait(PATIENCE))
        assert pending.status == 0
        await target.close(front)


@pytest.mark.parametrize("writeback", [0, 1])
async def test_a_write_is_durable_when_it_is_answered_unless_writes_are_cached(
    synced: SlowFile, writeback: int
) -> None:
    async with disk(synced) as target:
        front = await target.connect("b0")
        await target.in_thread(lambda: front.write_config(WRITEBACK, bytes([writeback])))
        synced.operations.clear()
        await target.in_thread(lambda: front.write(0, NEW))
        expected = [("write", False)] if writeback else [("write", False), ("fsync", True)]
        assert named(synced.operations) == expected
        await target.close(front)
