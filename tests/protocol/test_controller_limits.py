"""Limits of a controller: on what all its queues are served together, from whatever disks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from reactor.errors import OperationError
from reactor.native import lib
from tests.support.adoption import cluster
from tests.support.scsi_stack import READY, close, connect, read_10
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend import BlkFrontend, Pending
from vhost.virtio_blk import BlkRequest
from vhost.workload import Runner, Workload, run

LIMIT = "vhost_controller_set_qos_limit"
REQUESTS = 32


@asynccontextmanager
async def disks(cpus: list[int] = CPUS[:1], **params: Any) -> AsyncIterator[Stack]:
    """Serve a malloc disk as "b0", which may have one request a second, and as "b1"."""
    async with stack(cpus) as made:
        for name in ("M0", "M1"):
            await made.call("bdev_malloc_create", name=name, num_blocks=2048, block_size=512)
        for name in ("b0", "b1"):
            await made.call("vhost_create_blk_controller", ctrlr=name, dev_name="M0", **params)
        await made.call(LIMIT, ctrlr="b0", rw_ios_per_sec=1)
        yield made


class Load:
    """Reads on every queue of some front-ends, more than the limit lets go while a test looks."""

    def __init__(self, fronts: Sequence[BlkFrontend]) -> None:
        self._fronts = fronts
        self._began = time.monotonic()
        self._sent = [
            front.submit(BlkRequest.IN, sector, length=512, queue=queue.index)
            for front in fronts
            for queue in front.queues
            for sector in range(REQUESTS)
        ]

    def served(self) -> int:
        for front in self._fronts:
            front.poll()
        return sum(one.done for one in self._sent)

    def check_limited(self, *, paid_twice: int = 0) -> None:
        """No more has been served than the time since the beginning allows, and not all."""
        allowed = time.monotonic() - self._began + 1.01 + paid_twice
        assert self.served() <= allowed
        assert self.served() < len(self._sent)

    def finish(self) -> None:
        """All are served, as if nothing had been."""
        answers: list[Pending] = [one.wait() for one in self._sent]
        assert {one.status for one in answers} == {0}


async def test_all_queues_and_front_ends_draw_on_one_limit() -> None:
    async with disks(CPUS[:2]) as target:
        fronts = [await target.connect("b0", queues=2) for _ in range(2)]
        load = await target.in_thread(lambda: Load(fronts))
        await target.until(lambda: load.served() >= 1)
        load.check_limited()
        assert {one["inflight_task_cnt"] for one in target.sessions()} == {0}
        await target.call(LIMIT, ctrlr="b0", rw_ios_per_sec=0)
        await target.in_thread(load.finish)
        await target.close(*fronts)


@pytest.mark.parametrize("limit", [{"rw_ios_per_sec": 20_000}, {"r_mbytes_per_sec": 100}], ids=str)
async def test_the_rate_is_exact_over_a_second(limit: dict[str, int]) -> None:
    """To 2 %: never more, and as much in a second in which the reactors had their CPUs."""
    rate = limit.get("rw_ios_per_sec") or limit["r_mbytes_per_sec"] * (1 << 20) // 4096
    async with disks(CPUS[:2]) as target:
        await target.call(LIMIT, ctrlr="b0", rw_ios_per_sec=0)
        await target.call(LIMIT, ctrlr="b0", **limit)
        front = await target.connect("b0", queues=2)
        work = Workload(front.size, "randread", depth=64, runtime=1e6, interrupt=True)
        runner = Runner(work, front.queues, front.memory)
        load = asyncio.create_task(asyncio.to_thread(run, runner))
        try:
            await target.until(lambda: runner.ops() > 0)
            rates = [await second_of(runner)]
            while rates[-1] < 0.98 * rate and len(rates) < 10:
                rates.append(await second_of(runner))
        finally:
            runner.stop()
            await load
        assert max(rates) <= 1.02 * rate
        assert rates[-1] >= 0.98 * rate, rates
        await target.close(front)


async def second_of(runner: Runner) -> float:
    """Return how many requests a second were answered during one, by the clock of limits."""
    began = lib.reactor_ticks()  # before the count, and the end after it: never too many
    before = runner.ops()
    await asyncio.sleep(1)
    count = runner.ops() - before
    return count * lib.reactor_tick_rate() / (lib.reactor_ticks() - began)


async def test_another_controller_of_the_same_bdev_is_not_limited() -> None:
    async with disks() as target:
        limited, free = await target.connect("b0"), await target.connect("b1")
        waiting = await target.in_thread(lambda: Load([limited]))
        load = await target.in_thread(lambda: Load([free]))
        await target.in_thread(load.finish)
        waiting.check_limited()
        await target.close(limited, free)  # what waits is in nobody's way


async def test_the_limit_stays_with_another_bdev() -> None:
    async with disks() as target:
        front = await target.connect("b0")
        load = await target.in_thread(lambda: Load([front]))
        swap = {"ctrlr": "b0", "dev_name": "M1"}
        await target.call("vhost_blk_controller_set_bdev", **swap)
        load.check_limited(paid_twice=1)  # a queue that goes on pays for its first again
        await target.call(LIMIT, ctrlr="b0", rw_ios_per_sec=0)
        await target.in_thread(load.finish)
        await target.close(front)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_the_limit_outlives_a_reactor(packed: bool) -> None:
    async with disks(packed_ring=packed) as target:
        front = await target.connect("b0", packed=packed)
        load = await target.in_thread(lambda: Load([front]))
        (reactor,) = target.cluster.reactors
        restored = target.vhost.host.restored(reactor.cpu)
        os.kill(reactor.pid, signal.SIGKILL)
        await target.until(lambda: target.vhost.host.restored(reactor.cpu) > restored)
        load.check_limited(paid_twice=1)
        await target.call(LIMIT, ctrlr="b0", rw_ios_per_sec=0)
        await target.in_thread(load.finish)
        await target.close(front)


def test_the_limit_outlives_the_control_process() -> None:
    with cluster() as target:
        target.rpc("bdev_malloc_create", name="M0", num_blocks=2048, block_size=512)
        target.rpc("vhost_create_blk_controller", ctrlr="b0", dev_name="M0")
        target.rpc(LIMIT, ctrlr="b0", rw_ios_per_sec=1)
        with BlkFrontend.connect(target.socket("b0")) as front:
            load = Load([front])
            target.kill_control()
            target.restart()
            load.check_limited(paid_twice=1)
            (shown,) = target.rpc("vhost_get_controllers")
            assert shown["assigned_rate_limits"]["rw_ios_per_sec"] == 1
            target.rpc(LIMIT, ctrlr="b0", rw_ios_per_sec=0)
            load.finish()
        target.stop()


async def test_luns_that_come_are_limited_with_the_others() -> None:
    async with stack() as target:
        for name in ("M0", "M1"):
            await target.call("bdev_malloc_create", name=name, num_blocks=2048, block_size=512)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        lun = {"ctrlr": "s0", "scsi_target_num": 0, "bdev_name": "M0"}
        await target.call("vhost_scsi_controller_add_target", **lun)
        front = await connect(target)
        await target.call(LIMIT, ctrlr="s0", rw_ios_per_sec=1)
        lun = {"ctrlr": "s0", "scsi_target_num": 1, "bdev_name": "M1"}
        await target.call("vhost_scsi_controller_add_target", **lun)
        # It has nothing to transfer, so that it is not limited; the unit was just powered on.
        for _ in range(REQUESTS):
            await target.in_thread(lambda: front.command(1, 0, READY))
        began = time.monotonic()
        sent = [
            front.submit(lun % 2, 0, read_10(0, 1), into=512, queue=0) for lun in range(REQUESTS)
        ]
        await target.in_thread(lambda: front.answer(sent[0]))
        front.poll()
        done = sum(one.written >= 0 for one in sent)
        assert done <= time.monotonic() - began + 1.01
        assert done < REQUESTS
        await target.call(LIMIT, ctrlr="s0", rw_ios_per_sec=0)
        for one in sent[1:]:
            answer = await target.in_thread(lambda one=one: front.answer(one))
            assert (answer.response, answer.status) == (0, 0)
        await close(target, front)


async def test_limits_are_shown_and_saved_while_there_are_any() -> None:
    async with disks() as target:
        limits = {"ctrlr": "b0", "w_mbytes_per_sec": 7, "w_mbytes_burst": 30}
        assert await target.call(LIMIT, **limits) is True
        first, second = await target.call("vhost_get_controllers")
        none = dict.fromkeys(
            ("rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec"), 0
        )
        expected = none | {"rw_ios_per_sec": 1, "w_mbytes_per_sec": 7, "w_mbytes_burst": 30}
        assert first["assigned_rate_limits"] == expected
        assert second["assigned_rate_limits"] == none
        saved = [call for call in target.vhost.config() if call["method"] == LIMIT]
        assert saved == [{"method": LIMIT, "params": {"ctrlr": "b0", **expected}}]
        await target.call(LIMIT, **saved[0]["params"])  # it can be loaded again
        ended = dict.fromkeys(saved[0]["params"], 0) | {"ctrlr": "b0"}
        await target.call(LIMIT, **ended)
        assert not [call for call in target.vhost.config() if call["method"] == LIMIT]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"ctrlr": "b0"}, "Invalid argument: no limit given: rw_ios_per_sec"),
        ({"ctrlr": "b0", "rw_ios_per_sec": -1}, "Invalid argument: rw_ios_per_sec -1: must be 0"),
        ({"ctrlr": "b0", "r_mbytes_per_sec": 1 << 62}, "Invalid argument: r_mbytes_per_sec"),
        ({"ctrlr": "none", "rw_ios_per_sec": 1}, "No such device: controller 'none'"),
    ],
)
async def test_limits_that_make_no_sense_are_refused(params: dict[str, Any], text: str) -> None:
    async with disks() as target:
        before = target.vhost.config()
        with pytest.raises(OperationError) as error:
            await target.call(LIMIT, **params)
        assert (error.value.code, error.value.message.startswith(text)) == (-32602, True)
        assert target.vhost.config() == before


async def test_a_controller_that_is_deleted_takes_its_limit_along() -> None:
    async with disks() as target:
        await target.call("vhost_delete_controller", ctrlr="b0")
        await target.call("vhost_create_blk_controller", ctrlr="b0", dev_name="M0")
        front = await target.connect("b0")
        load = await target.in_thread(lambda: Load([front]))
        await target.in_thread(load.finish)
        await target.close(front)
