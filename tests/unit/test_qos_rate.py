"""The arithmetic of limits, on a clock that the test moves: exact rates, bursts, fair shares."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from bdev.kind import Op
from bdev.limits import Rates
from reactor.native import CData, ffi, lib

HZ = int(lib.reactor_tick_rate())
LONG_AGO = 10**12  # ticks: the clock begins here
MIB = 1 << 20


class Source:
    """A handle that always has a request waiting, or one every ``period`` ticks."""

    def __init__(self, length: int = 512, op: Op = Op.READ, period: int = 0) -> None:
        self.length, self.op, self.period = length, op, period
        self.started: list[int] = []  # ticks

    def until(self, end: float) -> int:
        """Return how many have started in the first ``end`` seconds."""
        return sum(start < LONG_AGO + end * HZ for start in self.started)


def run(
    sources: list[Source],
    seconds: float,
    *,
    limits: CData = ffi.NULL,
    group: CData = ffi.NULL,
    late: Callable[[int], int] = lambda _: 0,
) -> None:
    """Let every source ask for as long as that; timers fire ``late(n)`` ticks too late."""
    again = ffi.new("bool *")
    events = [(LONG_AGO, index, False) for index in range(len(sources))]
    fired = 0
    while events:
        now, index, starts = heapq.heappop(events)
        if now >= LONG_AGO + seconds * HZ:
            continue
        source = sources[index]
        if starts:
            source.started.append(now)
            if source.period:
                heapq.heappush(events, (now + source.period, index, False))
                continue
        at = lib.qos_reserve(limits, group, index, source.op, source.length, now, again)
        fired += 1
        if at > now:
            at += late(fired)
        heapq.heappush(events, (at, index, not again[0]))


def limits(**values: int) -> CData:
    native = ffi.new("struct qos_limits *")
    Rates(native).change(values)
    for limit in native.limit:
        limit.next = LONG_AGO
    return native


def group(**values: int) -> CData:
    native = ffi.new("struct qos_group *")
    Rates(native.limits).change(values)
    for limit in native.limits.limit:
        limit.next = LONG_AGO
    return native


@pytest.mark.parametrize("rate", [50, 997, 20_000, 100_000])
@pytest.mark.parametrize("late_us", [0, 50, 2000])
def test_a_second_has_as_many_as_the_limit_says(rate: int, late_us: int) -> None:
    """Whatever timers do, to 2 %."""
    source = Source()
    run(
        [source],
        1,
        limits=limits(rw_ios_per_sec=rate),
        late=lambda n: n % 7 * late_us * HZ // 6000000,
    )
    assert abs(source.until(1) - rate) <= max(1, rate * 0.02)


def test_a_limit_of_one_is_one() -> None:
    source = Source()
    run([source], 10, limits=limits(rw_ios_per_sec=1))
    assert len(source.started) == 10


@pytest.mark.parametrize("length", [512, 4096, 128 << 10, 4 << 20])
def test_bytes_are_exact_whatever_the_size_of_requests(length: int) -> None:
    source = Source(length)
    run([source], 4, limits=limits(rw_mbytes_per_sec=64))
    assert abs(len(source.started) * length - 4 * 64 * MIB) <= 4 * 64 * MIB * 0.02 + length


def test_the_tightest_limit_counts() -> None:
    source = Source(64 << 10)
    run([source], 2, limits=limits(rw_ios_per_sec=1000, r_mbytes_per_sec=10, w_mbytes_per_sec=1))
    assert abs(len(source.started) - 2 * 160) <= 4


def test_a_burst_goes_at_once_and_then_the_rate_counts() -> None:
    native = limits(rw_ios_per_sec=1000, rw_ios_burst=500)
    native.limit[lib.QOS_RW_IOS].next = 0  # nothing was used for long
    source = Source()
    run([source], 2, limits=native)
    assert abs(source.until(0.0001) - 510) <= 2  # and the hundredth of a second that always is
    assert abs(source.until(1) - 1510) <= 20
    assert abs(source.until(2) - 2510) <= 40


def test_without_a_burst_little_is_kept() -> None:
    native = limits(rw_ios_per_sec=1000)
    native.limit[lib.QOS_RW_IOS].next = 0
    source = Source()
    run([source], 1, limits=native)
    assert abs(source.until(0.0001) - 11) <= 1
    assert abs(source.until(1) - 1000) <= 20


def test_members_of_a_group_have_equal_shares_of_requests() -> None:
    sources = [Source() for _ in range(5)]
    run(sources, 2, group=group(rw_ios_per_sec=10_000))
    assert abs(sum(len(source.started) for source in sources) - 20_000) <= 400
    for source in sources:
        assert abs(len(source.started) - 4000) <= 80


def test_members_of_a_group_have_equal_shares_of_bytes() -> None:
    """One asks for 256 KiB at a time, one for 4 KiB."""
    sources = [Source(256 << 10), Source(4096)]
    run(sources, 4, group=group(rw_mbytes_per_sec=100))
    moved = [len(source.started) * source.length for source in sources]
    assert abs(sum(moved) - 400 * MIB) <= 400 * MIB * 0.02
    for one in moved:
        assert abs(one - 200 * MIB) <= 200 * MIB * 0.05


def test_what_a_modest_member_leaves_is_the_others() -> None:
    modest, greedy = Source(period=HZ // 100), Source()
    run([modest, greedy], 2, group=group(rw_ios_per_sec=1000))
    assert 150 <= len(modest.started) <= 200  # it asks 10 ms after its last one has started
    assert abs(len(modest.started) + len(greedy.started) - 2000) <= 40


def test_a_member_alone_has_all_of_it() -> None:
    alone = Source()
    run([alone], 1, group=group(rw_ios_per_sec=1000))
    assert abs(len(alone.started) - 1000) <= 20


def test_a_member_has_its_own_limit_as_well() -> None:
    source = Source()
    run([source], 1, group=group(rw_ios_per_sec=1000), limits=limits(rw_ios_per_sec=100))
    assert abs(len(source.started) - 100) <= 2
