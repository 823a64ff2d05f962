"""Packed rings, and in-order completion in both formats."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, lib
from tests.support.driver import (
    DATA,
    EVENT_IDX,
    EVENTS_DESC,
    EVENTS_DISABLE,
    EVENTS_ENABLE,
    IN,
    IN_ORDER,
    INDIRECT,
    INDIRECT_DESC,
    OK,
    VERSION_1,
    WRITE,
    Buffer,
    PackedDriver,
)

Drive = Callable[..., PackedDriver]

ENTRY = 32  # bytes of a header of the log, and of each of its entries
MORE_THAN_A_TURN = 85  # requests; three descriptors each fit a ring of 256


@pytest.fixture
def packed(drive: Callable[..., PackedDriver]) -> Drive:
    return lambda **options: drive(packed=True, **options)


def read(driver: PackedDriver, ident: int = 0, sector: int = 0) -> int:
    """Offer a read of one sector; returns where its status byte is."""
    where = DATA + (ident % 64) * 4096
    driver.put_header(where, IN, sector)
    driver.mem[where + 528] = 0xFF
    driver.send(
        [
            Buffer(where, 16),
            Buffer(where + 16, 512, writable=True),
            Buffer(where + 528, 1, writable=True),
        ],
        ident,
    )
    return where + 528


@pytest.mark.parametrize("size", [3, 4, 7, 16, 100])
def test_any_size_wraps_many_times(packed: Drive, size: int) -> None:
    driver = packed(size=size)
    for i in range(3 * size + 5):
        status = read(driver, i & 0xFFFF)
        driver.poll(1)
        assert driver.completed() == [(i & 0xFFFF, 513)]
        assert driver.mem[status] == OK


def test_identifiers_are_the_drivers_own(packed: Drive) -> None:
    driver = packed(size=16)
    for ident in (0xFFFF, 7, 300):
        read(driver, ident)
    driver.poll()
    assert driver.completed() == [(0xFFFF, 513), (7, 513), (300, 513)]


def test_batch_is_taken_and_published_together(packed: Drive) -> None:
    driver = packed(size=96)
    for ident in range(32):
        read(driver, ident)
    driver.poll(1)
    assert [ident for ident, _ in driver.completed()] == list(range(32))


def test_stop_answers_a_base_that_goes_on(packed: Drive) -> None:
    driver = packed(size=5)
    for ident in range(4):  # 12 descriptors: twice around and two further
        read(driver, ident)
        driver.poll()
        driver.completed()
    base = driver.stop()
    assert base & 0x7FFF == 2
    assert base >> 16 & 0x7FFF == 2
    driver.start(base=base)
    read(driver, 9)
    driver.poll()
    assert driver.completed() == [(9, 513)]


def test_signals_as_the_driver_asks(packed: Drive) -> None:
    driver = packed(size=16, features=VERSION_1 | EVENT_IDX)
    seen = []
    asked = [EVENTS_ENABLE, EVENTS_ENABLE, EVENTS_DISABLE, EVENTS_DISABLE, EVENTS_ENABLE]
    for flags in asked:
        driver.ask_signals(flags)
        read(driver)
        driver.poll()
        driver.completed()
        seen.append(driver.calls())
    assert seen == [1, 1, 0, 0, 1]


def test_signals_when_the_named_descriptor_is_used(packed: Drive) -> None:
    driver = packed(size=8, features=VERSION_1 | EVENT_IDX)
    seen = []
    for i in range(6):  # uses 0-2, 3-5, 6-8 (wraps to 1), 1-3, 4-6, 7-9
        if i == 1:
            driver.ask_signals(EVENTS_DESC, 2, wrap=False)  # descriptor 2 of the second lap
        read(driver)
        driver.poll()
        driver.completed()
        seen.append(driver.calls())
    assert seen == [1, 0, 0, 1, 0, 0]


def test_asks_for_kicks_only_while_it_sleeps(packed: Drive) -> None:
    driver = packed()
    driver.poll()
    assert driver.wants_kick(1)
    read(driver)
    driver.poll()
    assert driver.completed() == [(0, 513)]


# --- bad rings ----------------------------------------------------------------------------------


def broken_by(driver: PackedDriver) -> str:
    driver.poll()
    assert len(driver.notices.broken) == 1, driver.notices
    return driver.notices.broken[0]


def test_more_descriptors_than_the_ring_has_break_the_queue(packed: Drive) -> None:
    driver = packed(size=4)
    driver.send_raw([(DATA, 16, 0)] * 4, 0)
    # Without waiting: the same places again, and the chain never ends.
    for place in range(4):
        driver.put_packed(place, DATA, 16, 0, 0x80 | 1)
    assert "more than 4 descriptors" in broken_by(driver)


def test_indirect_descriptor_in_a_chain_breaks_the_queue(packed: Drive) -> None:
    driver = packed()
    driver.send_raw([(DATA, 16, 0), (DATA, 32, INDIRECT)], 0)
    assert "inside a chain" in broken_by(driver)


def test_readable_after_writable_breaks_the_queue(packed: Drive) -> None:
    driver = packed()
    driver.send_raw([(DATA, 16, WRITE), (DATA, 16, 0)], 0)
    assert "follows a writable one" in broken_by(driver)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(ring=st.binary(min_size=128, max_size=128), event=st.binary(min_size=4, max_size=4))
def test_any_ring_is_served_or_breaks(packed: Drive, ring: bytes, event: bytes) -> None:
    driver = packed(size=8)
    driver.mem[driver.desc : driver.desc + 128] = ring
    driver.mem[driver.avail : driver.avail + 4] = event
    os.eventfd_write(driver.kick, 1)
    driver.poll(20)


@pytest.mark.parametrize("base", [0x8000_8010, 0x8010_8000, 0xFFFF_FFFF])
def test_base_past_the_ring_is_refused(packed: Drive, base: int) -> None:
    driver = packed(start=False, size=16)
    with pytest.raises(OSError):
        driver.start(base=base)


# --- recovery -----------------------------------------------------------------------------------


def in_flight(driver: PackedDriver) -> list[int]:
    """Return the entries of the log that say they are in flight."""
    return [i for i in range(driver.size) if driver.log[ENTRY + ENTRY * i]]


def let_it_take(driver: PackedDriver) -> None:
    """Let the device go just so far that it has taken what was offered."""
    for _ in range(5):
        driver.poll(1)
        if in_flight(driver):
            return
    raise AssertionError("nothing was taken")


def snapshot(driver: PackedDriver) -> tuple[bytes, bytes, int, bool, dict[int, int]]:
    """Return all that a successor and the driver have if the device is killed now."""
    return (
        bytes(driver.mem),
        bytes(driver.log),
        driver.used_place,
        driver.used_wrap,
        dict(driver.lengths),
    )


def succeed(driver: PackedDriver, state: tuple[bytes, bytes, int, bool, dict[int, int]]) -> None:
    """Put another device in the place of one that was killed in ``state``."""
    driver.stop()
    driver.mem[:], driver.log[:], driver.used_place, driver.used_wrap, driver.lengths = state
    driver.start(recover=True)


@pytest.mark.parametrize("before", [0, 3])
def test_requests_in_flight_are_served_again_in_their_order(
    packed: Drive, filedisk: CData, before: int
) -> None:
    driver = packed(size=16, bdev=filedisk)
    for ident in range(before):  # so that the ring and the log's free list have moved on
        read(driver, ident)
        driver.poll(20)
        assert driver.completed() == [(ident, 513)]
    idents = [5, 3, 9]
    statuses = [read(driver, ident) for ident in idents]
    let_it_take(driver)
    assert len(in_flight(driver)) == 3
    assert driver.completed() == []
    succeed(driver, snapshot(driver))
    driver.poll(50)
    assert sorted(driver.completed()) == [(3, 513), (5, 513), (9, 513)]
    assert [driver.mem[status] for status in statuses] == [OK] * 3
    assert in_flight(driver) == []
    read(driver, 77)
    driver.poll(50)
    assert driver.completed() == [(77, 513)]


def test_entry_zero_alone_is_recovered(packed: Drive, filedisk: CData) -> None:
    driver = packed(size=16, bdev=filedisk)
    status = read(driver, 0)
    let_it_take(driver)
    assert in_flight(driver) == [0]
    succeed(driver, snapshot(driver))
    driver.poll(50)
    assert driver.completed() == [(0, 513)]
    assert driver.mem[status] == OK


def test_nothing_in_flight_is_served_again(packed: Drive) -> None:
    driver = packed(size=16)
    for ident in (1, 2):
        read(driver, ident)
    driver.poll()
    assert len(driver.completed()) == 2
    succeed(driver, snapshot(driver))
    driver.poll()
    assert driver.completed() == []


def begin_to_publish(driver: PackedDriver, before: bytes, after: bytes) -> bytes:
    """Return the log of a process killed while it published what turned one log into the other.

    The new free_head, used_idx and used_wrap_counter are there, the old ones and the in-flight
    flags are not settled yet (vhost-user specification, "When reconnecting").
    """
    log = bytearray(after)
    for start, end in ((14, 16), (18, 20), (21, 22)):
        log[start:end] = before[start:end]
    for i in range(driver.size):
        log[ENTRY + ENTRY * i] = before[ENTRY + ENTRY * i]
    return bytes(log)


@pytest.mark.parametrize("visible", [True, False])
def test_kill_in_the_middle_of_publishing(packed: Drive, filedisk: CData, visible: bool) -> None:
    driver = packed(size=16, bdev=filedisk)
    read(driver, 5)
    let_it_take(driver)
    ring, log = bytes(driver.mem), bytes(driver.log)
    assert len(in_flight(driver)) == 1
    driver.poll(50)
    killed = begin_to_publish(driver, log, bytes(driver.log))
    state = (bytes(driver.mem) if visible else ring, killed, 0, True, {5: 3})
    succeed(driver, state)
    driver.poll(1)
    again = len(in_flight(driver)) > 0
    driver.poll(50)
    assert driver.completed() == [(5, 513)]
    # What the driver had seen is not done twice; what it had not seen is done again.
    assert again is not visible


@pytest.mark.parametrize(
    ("where", "value", "why"),
    [
        (8, 9, "version 9"),
        (10, 99, "99 entries"),
        (18, 16, "used_idx"),
        (14, 17, "free_head"),
        (14, 0x7FFF, "free_head"),
    ],
)
def test_foreign_log_is_refused(packed: Drive, where: int, value: int, why: str) -> None:
    driver = packed(size=16)
    driver.stop()
    struct.pack_into("<H", driver.log, where, value)
    with pytest.raises(OSError):
        driver.start(recover=True)
    assert why in driver.notices.broken[0]


def test_log_with_a_loop_in_its_free_list_is_refused(packed: Drive) -> None:
    driver = packed(size=16)
    driver.stop()
    struct.pack_into("<H", driver.log, ENTRY + ENTRY * 3 + 2, 0)  # entry 3 is followed by entry 0
    with pytest.raises(OSError):
        driver.start(recover=True)
    assert "loop" in driver.notices.broken[0]


def test_log_with_an_entry_in_two_chains_is_refused(packed: Drive) -> None:
    """The sum is right: entries 0 and 1 in flight, 1 once more, and 3 free; 2 is nowhere."""
    driver = packed(size=4)
    driver.stop()
    struct.pack_into("<QHHHHHHBB", driver.log, 0, 0, 1, 4, 3, 3, 0, 0, 1, 1)
    for entry, num, following in ((0, 2, 1), (1, 1, 4), (3, 0, 4)):
        where = ENTRY + ENTRY * entry
        struct.pack_into("<BxHHH", driver.log, where, num > 0, following, 1, num)
    with pytest.raises(OSError):
        driver.start(recover=True)
    assert "entry 1" in driver.notices.broken[0]


def put_log(driver: PackedDriver, requests: int) -> None:
    """Write the log of a process that was killed with so many reads in flight."""
    used = 3 * requests
    struct.pack_into("<QHHHHHHBB", driver.log, 0, 0, 1, driver.size, used, used, 0, 0, 1, 1)
    buffers = [(DATA, 16, 0), (DATA + 16, 512, WRITE), (DATA + 528, 1, WRITE)]
    for place in range(driver.size):
        kind, first = place % 3, place < used and place % 3 == 0
        address, length, flags = buffers[kind]
        fields = (first, place + 1, place + 2, 3 if first else 0, place, place, flags)
        struct.pack_into("<BxHHHQHHIQ", driver.log, ENTRY + ENTRY * place, *fields, length, address)
    driver.lengths = {place + 2: 3 for place in range(0, used, 3)}


@pytest.mark.parametrize("requests", [1, 5, MORE_THAN_A_TURN])
def test_a_stop_right_after_recovery_drains_once(packed: Drive, requests: int) -> None:
    driver = packed(size=256, start=False)
    put_log(driver, requests)
    driver.put_header(DATA, IN)
    driver.start(recover=True)
    base = driver.stop()
    driver.poll(10)
    assert driver.notices.drained == 1
    assert driver.notices.broken == []
    assert len(driver.completed()) == requests
    assert base & 0x7FFF == base >> 16 & 0x7FFF == 3 * requests


def test_a_queue_that_breaks_while_it_stops_says_that_it_is_drained(packed: Drive) -> None:
    assert lib.mapping_guard() == 0
    driver = packed(size=256, start=False)
    put_log(driver, MORE_THAN_A_TURN)
    driver.start(recover=True)
    os.ftruncate(driver.log_fd, 0)
    driver.stop()
    assert "truncated" in driver.notices.broken[0]
    os.ftruncate(driver.log_fd, driver.log_size)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_log_is_recovered_or_refused(packed: Drive, data: st.DataObject) -> None:
    driver = packed(start=False, size=8)
    small = st.integers(0, 9)
    words = data.draw(st.lists(small, min_size=5, max_size=5))
    struct.pack_into("<QHHHHHHBB", driver.log, 0, 0, 1, 8, *words[:4], words[4] & 1, words[4] & 1)
    for i in range(8):
        fields = data.draw(st.tuples(st.integers(0, 1), small, small, small, small, small, small))
        inflight, following, last, num, counter, ident, flags = fields
        struct.pack_into(
            "<BxHHHQHHIQ",
            driver.log,
            ENTRY + ENTRY * i,
            *(inflight, following, last, num, counter, ident, flags, 512, DATA),
        )
    try:
        driver.start(recover=True)
    except OSError:
        return
    driver.poll(20)


# --- in-order completion ------------------------------------------------------------------------


@pytest.mark.parametrize("packed_ring", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_in_order_completion_waits_for_the_request_before(
    drive: Callable[..., PackedDriver], filedisk: CData, packed_ring: bool, in_order: bool
) -> None:
    """A read of the file takes a turn or more; an unknown request is answered at once."""
    features = VERSION_1 | INDIRECT_DESC | (IN_ORDER if in_order else 0)
    driver = drive(packed=packed_ring, bdev=filedisk, features=features)
    driver.put_header(DATA, IN)
    driver.put_header(DATA + 4096, 99)
    driver.send([Buffer(DATA, 16), Buffer(DATA + 16, 513, writable=True)], 0)
    driver.send([Buffer(DATA + 4096, 16), Buffer(DATA + 5000, 1, writable=True)], 2)
    driver.poll(50)
    order = [ident for ident, _ in driver.completed()]
    assert order == ([0, 2] if in_order else [2, 0])
