"""Rings: what a driver may do, and what becomes of one that does what it may not."""

from __future__ import annotations

import errno
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
    IN,
    INDIRECT,
    NEXT,
    NOTIFY_ON_EMPTY,
    OK,
    OUT,
    USER_BASE,
    VERSION_1,
    Buffer,
    Driver,
)

Drive = Callable[..., Driver]


def put_read(driver: Driver, head: int, sector: int = 0, length: int = 512) -> int:
    """Write a read request whose chain begins at ``head``; returns where its status byte is."""
    where = DATA + head * 4096
    driver.put_header(where, IN, sector)
    driver.mem[where + 16 + length : where + 17 + length] = b"\xff"
    driver.put_chain(
        head,
        [
            Buffer(where, 16),
            Buffer(where + 16, length, writable=True),
            Buffer(where + 16 + length, 1, writable=True),
        ],
    )
    return where + 16 + length


def broken_by(driver: Driver) -> str:
    """Let the device meet what was offered; it must break, say why once, and signal the error."""
    driver.poll()
    assert driver.completed() == []
    assert len(driver.notices.broken) == 1, driver.notices
    assert os.eventfd_read(driver.error) == 1
    return driver.notices.broken[0]


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX])
def test_indices_wrap(drive: Drive, features: int) -> None:
    driver = drive(size=4, features=features)
    put_read(driver, 0)
    for i in range(70000):
        driver.offer(0)
        driver.poll(1)
        assert driver.completed() == [(0, 513)], i


def test_starts_at_the_base_it_is_given(drive: Drive) -> None:
    driver = drive(start=False)
    driver.avail_idx = driver.seen_used = 0xFFFE
    struct.pack_into("<H", driver.mem, driver.used + 2, 0xFFFE)
    driver.start(base=0xFFFE)
    for _ in range(4):
        put_read(driver, 0)
        driver.offer(0)
        driver.poll()
        assert driver.completed() == [(0, 513)]
    assert driver.stop() == 2


def test_serves_a_full_ring_in_one_go(drive: Drive) -> None:
    driver = drive(size=128)
    heads = list(range(0, 126, 3))
    for head in heads:
        put_read(driver, head)
    driver.offer(*heads)
    driver.poll()
    assert sorted(head for head, _ in driver.completed()) == heads


def test_reads_a_chain_of_more_buffers_than_fit_inline(drive: Drive) -> None:
    driver = drive(size=256)
    driver.put_header(DATA, OUT, 0)
    pieces = [Buffer(DATA + 16, 0)] + [Buffer(DATA + 4096 + 64 * i, 64) for i in range(200)]
    data = os.urandom(64 * 200)
    driver.mem[DATA + 4096 : DATA + 4096 + len(data)] = data
    status = DATA + 0x8000
    driver.put_chain(0, [Buffer(DATA, 16), *pieces, Buffer(status, 1, writable=True)])
    driver.offer(0)
    driver.poll()
    assert driver.completed() == [(0, 1)]
    assert driver.mem[status] == OK
    assert driver.request(IN, 0, into=len(data))[2] == data


def test_buffer_may_cross_from_one_region_into_the_next(drive: Drive) -> None:
    half = 1 << 19
    # The second half of the file comes first in the file: host addresses are not contiguous.
    driver = drive(regions=[(0, half, 0), (half, half, half)])
    where = half - 4096
    driver.put_header(DATA, OUT, 8)
    data = os.urandom(8192)
    driver.mem[where : where + 8192] = data
    driver.put_chain(
        0, [Buffer(DATA, 16), Buffer(where, 8192), Buffer(DATA + 16, 1, writable=True)]
    )
    driver.offer(0)
    driver.poll()
    assert driver.completed() == [(0, 1)]
    assert driver.request(IN, 8, into=8192)[2] == data


# --- signals and kicks ----------------------------------------------------------------------------


def test_signals_unless_the_driver_asks_for_silence(drive: Drive) -> None:
    driver = drive(features=VERSION_1)
    put_read(driver, 0)
    driver.offer(0)
    driver.poll()
    assert driver.completed() == [(0, 513)]
    assert driver.calls() == 1
    struct.pack_into("<H", driver.mem, driver.avail, 1)
    driver.offer(0)
    driver.poll()
    assert driver.completed() == [(0, 513)]
    assert driver.calls() == 0


