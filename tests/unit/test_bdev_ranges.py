"""Locked ranges: who waits for whom, across reactors, and what a holder that dies leaves behind."""

from __future__ import annotations

import asyncio
import errno
import platform
import subprocess
import sys
from typing import Any

import pytest

from bdev.io import BdevIO, Op, Request
from reactor.native import lib
from tests.support.bdevs import Bench, LocalReactor, on_bench
from tests.support.denied import NUMBERS
from tests.support.waiting import PATIENCE

BLOCK = 512
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_open() -> None:
    """Reactors die here, and within this process no kernel cleans up after them."""


async def two_ways(bench: Bench, **hang: Any) -> tuple[BdevIO, BdevIO]:
    """Open a malloc disk under an error device in two reactors."""
    await bench.rpc("bdev_malloc_create", name="M", block_size=BLOCK, num_blocks=2048)
    await bench.rpc("bdev_error_create", base_name="M")
    bdev = bench.registry.find("EE_M")
    ios = await bench.open("EE_M", 0), await bench.open("EE_M", 1)
    await bench.registry.use_ranges(bdev)
    ios[0].write(0, OLD * 8)
    if hang:
        await bench.rpc("bdev_error_inject_error", name="EE_M", error_type="pending", **hang)
    return ios


async def turns(count: int = 50) -> None:
    """Let every reactor run, and timers of microseconds with them."""
    for _ in range(count):
        await asyncio.sleep(0.0001)


async def end(request: Request) -> int:
    try:
        await asyncio.wait_for(request.completed(), PATIENCE)
    except OSError as error:
        return error.errno or -1
    return 0


def used(bench: Bench) -> int:
    table = bench.registry.find("EE_M").ranges
    assert table is not None
    return table.used


def swap(io: BdevIO, block: int, *, flags: int = 0, token: tuple[int, int] = (1, 1)) -> Request:
    return io.start(
        Op.COMPARE_AND_WRITE, block * BLOCK, buffers=[OLD, NEW], flags=flags, token=token
    )


@on_bench(reactors=2)
async def test_without_a_table_it_is_refused(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=BLOCK, num_blocks=2048)
    io = await bench.open("M")
    assert await end(swap(io, 0)) == errno.EOPNOTSUPP
    await bench.close("M")


@on_bench(reactors=2)
async def test_a_write_of_another_reactor_waits_for_the_range(bench: Bench) -> None:
    first, second = await two_ways(bench, io_type="read", num=1)
    holder = swap(first, 2)  # its read hangs
    await turns()
    held, free = (second.start(Op.WRITE, n * BLOCK, buffers=[b"w" * BLOCK]) for n in (2, 3))
    assert await end(free) == 0
    await turns()
    assert not held.done
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    assert await end(holder) == 0
    assert await end(held) == 0
    assert first.read(2 * BLOCK, BLOCK) == b"w" * BLOCK
    await close(bench)


@on_bench(reactors=2)
async def test_it_waits_for_a_write_that_another_reactor_has_begun(bench: Bench) -> None:
    first, second = await two_ways(bench, io_type="write", num=1)
    write = second.start(Op.WRITE, 2 * BLOCK, buffers=[b"w" * BLOCK])  # hangs
    request = swap(first, 2)
    await turns()
    assert not request.done
    assert used(bench) == 1
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    assert await end(write) == 0
    assert await end(request) == errno.EILSEQ
    assert request.miscompare == 0
    await close(bench)


@on_bench(reactors=2)
async def test_it_ends_although_others_go_on_writing_elsewhere(bench: Bench) -> None:
    first, second = await two_ways(bench)
    writes: list[Request] = []
    going = True

    async def write_on() -> None:
        """There is always one under way."""
        await bench.rpc(
            "bdev_error_inject_error", name="EE_M", io_type="write", num=10**6, error_type="nomem"
        )
        while going:
            writes.append(second.start(Op.WRITE, 9 * BLOCK, buffers=[OLD]))
            await asyncio.sleep(0)

    task = asyncio.create_task(write_on())
    await turns(5)
    await bench.rpc("bdev_error_inject_error", name="EE_M", io_type="clear")
    assert await end(swap(first, 2)) == 0
    going = False
    await task
    assert {await end(write) for write in writes} == {0}
    await close(bench)


