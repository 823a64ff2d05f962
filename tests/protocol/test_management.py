"""Controllers that change while guests use them."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from reactor.errors import OperationError
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend import BlkFrontend, RequestError
from vhost.workload import Runner, Workload, run

needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")


def mask(*cpus: int) -> str:
    return hex(sum(1 << cpu for cpu in cpus))


@asynccontextmanager
async def disk(cpus: list[int] = CPUS[:1], **params: Any) -> AsyncIterator[Stack]:
    """Serve a malloc disk of 1 MiB as controller "b0"; there are others to take its place."""
    async with stack(cpus) as made:
        for name, blocks, size in (("M0", 2048, 512), ("M1", 4096, 512), ("M2", 1024, 512)):
            await made.call("bdev_malloc_create", name=name, num_blocks=blocks, block_size=size)
        await made.call("bdev_malloc_create", name="M4k", num_blocks=4096, block_size=4096)
        await made.call("bdev_null_create", name="N0", num_blocks=4096, block_size=512)
        await made.call("vhost_create_blk_controller", ctrlr="b0", dev_name="M0", **params)
        yield made


async def session(target: Stack) -> dict[str, Any]:
    (controller,) = await target.call("vhost_get_controllers")
    (found,) = controller["sessions"]
    result: dict[str, Any] = found
    return result


async def write(target: Stack, front: BlkFrontend, data: bytes, queue: int = 0) -> None:
    await target.in_thread(lambda: front.write(queue * 4096, data, queue=queue))


async def read(target: Stack, front: BlkFrontend, queue: int = 0) -> bytes:
    return await target.in_thread(lambda: front.read(queue * 4096, 4096, queue=queue))


async def test_force_deletes_under_a_front_end() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        with pytest.raises(OperationError, match="use force"):
            await target.call("vhost_delete_controller", ctrlr="b0")
        assert await target.call("vhost_delete_controller", ctrlr="b0", force=True) is True
        assert await target.call("vhost_get_controllers") == []
        assert "b0" not in os.listdir(target.folder)
        await target.in_thread(front.close)


async def test_disconnected_front_ends_may_come_back() -> None:
    async with disk() as target:
        fronts = [await target.connect("b0") for _ in range(2)]
        assert await target.call("vhost_controller_disconnect", ctrlr="b0") == 2
        assert target.sessions() == []
        assert await target.call("vhost_controller_disconnect", ctrlr="b0") == 0
        for front in fronts:
            await target.in_thread(front.close)
        again = await target.connect("b0")
        await write(target, again, b"a" * 4096)
        await target.close(again)


@needs_two
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_queues_move_to_another_reactor_and_back(packed: bool) -> None:
    first, second = CPUS[:2]
    async with disk(CPUS[:2], cpumask=mask(first), packed_ring=packed) as target:
        front = await target.connect("b0", queues=3)
        for round_, cpu in enumerate((second, first, second)):
            data = bytes([round_ + 1]) * 4096
            await write(target, front, data, queue=round_)
            move = {"ctrlr": "b0", "cpumask": mask(cpu)}
            places = await target.call("vhost_controller_move", **move)
            assert [place["cpu"] for place in places] == [cpu] * 3
            for queue in range(round_ + 1):
                assert await read(target, front, queue) == bytes([queue + 1]) * 4096
        described = (await session(target))["queues"]
        assert {queue["reactor"] for queue in described} == {f"reactor-{second}"}
        (saved,) = target.vhost.config()
        assert saved["params"]["cpumask"] == mask(second)
        assert sum(queue["statistics"]["requests"] for queue in described) == 9
        await target.close(front)


@needs_two
async def test_queues_are_spread_when_there_are_more_reactors() -> None:
    first, second = CPUS[:2]
    async with disk(CPUS[:2], cpumask=mask(first)) as target:
        front = await target.connect("b0", queues=4)
        both = {"ctrlr": "b0", "cpumask": mask(first, second)}
        places = await target.call("vhost_controller_move", **both)
        assert {place["cpu"] for place in places} == {first}  # where they may be, they stay
        await target.call("vhost_controller_move", ctrlr="b0", cpumask=mask(second))
        await write(target, front, b"x" * 4096, queue=3)
        assert await read(target, front, queue=3) == b"x" * 4096
        await target.close(front)


@needs_two
async def test_queues_move_under_load() -> None:
    async with disk(CPUS[:2]) as target:
        front = await target.connect("b0", queues=2)
        stop = False

        def load(queue: int) -> int:
            rounds = 0
            while not stop:
                data = bytes([rounds % 256]) * 4096
                front.write(queue * 4096, data, queue=queue)
                assert front.read(queue * 4096, 4096, queue=queue) == data
                rounds += 1
            return rounds

        working = asyncio.create_task(target.in_thread(lambda: load(0)))
        for cpu in (CPUS[1], CPUS[0]) * 5:
            await target.call("vhost_controller_move", ctrlr="b0", cpumask=mask(cpu))
        stop = True
        assert await working > 0
        await target.close(front)


async def test_a_move_to_where_no_reactor_is_changes_nothing() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        with pytest.raises(OperationError, match="CPU 900"):
            await target.call("vhost_controller_move", ctrlr="b0", cpumask=hex(1 << 900))
        with pytest.raises(OperationError, match="No such device"):
            await target.call("vhost_controller_move", ctrlr="no", cpumask=mask(CPUS[0]))
        assert (await session(target))["queues"][0]["cpu"] == CPUS[0]
        await target.close(front)


async def test_another_bdev_takes_the_place_under_a_guest() -> None:
    async with disk() as target:
        front = await target.connect("b0", queues=2)
        await write(target, front, b"old" * 1365 + b"!")
        swap = {"ctrlr": "b0", "dev_name": "M1"}
        assert await target.call("vhost_blk_controller_set_bdev", **swap) is True
        assert await read(target, front) == bytes(4096)
        await write(target, front, b"new" * 1365 + b"!", queue=1)
        await target.call("bdev_malloc_delete", name="M0")  # nobody uses it any more
        assert await read(target, front, queue=1) == b"new" * 1365 + b"!"
        (saved,) = target.vhost.config()
        assert saved["params"]["dev_name"] == "M1"
        await target.call("bdev_malloc_delete", name="M1")  # now this one is hot-removed
        with pytest.raises(RequestError):
            await read(target, front)
        await target.close(front)


async def test_a_controller_whose_bdev_was_removed_gets_another() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        await target.call("bdev_malloc_delete", name="M0")
        with pytest.raises(RequestError):
            await read(target, front)
        assert target.vhost.config() == []
        await target.call("vhost_blk_controller_set_bdev", ctrlr="b0", dev_name="M1")
        assert await read(target, front) == bytes(4096)
        assert len(target.vhost.config()) == 1
        await target.close(front)


async def test_another_bdev_is_in_the_configuration_before_and_after_nobody_is_served() -> None:
    async with disk(CPUS[:2]) as target:
        front = await target.connect("b0", queues=3)
        saved = []

        def save() -> None:
            (controller,) = target.vhost.controllers()
            (host,) = (target.vhost.host.find(one) for one in controller.sessions)
            assert host is not None
            assert len(host.queues) == 3
            assert not any(queue.attached for queue in host.queues)
            saved.append(target.vhost.config()[0]["params"]["dev_name"])

        target.management.save = save
        await target.call("vhost_blk_controller_set_bdev", ctrlr="b0", dev_name="M1")
        assert saved == ["M1"]
        await write(target, front, b"n" * 4096, queue=2)
        await target.close(front)


async def test_another_bdev_is_not_served_if_that_cannot_be_saved() -> None:
    async with disk() as target:
        front = await target.connect("b0", queues=2)
        await write(target, front, b"k" * 4096)

        def save() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.json")

        target.management.save = save
        with pytest.raises(OperationError, match=r"No space left.*cannot be saved: .*config.json"):
            await target.call("vhost_blk_controller_set_bdev", ctrlr="b0", dev_name="M1")
        assert await read(target, front) == b"k" * 4096
        assert target.vhost.config()[0]["params"]["dev_name"] == "M0"
        await target.call("bdev_malloc_delete", name="M1")  # nobody uses it
        await write(target, front, b"l" * 4096, queue=1)
        await target.close(front)


@needs_two
async def test_another_bdev_that_one_of_the_reactors_cannot_open_is_served_by_none() -> None:
    async with disk(CPUS[:2]) as target:
        await target.call("bdev_malloc_create", name="big", num_blocks=1 << 18, block_size=512)
        front = await target.connect("b0", queues=4)
        last = psutil.Process(target.cluster.reactors[-1].pid)
        work = Workload(front.size, "randrw", depth=4, verify=True, runtime=1e6)
        runner = Runner(work, front.queues, front.memory)
        load = asyncio.create_task(asyncio.to_thread(run, runner))
        try:
            await target.until(lambda: runner.ops() > 100)
            room = last.memory_info().vms + (1 << 25)  # for what is small
            last.rlimit(psutil.RLIMIT_AS, (room, room))
            with pytest.raises(OperationError, match="memory"):
                await target.call("vhost_blk_controller_set_bdev", ctrlr="b0", dev_name="big")
            before = runner.ops()
            await target.until(lambda: runner.ops() > before + 1000)
        finally:
            runner.stop()
            results = await load
        assert (results.errors, results.mismatches) == (0, 0)
        await target.call(
            "vhost_create_blk_controller", ctrlr="b1", dev_name="big", cpumask=mask(CPUS[0])
        )
        other = await target.connect("b1")
        written = await target.in_thread(lambda: other.read(0, front.size))
        assert written == bytes(front.size)  # by nobody
        assert target.vhost.config()[0]["params"]["dev_name"] == "M0"
        assert not any(queue["broken"] for one in target.sessions() for queue in one["queues"])
        await target.close(front, other)


@pytest.mark.parametrize("slow", ["deleted", "claimed"])
async def test_another_bdev_that_goes_while_requests_are_waited_for_is_refused(slow: str) -> None:
    async with disk() as target:
        front = await target.connect("b0")
        swap = target.call("vhost_blk_controller_set_bdev", ctrlr="b0", dev_name="M1")
        swapping = asyncio.create_task(swap)
        await asyncio.sleep(0)  # it has begun, and waits for the reactor
        if slow == "deleted":
            await target.call("bdev_malloc_delete", name="M1")
        else:
            target.registry.claim(target.registry.find("M1"), "somebody")
        with pytest.raises(OperationError, match=r"has been removed|claimed by somebody"):
            await swapping
        await write(target, front, b"k" * 4096)
        assert target.vhost.vhost_get_controllers()[0]["backend_specific"]["block"]["bdev"] == "M0"
        await target.close(front)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("M2", "has 1024 blocks, where guests know 2048"),
        ("M4k", "blocks of 4096 bytes, where guests know 512"),
        ("none", "No such device"),
        ("M1", "claimed by somebody"),
    ],
)
async def test_a_bdev_that_cannot_take_the_place_is_refused(name: str, text: str) -> None:
    async with disk() as target:
        target.registry.claim(target.registry.find("M1"), "somebody")
        front = await target.connect("b0")
        with pytest.raises(OperationError, match=text):
            await target.call("vhost_blk_controller_set_bdev", ctrlr="b0", dev_name=name)
        await write(target, front, b"k" * 4096)
        assert await read(target, front) == b"k" * 4096
        assert target.vhost.vhost_get_controllers()[0]["backend_specific"]["block"]["bdev"] == "M0"
        await target.close(front)


async def test_a_session_is_described_in_full() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        before = (await session(target))["queues"][0]["statistics"]
        await write(target, front, b"d" * 4096)
        described = await session(target)
        assert described["state"] == "running"
        assert {"VERSION_1", "FLUSH"} <= set(described["feature_names"])
        assert "CONFIG" in described["protocol_feature_names"]
        (queue,) = described["queues"]
        assert queue["reactor"] == f"reactor-{CPUS[0]}"
        assert (queue["index"], queue["size"], queue["running"]) == (0, 256, True)
        assert queue["broken"] is None
        assert queue["statistics"]["requests"] == before["requests"] + 1
        await target.in_thread(front.stop)
        assert (await session(target))["state"] == "stopped"
        await target.close(front)