def test_signals_when_the_used_event_is_reached_and_not_before(drive: Drive) -> None:
    driver = drive(features=VERSION_1 | EVENT_IDX)
    signalled = []
    put_read(driver, 0)
    for i in range(6):
        if i == 1:
            # Wants to hear of the entry with index 3, that is, once four are used.
            struct.pack_into("<H", driver.mem, driver.avail + 4 + 2 * driver.size, 3)
        driver.offer(0)
        driver.poll()
        driver.completed()
        signalled.append(driver.calls())
    assert signalled == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX])
def test_asks_for_kicks_when_it_sleeps(drive: Drive, features: int) -> None:
    driver = drive(features=features)
    driver.poll()
    for _ in range(3):
        put_read(driver, 0)
        driver.offer(0)
        assert driver.wants_kick(1)
        driver.poll()
        assert driver.completed() == [(0, 513)]
        driver.poll()


def test_notify_on_empty_signals_although_the_driver_wants_silence(drive: Drive) -> None:
    driver = drive(features=NOTIFY_ON_EMPTY)
    driver.request(IN, into=512)
    driver.calls()
    struct.pack_into("<H", driver.mem, driver.avail, 1)
    driver.request(IN, into=512)
    assert driver.calls() == 1


def test_another_call_eventfd_is_used_without_a_stop(drive: Drive) -> None:
    driver = drive()
    driver.request(IN, into=512)
    assert driver.calls() == 1
    former, driver.call = driver.call, os.eventfd(0, os.EFD_NONBLOCK)
    assert lib.queue_set_call(driver.queue, driver.call) == 0
    assert driver.calls() == 1  # what was signalled before may have gone where nobody looks
    driver.request(IN, into=512)
    assert driver.calls() == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(former)
    os.close(former)


def test_what_was_signalled_to_nobody_is_signalled_to_the_next_call_eventfd(drive: Drive) -> None:
    driver = drive()
    assert lib.queue_set_call(driver.queue, -1) == 0
    driver.request(IN, into=512)
    assert driver.calls() == 0
    assert lib.queue_set_call(driver.queue, driver.call) == 0
    assert driver.calls() == 1


def test_a_call_descriptor_that_is_none_changes_nothing(drive: Drive) -> None:
    driver = drive()
    assert lib.queue_set_call(driver.queue, 1 << 20) == -errno.EBADF
    driver.request(IN, into=512)
    assert driver.calls() == 1


# --- bad rings ------------------------------------------------------------------------------------


def test_head_past_the_ring_breaks_the_queue(drive: Drive) -> None:
    driver = drive(size=16)
    driver.offer(16)
    assert "head 16 in a ring of 16" in broken_by(driver)


def test_index_too_far_ahead_breaks_the_queue(drive: Drive) -> None:
    driver = drive(size=16)
    driver.avail_idx = 16
    driver.offer(0)
    assert "17 ahead in a ring of 16" in broken_by(driver)


def test_head_offered_twice_breaks_the_queue(drive: Drive) -> None:
    driver = drive()
    put_read(driver, 0)
    driver.offer(0, 0)
    driver.poll()
    assert "in flight already" in driver.notices.broken[0]


def test_loop_breaks_the_queue(drive: Drive) -> None:
    driver = drive(size=16)
    driver.put_desc(0, DATA, 16, NEXT, 1)
    driver.put_desc(1, DATA, 16, NEXT, 0)
    driver.offer(0)
    assert "loop" in broken_by(driver)


def test_next_past_the_table_breaks_the_queue(drive: Drive) -> None:
    driver = drive(size=16)
    driver.put_desc(0, DATA, 16, NEXT, 16)
    driver.offer(0)
    assert "past the table" in broken_by(driver)


def test_readable_buffer_after_writable_breaks_the_queue(drive: Drive) -> None:
    driver = drive()
    driver.put_chain(0, [Buffer(DATA, 16, writable=True), Buffer(DATA, 16)])
    driver.offer(0)
    assert "follows a writable one" in broken_by(driver)


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (1 << 20, 1),
        ((1 << 20) - 8, 16),
        (1 << 63, 512),
        ((1 << 64) - 8, 16),
        (DATA, (1 << 32) - 1),
    ],
)
def test_buffer_outside_of_memory_breaks_the_queue(drive: Drive, addr: int, length: int) -> None:
    driver = drive()
    driver.put_chain(0, [Buffer(addr, length), Buffer(DATA, 1, writable=True)])
    driver.offer(0)
    assert "outside of guest memory" in broken_by(driver)