@on_bench(reactors=2)
async def test_what_a_holder_that_dies_had_locked_is_free_again(bench: Bench) -> None:
    first, second = await two_ways(bench, io_type="read", num=1)
    lost = swap(first, 2)
    await turns()
    request = swap(second, 2)
    await turns()
    assert not request.done
    await die(bench, lost)
    assert await end(request) == 0
    assert used(bench) == 0
    await bench.close("EE_M", 1)


@on_bench(reactors=2)
async def test_the_write_of_one_that_dies_is_done_by_another(bench: Bench) -> None:
    first, second = await two_ways(bench, io_type="write", num=1)
    lost = swap(first, 2, token=(7, 8))  # its comparison has succeeded
    await turns()
    await die(bench, lost)
    await turns()
    assert used(bench) == 0
    assert second.read(2 * BLOCK, BLOCK) == NEW
    again = swap(second, 2, flags=lib.BDEV_IO_AGAIN, token=(7, 8))
    assert await end(again) == 0  # and not "the data is not the old one"
    other = swap(second, 2, flags=lib.BDEV_IO_AGAIN, token=(7, 9))
    assert await end(other) == errno.EILSEQ
    await bench.close("EE_M", 1)


@on_bench(reactors=2)
async def test_with_nobody_left_the_next_to_open_it_writes(bench: Bench) -> None:
    first, _ = await two_ways(bench, io_type="write", num=1)
    await bench.close("EE_M", 1)
    lost = swap(first, 2)
    await turns()
    await die(bench, lost)
    assert used(bench) == 1
    io = await bench.open("EE_M", 1)
    await turns()
    assert used(bench) == 0
    assert io.read(2 * BLOCK, BLOCK) == NEW
    await bench.close("EE_M", 1)


@on_bench(reactors=2)
async def test_removal_ends_those_that_wait(bench: Bench) -> None:
    first, second = await two_ways(bench, io_type="read", num=1)
    holder = swap(first, 2)
    await turns()
    waiting = [second.start(Op.WRITE, 2 * BLOCK, buffers=[NEW]), swap(second, 2)]
    await turns()
    await bench.registry.remove("EE_M")
    assert {await end(request) for request in [holder, *waiting]} == {errno.ENODEV}
    for reactor in bench.cluster.reactors:
        bdev = next(entry.bdev for entry in bench.registry._entries.values() if entry.removed)
        await bench.registry.close(bdev, reactor)


@pytest.mark.parametrize("length", [lib.BDEV_ATOMIC_BYTES + BLOCK])
def test_one_that_is_too_long_is_refused(length: int) -> None:
    @on_bench(reactors=2)
    async def run(bench: Bench) -> None:
        first, _ = await two_ways(bench)
        request = first.start(Op.COMPARE_AND_WRITE, 0, buffers=[bytes(length), bytes(length)])
        assert await end(request) == errno.EINVAL
        await close(bench)

    run()


async def die(bench: Bench, lost: Request) -> None:
    """End reactor 0 as a kill does: its handles, and what was in flight, are forgotten."""
    reactor = bench.reactor
    reactor.alive = False
    bdev = bench.registry.find("EE_M")
    reactor.handles.clear()
    LOST.append((reactor, lost))
    await bench.registry.reactor_lost(reactor)
    assert bdev.id not in reactor.handles


LOST: list[tuple[LocalReactor, Request]] = []  # the memory that C still points at


async def close(bench: Bench) -> None:
    await bench.close("EE_M", 0)
    await bench.close("EE_M", 1)


ALL_OF_IT = """
import pytest
from reactor.native import lib
from tests.support.denied import deny

deny(["membarrier"])
failed = pytest.main([{file!r}, "-q", "-p", "no:cacheprovider", "-k", "not membarrier"])
raise SystemExit(failed or not lib.barrier_is_dear)
"""


@pytest.mark.skipif(
    platform.machine() not in NUMBERS, reason="numbers of system calls are not known"
)
def test_without_membarrier_each_side_makes_its_own_barriers_and_all_of_it_holds() -> None:
    command = [sys.executable, "-c", ALL_OF_IT.format(file=__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
