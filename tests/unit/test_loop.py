"""asyncio on the C poll loop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from reactor.loop import PollSelector, ReactorLoop
from reactor.native import lib
from reactor.stats import SlotAllocator, StatsArea
from tests.support.waiting import PATIENCE


@pytest.fixture(params=["adaptive", "always", "never"])
def loop(request: pytest.FixtureRequest) -> Iterator[ReactorLoop]:
    loop = ReactorLoop(PollSelector(mode=request.param))
    asyncio.set_event_loop(loop)
    yield loop
    loop.close()
    asyncio.set_event_loop(None)


def test_timers_fire_in_order_and_not_early(loop: ReactorLoop) -> None:
    fired: list[int] = []

    async def main() -> float:
        start = loop.time()
        loop.call_later(0.02, fired.append, 2)
        loop.call_later(0.01, fired.append, 1)
        await asyncio.sleep(0.03)
        return loop.time() - start

    assert loop.run_until_complete(main()) >= 0.03
    assert fired == [1, 2]


def test_streams_carry_data_both_ways(loop: ReactorLoop) -> None:
    async def main() -> bytes:
        a, b = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=a)
        peer_reader, peer_writer = await asyncio.open_connection(sock=b)
        writer.write(b"x" * 1_000_000)
        echoed = asyncio.create_task(peer_reader.readexactly(1_000_000))
        await writer.drain()
        peer_writer.write(await echoed)
        data = await reader.readexactly(1_000_000)
        for end in (writer, peer_writer):
            end.close()
            await end.wait_closed()
        return data

    assert loop.run_until_complete(main()) == b"x" * 1_000_000


def test_closed_peer_is_seen(loop: ReactorLoop) -> None:
    async def main() -> bytes:
        a, b = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=a)
        b.close()
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
        return data

    assert loop.run_until_complete(main()) == b""


def test_signal_handlers_run(loop: ReactorLoop) -> None:
    async def main() -> None:
        got = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, got.set)
        loop.call_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(got.wait(), PATIENCE)

    loop.run_until_complete(main())


def test_calls_from_threads_wake_it(loop: ReactorLoop) -> None:
    async def main() -> str:
        return await asyncio.to_thread(lambda: "done")

    assert loop.run_until_complete(main()) == "done"


def test_processes_are_awaited(loop: ReactorLoop) -> None:
    async def main() -> int:
        process = await asyncio.create_subprocess_exec("true")
        return await process.wait()

    assert loop.run_until_complete(main()) == 0


def test_busy_poller_runs_between_turns_until_it_is_paused(loop: ReactorLoop) -> None:
    async def main() -> list[int]:
        calls = 0

        def fn() -> None:
            nonlocal calls
            calls += 1
            if calls == 100:
                reached.set()

        reached = asyncio.Event()
        poller = loop.register_poller(fn)
        await asyncio.wait_for(reached.wait(), PATIENCE)
        poller.pause()
        paused_at = calls
        await asyncio.sleep(0.01)
        still = calls
        poller.resume()
        await asyncio.sleep(0.01)
        poller.unregister()
        return [paused_at, still, calls]

    paused_at, still, after = loop.run_until_complete(main())
    assert still == paused_at
    assert after > still


def test_timed_poller_keeps_its_period(loop: ReactorLoop) -> None:
    async def main() -> int:
        calls = 0

        def fn() -> None:
            nonlocal calls
            calls += 1
            if calls == 10:
                poller.unregister()  # here: we may be told after the next call
                reached.set()

        reached = asyncio.Event()
        start = time.monotonic()
        poller = loop.register_poller(fn, period_us=2000)
        await asyncio.wait_for(reached.wait(), PATIENCE)
        assert time.monotonic() - start >= 0.0199
        return calls

    assert loop.run_until_complete(main()) == 10


def test_poller_that_raises_is_paused_and_the_loop_goes_on(
    loop: ReactorLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> bool:
        def fn() -> None:
            raise ValueError("broken poller")

        poller = loop.register_poller(fn)
        await asyncio.sleep(0.01)
        return poller.active

    assert loop.run_until_complete(main()) is False
    assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ValueError]


def test_loop_without_work_sleeps() -> None:
    area = StatsArea.create(4)
    loop = ReactorLoop(PollSelector(area=area.address, slots=area.slots))
    cpu = time.process_time()
    loop.run_until_complete(asyncio.sleep(0.3))
    assert time.process_time() - cpu < 0.1
    counters = area.counters
    assert counters["sleeps"] >= 1
    assert counters["sleep_ticks"] > 0.2 * counters["tick_rate"]
    loop.close()
    area.close()


def test_tick_rate_is_what_the_clock_says() -> None:
    first = both_clocks()
    time.sleep(0.05)
    last = both_clocks()
    rate = (last[0] - first[0]) / (last[1] - first[1]) * 1e9
    assert rate == pytest.approx(lib.reactor_tick_rate(), rel=0.02)


def both_clocks() -> tuple[int, int]:
    """Return ticks and nanoseconds of one moment: of several readings the least interrupted."""
    readings = []
    for _ in range(20):
        before, ns, after = lib.reactor_ticks(), time.monotonic_ns(), lib.reactor_ticks()
        readings.append((after - before, before, ns))
    _, ticks, ns = min(readings)
    return ticks, ns


def test_watching_a_descriptor_that_epoll_refuses_is_an_error(loop: ReactorLoop) -> None:
    with open(__file__) as file, pytest.raises(PermissionError):
        loop.add_reader(file, lambda: None)


def test_slots_are_handed_out_lowest_first_and_run_out() -> None:
    slots = SlotAllocator(3)
    assert [slots.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="in use"):
        slots.allocate()
    slots.free(2)
    slots.free(0)
    assert slots.allocate() == 0


def test_slots_of_an_area_do_not_overlap() -> None:
    area = StatsArea.create(4)
    for index in range(4):
        area.slot(index, "struct queue_stats").requests = index + 1
    area.clear_slot(1)
    assert [area.slot(i, "struct queue_stats").requests for i in range(4)] == [1, 0, 3, 4]
    with pytest.raises(IndexError):
        area.slot(4, "struct queue_stats")
    area.close()