def test_buffer_in_a_hole_between_regions_breaks_the_queue(drive: Drive) -> None:
    driver = drive(regions=[(0, 0x40000, 0), (0x50000, 0x1000, 0x50000)])
    driver.put_chain(0, [Buffer(0x3FFF0, 32), Buffer(DATA, 1, writable=True)])
    driver.offer(0)
    assert "outside of guest memory" in broken_by(driver)


@pytest.mark.parametrize(
    ("length", "flags", "why"),
    [
        (0, INDIRECT, "table of 0 bytes"),
        (24, INDIRECT, "table of 24 bytes"),
        (32, INDIRECT | NEXT, "flags 0x5"),
        (1 << 30, INDIRECT, "outside of guest memory"),
    ],
)
def test_bad_indirect_table_breaks_the_queue(
    drive: Drive, length: int, flags: int, why: str
) -> None:
    driver = drive()
    driver.put_desc(0, DATA, length, flags)
    driver.offer(0)
    assert why in broken_by(driver)


def test_indirect_table_inside_an_indirect_one_breaks_the_queue(drive: Drive) -> None:
    driver = drive()
    driver.put_desc(0, DATA, 16, INDIRECT, table=DATA + 4096)
    driver.put_desc(0, DATA + 4096, 16, INDIRECT)
    driver.offer(0)
    assert "inside a chain" in broken_by(driver)


def test_indirect_that_was_not_negotiated_breaks_the_queue(drive: Drive) -> None:
    driver = drive(features=VERSION_1)
    driver.put_desc(0, DATA, 16, INDIRECT)
    driver.offer(0)
    assert "not negotiated" in broken_by(driver)


def test_chain_of_more_buffers_than_we_accept_breaks_the_queue(drive: Drive) -> None:
    driver = drive(size=16)
    table = DATA + 0x10000
    driver.put_chain(0, [Buffer(DATA, 16)] * (lib.VQ_MAX_SEGMENTS + 1), table)
    driver.put_desc(0, table, 16 * (lib.VQ_MAX_SEGMENTS + 1), INDIRECT)
    driver.offer(0)
    assert "too long" in broken_by(driver)


def test_broken_queue_leaves_another_one_alone(drive: Drive) -> None:
    bad, good = drive(), drive()
    bad.offer(99)
    bad.poll()
    assert bad.notices.broken
    assert good.request(IN, 0, into=512)[0] == OK


def test_truncated_memory_breaks_the_queue_and_nothing_else(drive: Drive) -> None:
    assert lib.mapping_guard() == 0
    lost, good = drive(), drive()
    lost.poll()
    os.ftruncate(lost.fd, 0)
    os.eventfd_write(lost.kick, 1)
    lost.poll()
    assert "truncated" in lost.notices.broken[0]
    assert good.request(IN, 0, into=512)[0] == OK
    os.ftruncate(lost.fd, 1 << 20)


def test_truncated_log_breaks_the_queue(drive: Drive) -> None:
    assert lib.mapping_guard() == 0
    driver = drive()
    os.ftruncate(driver.log_fd, 0)
    put_read(driver, 0)
    driver.offer(0)
    driver.poll()
    driver.poll()
    assert "log was truncated" in driver.notices.broken[0]
    os.ftruncate(driver.log_fd, driver.log_size)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    descs=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1)),
            st.one_of(st.integers(0, 4096), st.integers(0, (1 << 32) - 1)),
            st.integers(0, 7),
            st.integers(0, 20),
        ),
        min_size=16,
        max_size=16,
    ),
    heads=st.lists(st.integers(0, 20), min_size=1, max_size=16),
    content=st.binary(min_size=16, max_size=64),
)
def test_any_ring_is_served_or_breaks(
    drive: Drive, descs: list[tuple[int, int, int, int]], heads: list[int], content: bytes
) -> None:
    driver = drive(size=16)
    driver.mem[DATA : DATA + len(content)] = content
    for index, (addr, length, flags, nxt) in enumerate(descs):
        driver.put_desc(index, addr, length, flags, nxt)
    driver.offer(*heads)
    driver.poll()
    assert len(driver.completed()) == len(heads) or driver.notices.broken


