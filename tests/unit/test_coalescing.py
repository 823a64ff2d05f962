"""Interrupt coalescing: the rule, and that no completion is ever left without its signal."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.native import CData, lib
from tests.support.driver import (
    DATA,
    EVENT_IDX,
    IN,
    INDIRECT_DESC,
    VERSION_1,
    Buffer,
    Driver,
    PackedDriver,
)

Drive = Callable[..., Driver]

WINDOW = lib.COALESCING_WINDOW_MS / 1000
LONGEST = lib.reactor_tick_rate() // 100  # ticks of a window


@pytest.fixture(params=["split", "packed"])
def drive(drive: Drive, request: pytest.FixtureRequest) -> Drive:
    """Both formats of a ring coalesce alike."""
    return partial(drive, packed=request.param == "packed")


def read(driver: Driver, ident: int = 0) -> None:
    """Offer a read of one sector and let the device serve it."""
    where = DATA + ident * 4096
    driver.put_header(where, IN)
    driver.send(
        [
            Buffer(where, 16),
            Buffer(where + 16, 512, writable=True),
            Buffer(where + 528, 1, writable=True),
        ],
        ident,
    )
    end = time.monotonic() + 5
    while not (done := driver.completed()):
        assert time.monotonic() < end
        driver.poll()
    assert done == [(ident, 513)]


def want_no_signals(driver: Driver) -> None:
    """Set what virtio 1.2 has for it in sections 2.7.6 and 2.8.10: the same number for both."""
    if isinstance(driver, PackedDriver):
        driver.ask_signals(1)
    else:
        driver.mem[driver.avail] = 1


def read_for(driver: Driver, seconds: float) -> tuple[int, int]:
    """Read without waiting for signals; return how many reads and signals there were."""
    end = time.monotonic() + seconds
    reads = signals = 0
    while time.monotonic() < end:
        read(driver)
        reads += 1
        signals += driver.calls()
    return reads, signals


def wait_for_signal(driver: Driver) -> None:
    """Turn until the driver is signalled."""
    end = time.monotonic() + 5
    while not driver.calls():
        assert time.monotonic() < end, "the last completion was never signalled"
        driver.poll(1)


def coalesce(driver: Driver, delay_base_us: int = 1000, iops_threshold: int = 100) -> None:
    assert lib.queue_set_coalescing(driver.queue, delay_base_us, iops_threshold) == 0


@given(
    base=st.integers(0, (1 << 32) - 2),
    threshold=st.integers(1, 1 << 26),
    requests=st.integers(0, (1 << 64) - 1),
)
def test_the_rule(base: int, threshold: int, requests: int) -> None:
    exact = base * max(0, requests - threshold) // threshold
    got = lib.coalescing_delay(base, threshold, requests)
    # What exceeds 32 bits is far over the longest delay, unless the threshold is as large.
    if requests - threshold < 1 << 32:
        assert got == min(exact, LONGEST)
    assert got <= LONGEST


@pytest.mark.parametrize(
    ("delay", "iops", "rc"),
    [
        (0, 100, 0),
        (0, 99, -errno.EINVAL),
        (0, 0, -errno.EINVAL),
        (10, (1 << 32) - 1, 0),
        ((1 << 32) - 1, 100, -errno.EINVAL),
        (int(((1 << 32) - 1) / lib.reactor_tick_rate() * 1e6) - 1, 100, 0),
        (int((1 << 32) / lib.reactor_tick_rate() * 1e6) + 1, 100, -errno.EINVAL),
    ],
)
def test_limits(drive: Drive, delay: int, iops: int, rc: int) -> None:
    driver = drive()
    assert lib.coalescing_check(delay, iops) == rc
    assert lib.queue_set_coalescing(driver.queue, delay, iops) == rc


@pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event_idx"])
def test_a_high_rate_is_signalled_once_in_a_delay(drive: Drive, features: int) -> None:
    driver = drive(features=VERSION_1 | INDIRECT_DESC | features, size=256)
    if not isinstance(driver, PackedDriver) and features:
        driver.features = VERSION_1  # kicks as without; the event index stays at 0
    coalesce(driver)
    read_for(driver, 2 * WINDOW)  # until a whole window was measured
    start = time.monotonic()
    reads, signals = read_for(driver, 10 * WINDOW)
    windows = (time.monotonic() - start) / WINDOW
    turns = reads * 3 / driver.size  # of the ring: each may cost a signal
    assert signals <= windows + turns + 2
    assert reads > 10 * signals


def test_a_low_rate_is_signalled_at_once(drive: Drive) -> None:
    driver = drive()
    coalesce(driver, 1000, 1 << 30)
    read_for(driver, 2 * WINDOW)
    reads, signals = read_for(driver, 2 * WINDOW)
    assert reads == signals


def test_the_delay_ends_when_the_rate_has_fallen(drive: Drive) -> None:
    driver = drive()
    coalesce(driver, 1000, 500)
    read_for(driver, 3 * WINDOW)
    wait_for_quiet(driver)
    time.sleep(5 * WINDOW)
    driver.poll()  # the time of a turn is that of its beginning
    read(driver, 1)
    driver.calls()
    time.sleep(5 * WINDOW)
    driver.poll()
    read(driver, 2)
    assert driver.calls() == 1


def wait_for_quiet(driver: Driver) -> None:
    end = time.monotonic() + 3 * WINDOW
    while time.monotonic() < end:
        driver.poll(1)
    driver.calls()


def hold_one_back(driver: Driver) -> None:
    """Have the device hold back the signal of a completion; there was none since."""
    coalesce(driver)
    read_for(driver, 3 * WINDOW)
    for _ in range(1000):
        read(driver)
        if not driver.calls():
            return
    raise AssertionError("every completion was signalled")


def test_the_last_completion_is_signalled_though_nothing_follows(drive: Drive) -> None:
    driver = drive()
    hold_one_back(driver)
    start = time.monotonic()
    wait_for_signal(driver)
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("action", ["off", "stop"])
def test_what_is_held_back_is_signalled_at_the_end(drive: Drive, action: str) -> None:
    driver = drive()
    hold_one_back(driver)
    if action == "off":
        coalesce(driver, 0)
    else:
        driver.stop()
    assert driver.calls() >= 1


def test_what_is_held_back_is_signalled_though_the_queue_breaks(drive: Drive) -> None:
    driver = drive()
    hold_one_back(driver)
    driver.send([Buffer(1 << 60, 16)])
    driver.poll()
    assert driver.notices.broken
    wait_for_signal(driver)


def test_a_full_ring_is_signalled_whatever_the_delay(drive: Drive) -> None:
    """The driver can do nothing else then, and the indices would become ambiguous."""
    driver = drive(size=12 if drive.keywords["packed"] else 4, features=VERSION_1)  # type: ignore[attr-defined]
    hold_one_back(driver)
    signals = 0
    for _ in range(8):
        read(driver)
        signals += driver.calls()
    assert signals >= 1


def test_a_signal_that_is_held_back_is_no_sign_that_the_driver_polls(
    drive: Drive, filedisk: CData
) -> None:
    driver = drive(bdev=filedisk)
    coalesce(driver, delay_base_us=10_000)
    end, seen = time.monotonic() + 3 * WINDOW, set()
    while time.monotonic() < end:
        read(driver)
        seen.add(lib.queue_driver_polls(driver.queue))
    assert seen == {False}


def test_a_driver_that_wants_no_signals_polls(drive: Drive, filedisk: CData) -> None:
    driver = drive(bdev=filedisk)
    want_no_signals(driver)
    read(driver)  # the first is signalled in any case
    read(driver)
    assert lib.queue_driver_polls(driver.queue)
    coalesce(driver)
    read(driver)
    assert lib.queue_driver_polls(driver.queue)
