"""Task management where tasks are served by several reactors, and belong to several guests.

The disk withholds what is read until it is told to go on, so that tasks are in flight meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.support.scsi_stack import READY, close, code, connect, read_10, register, reserve
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend_scsi import Exchange, ScsiFrontend
from vhost.virtio_scsi import EVENTS_MISSED, Function, Response

QUEUES = 4
NOT_YET = 0.2  # seconds in which what must wait would have ended if it did not
needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs: reactors of their own")


@asynccontextmanager
async def withholding(*names: str) -> AsyncIterator[Stack]:
    async with stack(CPUS[:2]) as target:
        await target.call("bdev_malloc_create", name="M0", num_blocks=1024, block_size=512)
        await target.call("bdev_error_create", base_name="M0")
        fault = {"name": "EE_M0", "io_type": "read", "error_type": "pending", "num": 1000}
        await target.call("bdev_error_inject_error", **fault)
        for name in names or ("s0",):
            await target.call("vhost_create_scsi_controller", ctrlr=name)
            lun = {"ctrlr": name, "scsi_target_num": 0, "bdev_name": "EE_M0"}
            await target.call("vhost_scsi_controller_add_target", **lun)
        yield target


async def go_on(target: Stack) -> None:
    await target.call("bdev_error_resume_pending", name="EE_M0")


def taken(target: Stack) -> int:
    """Return how many requests, of all sessions, reactors have begun."""
    queues = [queue for session in target.sessions() for queue in session["queues"]]
    return sum(queue["statistics"]["requests"] for queue in queues)


async def held_up(target: Stack, ask: Callable[[], int]) -> int:
    """Return what ``ask`` returns, which has to wait until the disk goes on."""
    before = taken(target)
    running = asyncio.create_task(target.in_thread(ask))
    await target.until(lambda: taken(target) > before)
    await asyncio.wait({running}, timeout=NOT_YET)
    assert not running.done(), "it has ended before the tasks that it is for"
    await go_on(target)
    return await running


def places(target: Stack, session: int = 0) -> dict[int, int]:
    """Return the CPU of each queue of a session."""
    return {queue["index"]: queue["cpu"] for queue in target.sessions()[session]["queues"]}


def distant(target: Stack) -> int:
    """Return the number of a request queue on another reactor than the control queue."""
    found = places(target)
    return next(index - 2 for index in found if index >= 2 and found[index] != found[0])


def read_everywhere(front: ScsiFrontend) -> list[Exchange]:
    """Send a task, 100 and so on, on each queue; return when all are in flight."""
    sent = [
        front.submit(0, 0, read_10(0, 8), into=4096, queue=queue, tag=100 + queue)
        for queue in range(QUEUES)
    ]
    for tag in range(100, 100 + QUEUES):
        while front.manage(Function.QUERY_TASK, 0, 0, tag) == 0:
            pass
    return sent


async def answers(target: Stack, front: ScsiFrontend, sent: list[Exchange]) -> list[int]:
    return [(await target.in_thread(lambda one=one: front.answer(one))).response for one in sent]


@needs_two
async def test_queues_of_one_guest_are_on_all_reactors() -> None:
    async with withholding() as target:
        front = await connect(target, request_queues=QUEUES)
        assert {*places(target).values()} == {*CPUS[:2]}
        sent = await target.in_thread(lambda: read_everywhere(front))
        await go_on(target)
        assert await answers(target, front, sent) == [0] * QUEUES
        await close(target, front)


@needs_two
async def test_one_task_on_another_reactor_is_found_and_aborted() -> None:
    async with withholding() as target:
        front = await connect(target, request_queues=QUEUES)
        queue = distant(target)
        tag = 100 + queue
        sent = await target.in_thread(lambda: read_everywhere(front))
        assert await target.in_thread(lambda: front.manage(Function.QUERY_TASK, 0, 0, 99)) == 0
        assert await held_up(target, lambda: front.manage(Function.ABORT_TASK, 0, 0, tag)) == 0
        responses = await answers(target, front, sent)
        assert responses.pop(queue) == Response.ABORTED
        assert responses == [0] * (QUEUES - 1)
        assert await target.in_thread(lambda: front.manage(Function.QUERY_TASK, 0, 0, tag)) == 0
        await close(target, front)


async def test_all_tasks_of_a_nexus_are_aborted() -> None:
    async with withholding() as target:
        front = await connect(target, request_queues=QUEUES)
        for function, response in (
            (Function.ABORT_TASK_SET, Response.ABORTED),
            (Function.CLEAR_TASK_SET, Response.ABORTED),
            (Function.I_T_NEXUS_RESET, Response.RESET),
            (Function.LOGICAL_UNIT_RESET, Response.RESET),
        ):
            sent = await target.in_thread(lambda: read_everywhere(front))

            def ask(function: Function = Function.QUERY_TASK_SET) -> int:
                return front.manage(function, 0, 0)

            assert await target.in_thread(ask) == Response.FUNCTION_SUCCEEDED
            assert await held_up(target, lambda function=function, ask=ask: ask(function)) == 0
            assert await answers(target, front, sent) == [response] * QUEUES
            assert await target.in_thread(ask) == 0
            if response == Response.RESET:  # which the nexus is told
                await target.in_thread(lambda: front.command(0, 0, READY))
        await close(target, front)


async def test_aca_is_of_a_nexus_on_all_reactors_until_it_is_cleared() -> None:
    async with withholding() as target:
        front = await connect(target, request_queues=QUEUES)

        def ready(queue: int) -> int:
            return front.answer(front.submit(0, 0, READY, queue=queue)).status

        def work() -> None:
            failed = front.command(0, 0, read_10(1 << 20, 1)[:-1] + b"\4", into=512)
            assert code(failed) == (5, 0x2100)
            assert [ready(queue) for queue in range(QUEUES)] == [0x30] * QUEUES
            assert front.manage(Function.CLEAR_ACA, 0, 0) == 0
            assert [ready(queue) for queue in range(QUEUES)] == [0] * QUEUES

        await target.in_thread(work)
        await close(target, front)


async def test_reset_aborts_what_another_guest_has_sent() -> None:
    """A reset is for all nexuses; a task set belongs to one."""
    async with withholding("s0", "s1") as target:
        first = await connect(target, request_queues=QUEUES)
        second = await connect(target, "s1")
        sent = await target.in_thread(lambda: read_everywhere(first))
        clear, reset = Function.CLEAR_TASK_SET, Function.LOGICAL_UNIT_RESET
        assert await target.in_thread(lambda: second.manage(clear, 0, 0)) == 0
        assert await held_up(target, lambda: second.manage(reset, 0, 0)) == 0
        assert await answers(target, first, sent) == [Response.RESET] * QUEUES
        answer = await target.in_thread(lambda: first.command(0, 0, READY))
        assert code(answer) == (6, 0x2903)
        await close(target, first, second)


async def test_preempt_and_abort_ends_what_the_preempted_have_sent() -> None:
    async with withholding("s0", "s1") as target:
        first = await connect(target, request_queues=QUEUES)
        second = await connect(target, "s1")

        def fence() -> list[Exchange]:
            assert first.command(0, 0, *register(1)).status == 0
            assert second.command(0, 0, *register(2)).status == 0
            assert first.command(0, 0, *reserve(1, 5)).status == 0
            return read_everywhere(first)

        sent = await target.in_thread(fence)
        cdb, data = bytes([0x5F, 5, 5, 0, 0, 0, 0, 0, 24, 0]), struct.pack(">QQ8x", 2, 1)
        assert await held_up(target, lambda: second.command(0, 0, cdb, data).status) == 0
        assert await answers(target, first, sent) == [Response.ABORTED] * QUEUES
        assert code(await target.in_thread(lambda: first.command(0, 0, READY))) == (6, 0x2A05)
        await close(target, first, second)


@needs_two
async def test_function_outlives_the_reactor_that_has_its_tasks() -> None:
    """What the dead one had in flight is served again, and is over before the function is."""
    async with withholding() as target:
        front = await connect(target, request_queues=QUEUES)
        cpu = places(target)[2 + distant(target)]
        (reactor,) = [one for one in target.cluster.reactors if one.cpu == cpu]
        sent = await target.in_thread(lambda: read_everywhere(front))
        before = reactor.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        running = asyncio.create_task(
            target.in_thread(lambda: front.manage(Function.ABORT_TASK_SET, 0, 0))
        )
        await target.until(lambda: reactor.alive and reactor.pid != before)
        await asyncio.wait({running}, timeout=NOT_YET)
        assert not running.done()
        while not running.done():  # what is served again is withheld again
            await go_on(target)
            await asyncio.sleep(0.01)
        assert await running == 0
        assert all(one.written >= 0 for one in sent)
        assert {*await answers(target, front, sent)} <= {0, Response.ABORTED}
        await close(target, front)


async def test_events_that_died_with_their_reactor_are_missed_ones() -> None:
    async with withholding() as target:
        front = await connect(target)
        lun = {"ctrlr": "s0", "scsi_target_num": 5, "bdev_name": "EE_M0"}
        await target.call("vhost_scsi_controller_add_target", **lun)
        (reactor,) = [one for one in target.cluster.reactors if one.cpu == places(target)[1]]
        before = reactor.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        await target.until(lambda: reactor.alive and reactor.pid != before)
        await target.in_thread(lambda: front.post_events(1))
        event, _, _ = await target.in_thread(front.event)
        assert event == EVENTS_MISSED
        await close(target, front)