# --- bad set-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"size": 0}, errno.EINVAL),
        ({"size": 12}, errno.EINVAL),
        ({"size": 65536}, errno.EINVAL),
        ({"desc": 0}, errno.EFAULT),
        ({"desc": USER_BASE + 8}, errno.EINVAL),
        ({"avail": USER_BASE + (1 << 20) - 4}, errno.EFAULT),
        ({"used": USER_BASE + 2}, errno.EINVAL),
        ({"used": (1 << 64) - 8}, errno.EFAULT),
        ({"inflight_size": 16}, errno.EINVAL),
        ({"inflight_offset": 4}, errno.EINVAL),
        ({"inflight_fd": -1}, errno.EBADF),
        ({"call_fd": 9999}, errno.EBADF),
    ],
)
def test_bad_set_up_is_refused(drive: Drive, change: dict[str, int], error: int) -> None:
    driver = drive(start=False)
    with pytest.raises(OSError) as caught:
        driver.start(**change)
    assert caught.value.errno == error


@pytest.mark.parametrize(
    "regions",
    [
        [(0, 0, 0)],
        [(0, 4096, 0), (4095, 4096, 8192)],
        [((1 << 64) - 4096, 8192, 0)],
        [(0, 4096, 1 << 63)],
    ],
)
def test_bad_memory_is_refused(drive: Drive, regions: list[tuple[int, int, int]]) -> None:
    driver = drive(start=False)
    with pytest.raises(OSError) as caught:
        driver.map_memory(regions)
    assert caught.value.errno == errno.EINVAL


def test_memory_can_be_swapped_under_a_queue(drive: Drive) -> None:
    driver = drive()
    assert driver.queue is not None
    again = driver.map_memory([(0, 1 << 20, 0)])
    assert lib.queue_set_memory(driver.queue, again) == 0
    assert lib.guest_memory_references(driver.table) == 1
    lib.guest_memory_put(driver.table)
    driver.table = again
    assert driver.request(IN, 0, into=512)[0] == OK


def test_memory_without_the_rings_is_refused_and_the_old_one_stays(drive: Drive) -> None:
    driver = drive()
    assert driver.queue is not None
    other = driver.map_memory([(0, 4096, 0x80000)])
    assert lib.queue_set_memory(driver.queue, other) == -errno.EFAULT
    lib.guest_memory_put(other)
    assert driver.request(IN, 0, into=512)[0] == OK


# --- recovery from the in-flight log --------------------------------------------------------------


def write_log(
    driver: Driver,
    *,
    used_idx: int,
    last_head: int = 0,
    inflight: dict[int, int],
    chain: dict[int, int] | None = None,
) -> None:
    """Write a log by hand: ``inflight`` maps heads to counters, ``chain`` heads to next."""
    struct.pack_into("<QHHHH", driver.log, 0, 0, 1, driver.size, last_head, used_idx)
    for head in range(driver.size):
        counter = inflight.get(head)
        struct.pack_into(
            "<B5xHQ",
            driver.log,
            16 + 16 * head,
            counter is not None,
            (chain or {}).get(head, 0),
            counter or 0,
        )


def set_used_idx(driver: Driver, idx: int) -> None:
    struct.pack_into("<H", driver.mem, driver.used + 2, idx)
    driver.seen_used = idx


def test_in_flight_requests_are_served_again_in_their_order(drive: Drive) -> None:
    driver = drive(start=False, size=16)
    for head in (0, 3, 6, 9):
        put_read(driver, head)
    driver.offer(6, 0, 9, 3)
    write_log(driver, used_idx=0, inflight={6: 10, 0: 11, 9: 12, 3: 13})
    driver.start(recover=True)
    driver.poll()
    assert [head for head, _ in driver.completed()] == [6, 0, 9, 3]
    assert driver.calls() >= 1


def test_head_zero_alone_is_recovered(drive: Drive) -> None:
    driver = drive(start=False)
    put_read(driver, 0)
    driver.offer(0)
    write_log(driver, used_idx=0, inflight={0: 0})
    driver.start(recover=True)
    driver.poll()
    assert driver.completed() == [(0, 513)]


