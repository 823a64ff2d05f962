"""What guests get under limits, in a second or so: as much as the limit says, and equal shares."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.support.stack import CPUS, Stack, stack
from vhost.frontend import BlkFrontend
from vhost.results import Results
from vhost.workload import Runner, Workload, run

RATE = 5000
SIZE = 8192  # blocks
SHARED = 1500  # requests a second, of a group


async def make_disk(target: Stack, number: int) -> str:
    """Serve a disk of its own as "b" and its number."""
    await target.call("bdev_malloc_create", name=f"M{number}", num_blocks=SIZE, block_size=512)
    await target.call("vhost_create_blk_controller", ctrlr=f"b{number}", dev_name=f"M{number}")
    return f"b{number}"


def work_of(front: BlkFrontend, mode: str) -> Workload:
    """Return a workload that has 64 requests waiting on each queue, and goes on for ever."""
    return Workload(front.size, mode, depth=64, runtime=60.0, interrupt=True, indirect=True)


async def load(front: BlkFrontend, **work: Any) -> Results:
    """Run a workload on all queues; it sleeps when there is nothing to do."""
    wanted: dict[str, Any] = {"depth": 16, "runtime": 10.0, "interrupt": True} | work
    runner = Runner(Workload(front.size, **wanted), front.queues, front.memory)
    return await asyncio.to_thread(run, runner)


@pytest.mark.parametrize(
    ("limit", "block_size"),
    [({"rw_ios_per_sec": RATE}, 512), ({"r_mbytes_per_sec": 20}, 4096)],
    ids=["requests", "bytes"],
)
async def test_a_controllers_rate_is_exact_over_a_second(
    limit: dict[str, int], block_size: int
) -> None:
    """No more than it says, to 2 %, on two reactors; how late it may be is the machine's affair."""
    async with stack(CPUS[:2]) as target:
        name = await make_disk(target, 0)
        await target.call("vhost_controller_set_qos_limit", ctrlr=name, **limit)
        front = await target.connect(name, queues=2)
        count = RATE + RATE // 5
        began = time.monotonic()
        results = await load(front, block_size=block_size, requests=count)
        took = time.monotonic() - began
        assert (results.read.ops, results.errors) == (count, 0)
        allowed = limit.get("rw_ios_per_sec") or (limit["r_mbytes_per_sec"] << 20) / block_size
        assert took >= count / allowed / 1.02
        await target.close(front)


async def test_a_controllers_limit_changes_while_its_guest_runs() -> None:
    async with stack() as target:
        name = await make_disk(target, 0)
        front = await target.connect(name)
        runner = Runner(Workload(front.size, runtime=60.0, depth=8), front.queues, front.memory)
        running = asyncio.create_task(asyncio.to_thread(run, runner))
        await target.until(lambda: runner.ops() > 100)
        await target.call("vhost_controller_set_qos_limit", ctrlr=name, rw_ios_per_sec=1)
        limited, began = runner.ops(), time.monotonic()
        await asyncio.sleep(0.1)
        # What was being answered as the limit came, and what the time since allows.
        assert runner.ops() - limited <= 8 + 1 + time.monotonic() - began
        await target.call("vhost_controller_set_qos_limit", ctrlr=name, rw_ios_per_sec=0)
        free = runner.ops() + 1000
        await target.until(lambda: runner.ops() > free)
        runner.stop()
        assert (await running).errors == 0
        await target.close(front)


async def test_a_group_is_fair_between_guests() -> None:
    """One asks for far more at a time, on more queues: it gets no more than the other."""
    async with stack() as target:
        await target.call("bdev_qos_group_create", name="G", rw_ios_per_sec=SHARED)
        names = [await make_disk(target, number) for number in range(2)]
        for number in range(2):
            await target.call("bdev_qos_group_add_bdev", name="G", bdev_name=f"M{number}")
        fronts = [await target.connect(names[0], queues=4), await target.connect(names[1])]
        runners = [
            Runner(work_of(front, mode), front.queues, front.memory)
            for front, mode in zip(fronts, ("randwrite", "randread"), strict=True)
        ]
        running = [asyncio.create_task(asyncio.to_thread(run, one)) for one in runners]
        try:
            await target.until(lambda: all(one.ops() > 100 for one in runners))
            before, began = [one.ops() for one in runners], time.monotonic()
            await target.until(lambda: sum(one.ops() for one in runners) >= sum(before) + SHARED)
            got = [one.ops() - was for one, was in zip(runners, before, strict=True)]
            took = time.monotonic() - began
        finally:
            await target.call("bdev_qos_group_set_limit", name="G", rw_ios_per_sec=0)
            for one in runners:
                one.stop()
        assert [(await one).errors for one in running] == [0, 0]
        await target.close(*fronts)
    # A front-end that the system lets wait for long asks for nothing meanwhile.
    assert got[0] == pytest.approx(got[1], rel=0.15)
    assert sum(got) <= SHARED * (took + 0.1)
