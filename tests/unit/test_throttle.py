"""Limits of a controller, at one queue: what has to wait does so in the ring, in order."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from bdev.limits import Limits
from reactor.native import lib
from tests.support.driver import DATA, FLUSH, IN, OUT, Buffer, Driver

Drive = Callable[..., Driver]

SLACK = 0.010  # seconds of unused time that a limit keeps: QOS_SLACK_NS


@pytest.fixture(params=["split", "packed"])
def drive(drive: Drive, request: pytest.FixtureRequest) -> Drive:
    """Requests are put back into rings of both formats."""
    return partial(drive, packed=request.param == "packed")


@pytest.fixture
def limits() -> Iterator[Limits]:
    made = Limits("test")
    yield made
    made.close()


def limit(driver: Driver, limits: Limits, **values: int) -> None:
    """Put a queue under limits, or change them."""
    limits.rates.change(values)
    assert lib.queue_set_limits(driver.queue, limits.fd) == 0


def offer(driver: Driver, ident: int, kind: int = IN, length: int = 512) -> None:
    """Offer a request, in an indirect table of its own."""
    header = DATA + ident * 0x10000
    driver.put_header(header, kind)
    data = [Buffer(header + 16, length, writable=kind == IN)] if length else []
    status = Buffer(header + 0x8000, 1, writable=True)
    driver.send([Buffer(header, 16), *data, status], ident, table=header + 0x9000)


def served(driver: Driver) -> list[int]:
    """Return which requests have completed."""
    driver.poll()
    return [ident for ident, _ in driver.completed()]


def serve(driver: Driver, count: int) -> list[int]:
    """Turn until so many have completed; return which."""
    found: list[int] = []
    end = time.monotonic() + 10
    while len(found) < count:
        found += served(driver)
        assert time.monotonic() < end, f"only {found} were served"
    return found


def test_no_more_is_served_than_the_limit_allows(drive: Drive, limits: Limits) -> None:
    driver = drive()
    limit(driver, limits, rw_ios_per_sec=100)
    began = time.monotonic()
    for round_ in range(3):
        for ident in range(8):
            offer(driver, ident)
        assert serve(driver, 8) == list(range(8)), f"round {round_}"
    assert time.monotonic() - began >= 23 / 100 - SLACK


def test_the_rate_is_exact_over_a_second(drive: Drive, limits: Limits) -> None:
    """Two queues, to 2 %, by the clock that limits go by, less what this process did not run."""
    rate, drivers = 2000, (drive(), drive())
    limits.rates.change({"rw_ios_per_sec": rate})
    for driver in drivers:
        limit(driver, limits)
        for ident in range(8):
            offer(driver, ident)
    hz, slack = lib.reactor_tick_rate(), SLACK * lib.reactor_tick_rate()
    began = last = lib.reactor_ticks()
    done, lost = 0, 0.0
    while last - began < hz:
        for driver in drivers:
            for ident in served(driver):
                offer(driver, ident)
                done += 1
        now = lib.reactor_ticks()
        lost += max(0.0, now - last - slack)  # unused time that no limit keeps
        last = now
    elapsed = (last - began) / hz
    assert (elapsed - lost / hz) * rate * 0.98 <= done <= elapsed * rate * 1.02


def test_a_large_request_goes_and_the_next_waits_for_as_long_as_it_is_worth(
    drive: Drive, limits: Limits
) -> None:
    driver = drive()
    limit(driver, limits, r_mbytes_per_sec=1)
    began = time.monotonic()
    for ident in range(8):
        offer(driver, ident, length=16384)
    assert serve(driver, 8) == list(range(8))
    assert time.monotonic() - began >= 7 * 16384 / (1 << 20) - SLACK


def test_what_waits_is_not_in_flight_and_a_queue_stops_without_it(
    drive: Drive, limits: Limits
) -> None:
    driver = drive()
    limit(driver, limits, rw_ios_per_sec=1)
    for ident in range(8):
        offer(driver, ident)
    first = served(driver)
    assert 1 <= len(first) < 8
    assert lib.queue_in_flight(driver.queue) == 0
    base = driver.stop()  # before its time has come
    driver.start(base=base)
    assert serve(driver, 8 - len(first)) == list(range(len(first), 8))


def test_a_limit_of_writes_holds_no_read_up_but_those_behind_a_write(
    drive: Drive, limits: Limits
) -> None:
    driver = drive()
    limit(driver, limits, w_mbytes_per_sec=1)
    offer(driver, 0, OUT, 0x7000)
    offer(driver, 1, IN, 0x7000)
    assert served(driver) == [0, 1]
    limits.rates.change({"w_mbytes_per_sec": 1})  # what was charged is forgotten
    offer(driver, 2, OUT, 0x7000)
    offer(driver, 3, OUT)
    offer(driver, 4, IN)
    began = time.monotonic()
    assert serve(driver, 3) == [2, 3, 4]
    assert time.monotonic() - began >= 0x7000 / (1 << 20) - SLACK - 0.001


def test_a_request_without_data_is_not_limited(drive: Drive, limits: Limits) -> None:
    driver = drive()
    limit(driver, limits, rw_ios_per_sec=1)
    for ident in range(8):
        offer(driver, ident, FLUSH, 0)
    assert serve(driver, 8) == list(range(8))
    assert limits.rates.describe()["rw_ios_per_sec"] == 1
    offer(driver, 0)
    assert serve(driver, 1) == [0]  # none of them was charged


@pytest.mark.parametrize("change", ["raised", "ended", "taken away"])
def test_what_waits_goes_when_the_limit_is(drive: Drive, limits: Limits, change: str) -> None:
    driver = drive()
    limit(driver, limits, rw_ios_per_sec=1)
    for ident in range(8):
        offer(driver, ident)
    first = served(driver)
    assert len(first) < 8
    if change == "taken away":
        assert lib.queue_set_limits(driver.queue, -1) == 0
    else:
        limit(driver, limits, rw_ios_per_sec=10**9 if change == "raised" else 0)
    assert serve(driver, 8 - len(first)) == list(range(len(first), 8))


def test_queues_that_draw_on_the_same_limit_take_turns(drive: Drive, limits: Limits) -> None:
    first, second = drive(), drive()
    limits.rates.change({"rw_ios_per_sec": 100})
    for driver in (first, second):
        for ident in range(8):
            offer(driver, ident)
        limit(driver, limits)
    done = {first: 0, second: 0}
    while sum(done.values()) < 14:
        for driver in done:
            done[driver] += len(served(driver))
    assert min(done.values()) >= 6


def test_in_order_completions_stay_in_order(drive: Drive, limits: Limits) -> None:
    driver = drive(features=1 << 32 | 1 << 28 | 1 << 35)
    limit(driver, limits, rw_ios_per_sec=200)
    for ident in range(8):
        offer(driver, ident)
    assert serve(driver, 8) == list(range(8))


def test_limits_that_are_none_change_nothing(drive: Drive, limits: Limits) -> None:
    driver = drive()
    limit(driver, limits, rw_ios_per_sec=1)
    offer(driver, 0)
    offer(driver, 1)
    assert len(served(driver)) < 2
    assert lib.queue_set_limits(driver.queue, driver.kick) == -errno.ENODEV  # an eventfd
    assert len(served(driver)) < 2