def test_stop_right_after_recovery_serves_what_was_in_flight_first(drive: Drive) -> None:
    driver = drive(start=False, size=128)
    heads = list(range(0, 126, 3))  # more than one batch
    for head in heads:
        put_read(driver, head)
    driver.offer(*heads)
    write_log(driver, used_idx=0, inflight={head: head for head in heads[:-1]})
    driver.start(recover=True)
    assert driver.stop() == len(heads) - 1
    assert [head for head, _ in driver.completed()] == heads[:-1]


def test_what_was_not_taken_yet_is_taken_after_what_was(drive: Drive) -> None:
    driver = drive(start=False, size=16)
    for head in (0, 3, 6):
        put_read(driver, head)
    driver.offer(0, 3, 6)
    write_log(driver, used_idx=0, inflight={0: 0})
    driver.start(recover=True)
    driver.poll()
    assert [head for head, _ in driver.completed()] == [0, 3, 6]


def test_batch_published_but_not_cleared_is_not_served_again(drive: Drive) -> None:
    """Killed between the store of used->idx and the clearing of the log."""
    driver = drive(start=False, size=16)
    for head in (0, 3, 6):
        put_read(driver, head)
    driver.offer(0, 3, 6)
    set_used_idx(driver, 2)  # 0 and then 3 were published
    write_log(driver, used_idx=0, last_head=3, chain={3: 0}, inflight={0: 0, 3: 1, 6: 2})
    driver.start(recover=True)
    driver.poll()
    assert [head for head, _ in driver.completed()] == [6]


def test_head_zero_that_was_published_last_is_not_served_again(drive: Drive) -> None:
    """A list of the batch that begins at 0 is no empty one."""
    driver = drive(start=False, size=16)
    put_read(driver, 0)
    put_read(driver, 3)
    driver.offer(0, 3)
    set_used_idx(driver, 1)
    write_log(driver, used_idx=0, last_head=0, inflight={0: 0, 3: 1})
    driver.start(recover=True)
    driver.poll()
    assert [head for head, _ in driver.completed()] == [3]


def test_recovery_works_across_the_wrap_of_the_index(drive: Drive) -> None:
    driver = drive(start=False, size=16)
    put_read(driver, 0)
    put_read(driver, 3)
    driver.avail_idx = 0xFFFF
    driver.offer(0, 3)
    set_used_idx(driver, 0)
    write_log(driver, used_idx=0xFFFF, last_head=0, inflight={0: 5, 3: 6})
    driver.start(recover=True)
    driver.poll()
    assert [head for head, _ in driver.completed()] == [3]


def test_unused_log_recovers_to_the_base(drive: Drive) -> None:
    driver = drive(start=False)
    put_read(driver, 0)
    driver.offer(0)
    driver.start(recover=True, base=0)
    driver.poll()
    assert driver.completed() == [(0, 513)]


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda d: struct.pack_into("<H", d.log, 8, 7), "version 7"),
        (lambda d: struct.pack_into("<H", d.log, 10, 99), "99 entries"),
        (lambda d: struct.pack_into("<H", d.log, 14, 1000), "entries behind"),
        (lambda d: (set_used_idx(d, 1), struct.pack_into("<H", d.log, 12, 999)), "head 999"),
    ],
)
def test_foreign_log_is_refused(drive: Drive, edit: Callable[[Driver], object], why: str) -> None:
    driver = drive(start=False, size=16)
    write_log(driver, used_idx=0, inflight={})
    edit(driver)
    with pytest.raises(OSError):
        driver.start(recover=True)
    assert why in driver.notices.broken[0]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(log=st.binary(min_size=16 + 16 * 16, max_size=16 + 16 * 16))
def test_any_log_is_recovered_or_refused(drive: Drive, log: bytes) -> None:
    driver = drive(start=False, size=16)
    driver.log[: len(log)] = log
    struct.pack_into("<HH", driver.log, 8, 1, 16)
    try:
        driver.start(recover=True)
    except OSError:
        return
    driver.poll()


def test_log_follows_the_ring_through_a_kill(native: CData, ramdisk: CData, drive: Drive) -> None:
    """What a device was doing when it was killed is exactly what its successor does again."""
    driver = drive(size=16)
    status = put_read(driver, 0)
    driver.offer(0)
    driver.poll()
    assert driver.completed() == [(0, 513)]
    driver.kill()
    driver.start(recover=True)
    put_read(driver, 3)
    driver.offer(3)
    driver.poll()
    assert driver.completed() == [(3, 513)]
    assert driver.mem[status] == OK
