"""Translations of I/O virtual addresses: the tables, and queues whose chains name IOVAs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, ffi, lib
from tests.support.driver import (
    DATA,
    IN,
    IN_ORDER,
    INDIRECT,
    INDIRECT_DESC,
    OK,
    USER_BASE,
    VERSION_1,
    Buffer,
    Driver,
    PackedDriver,
)
from vhost.iotlb import MAX_ENTRIES, READ, WRITE, Iotlb, Translation
from vhost.payloads import Region

Drive = Callable[..., Driver]

PAGE = 4096
IOVA = 0x40_0000_0000  # of the first byte of a driver's memory, unlike any other address of it
BOTH = READ | WRITE
LAST = 2**64 - 1


# --- the control process's table ------------------------------------------------------------------


def entry(iova: int, size: int, user: int = 0, access: int = BOTH) -> Translation:
    return Translation(iova, size, user or iova + USER_BASE, access)


def test_what_is_missing_is_the_first_address_that_is_unknown_or_not_allowed() -> None:
    table = Iotlb()
    table.add(entry(0x1000, 0x1000))
    table.add(entry(0x2000, 0x1000, access=READ))
    assert table.missing(0x1800, 0x1000, READ) is None
    assert table.missing(0x1800, 0x1000, WRITE) == 0x2000
    assert table.missing(0x1800, 0x2000, READ) == 0x3000
    assert table.missing(0xFFF, 2, READ) == 0xFFF


def test_a_range_in_several_entries_has_an_address_only_if_they_follow_each_other() -> None:
    table = Iotlb()
    table.add(entry(0x1000, 0x1000, user=0x51000))
    table.add(entry(0x2000, 0x1000, user=0x52000))
    table.add(entry(0x3000, 0x1000, user=0x61000))
    assert table.translate(0x1800, 0x1000, READ) == 0x51800
    assert table.translate(0x2800, 0x1000, READ) is None


def test_a_new_translation_takes_the_place_of_all_that_it_overlaps() -> None:
    table = Iotlb()
    old = [entry(0x1000, 0x1000), entry(0x2000, 0x1000), entry(0x4000, 0x1000)]
    for each in old:
        table.add(each)
    new = entry(0x1800, 0x1000, user=0x77000)
    assert table.add(new) == old[:2]
    assert list(table.entries()) == [old[2], new]


def test_the_oldest_is_forgotten_when_there_is_no_room() -> None:
    table = Iotlb(limit=2)
    entries = [entry(place * PAGE, PAGE) for place in (5, 1, 3)]
    table.add(entries[0])
    table.add(entries[1])
    assert table.add(entries[2]) == [entries[0]]
    assert list(table.entries()) == entries[1:]


def test_what_is_not_in_memory_any_more_is_forgotten() -> None:
    table = Iotlb()
    kept, gone = entry(0, PAGE, user=0x10000), entry(PAGE, PAGE, user=0x20000)
    table.add(kept)
    table.add(gone)
    table.keep([Region(0, 0x1000, 0x10000, 0)])
    assert list(table.entries()) == [kept]


# --- both tables against a model ------------------------------------------------------------------

SPACE = 64  # pages, of which a table of the model maps each by itself

steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove"]),
        st.integers(0, SPACE - 1),
        st.integers(1, 8),
        st.integers(0, SPACE),
        st.integers(1, 3),
    ),
    max_size=40,
)


@pytest.fixture
def guest(drive: Drive) -> CData:
    """A table of memory with an IOTLB."""
    driver = drive(start=False)
    assert lib.iotlb_create(driver.table) == 0
    return driver.table


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, ask=st.tuples(st.integers(0, SPACE * PAGE), st.integers(1, 5 * PAGE)))
def test_both_tables_hold_what_a_table_of_pages_holds(
    guest: CData, steps: list[tuple[str, int, int, int, int]], ask: tuple[int, int]
) -> None:
    lib.iotlb_remove(guest, 0, LAST)
    table, model = Iotlb(), dict[int, tuple[int, int]]()
    for kind, page, count, target, access in steps:
        first, last = page * PAGE, (page + count) * PAGE - 1
        forgotten = table.remove(first, last)
        assert lib.iotlb_remove(guest, first, last) == len(forgotten)
        for each in forgotten:
            for gone in range(each.iova, each.last, PAGE):
                del model[gone]
        if kind == "add":
            user = USER_BASE + target * PAGE
            assert table.add(Translation(first, count * PAGE, user, access)) == []
            assert lib.iotlb_add(guest, first, count * PAGE, user, access) == 0
            for place in range(count):
                model[first + place * PAGE] = (user + place * PAGE, access)
    iova, size = ask
    for access in (READ, WRITE, BOTH):
        unknown = [
            max(iova, page)
            for page in range(iova // PAGE * PAGE, iova + size, PAGE)
            if model.get(page, (0, 0))[1] & access != access
        ]
        assert table.missing(iova, size, access) == (unknown[0] if unknown else None)
    first_user = model.get(iova // PAGE * PAGE, (None, 0))[0]
    found = table.translate(iova, size, READ)
    if found is not None:
        assert first_user is not None
        assert found == first_user + iova % PAGE


@pytest.mark.parametrize(
    ("iova", "size", "user", "access", "error"),
    [
        (0, 0, USER_BASE, BOTH, errno.EINVAL),
        (2**64 - PAGE, 2 * PAGE, USER_BASE, BOTH, errno.EINVAL),
        (0, PAGE, USER_BASE, 0, errno.EINVAL),
        (0, PAGE, USER_BASE, 4, errno.EINVAL),
        (PAGE, PAGE, USER_BASE, BOTH, errno.EINVAL),  # overlaps what there is
        (8 * PAGE, PAGE, USER_BASE - PAGE, BOTH, errno.EFAULT),
        (8 * PAGE, 2 * PAGE, USER_BASE + (1 << 20) - PAGE, BOTH, errno.EFAULT),
    ],
)
def test_a_bad_translation_is_refused(
    guest: CData, iova: int, size: int, user: int, access: int, error: int
) -> None:
    assert lib.iotlb_add(guest, 0, 4 * PAGE, USER_BASE, BOTH) == 0
    assert lib.iotlb_add(guest, iova, size, user, access) == -error


def test_the_last_page_of_all_addresses_can_be_translated(guest: CData) -> None:
    assert lib.iotlb_add(guest, 2**64 - PAGE, PAGE, USER_BASE, BOTH) == 0
    assert lib.iotlb_remove(guest, LAST, LAST) == 1


def test_a_table_that_is_full_says_so(guest: CData) -> None:
    for place in range(MAX_ENTRIES):
        assert lib.iotlb_add(guest, 2 * place * PAGE, PAGE, USER_BASE, BOTH) == 0
    assert lib.iotlb_add(guest, PAGE, PAGE, USER_BASE, BOTH) == -errno.ENOSPC


# --- queues ---------------------------------------------------------------------------------------


@pytest.fixture(params=["split", "packed"])
def iommu(request: pytest.FixtureRequest, drive: Drive) -> Drive:
    """Make drivers whose chains name IOVAs, of which none is translated at first."""

    def make(**options: Any) -> Driver:
        driver = drive(packed=request.param == "packed", start=False, **options)
        assert lib.iotlb_create(driver.table) == 0
        driver.start()
        return driver

    return make


def tell(driver: Driver, offset: int, size: int = PAGE, access: int = BOTH) -> None:
    """Have IOVAs translated to the memory at ``offset``."""
    assert lib.iotlb_add(driver.table, IOVA + offset, size, USER_BASE + offset, access) == 0


def go_on(driver: Driver) -> None:
    lib.queue_resume(driver.queue)
    driver.poll()


def waits(driver: Driver) -> tuple[int, int, int] | None:
    """Return (offset, size, access) of what the queue waits for."""
    miss: Any = ffi.new("struct iotlb_miss *")
    if not lib.queue_waits(driver.queue, miss):
        return None
    return miss.iova - IOVA, miss.size, miss.access


def read(driver: Driver, head: int = 0, *, place: int = 0, table: int | None = None) -> int:
    """Offer a read of a page, each of its parts in a page of its own; return where that begins."""
    where = DATA + place * 4 * PAGE
    driver.put_header(where, IN, 0)
    driver.mem[where + 2 * PAGE] = 0xFF
    buffers = [
        Buffer(IOVA + where, 16),
        Buffer(IOVA + where + PAGE, PAGE, writable=True),
        Buffer(IOVA + where + 2 * PAGE, 1, writable=True),
    ]
    if table is None:
        driver.send(buffers, head)
    else:
        # The driver itself writes to memory, the device finds the table by its IOVA.
        driver.mem[table : table + 48] = b"".join(
            part.addr.to_bytes(8, "little")
            + part.len.to_bytes(4, "little")
            + ((2 if part.writable else 0) | (1 if place < 2 else 0)).to_bytes(2, "little")
            + (place + 1).to_bytes(2, "little")
            for place, part in enumerate(buffers)
        )
        send_table(driver, IOVA + table, head)
    return where


def send_table(driver: Driver, iova: int, head: int) -> None:
    if isinstance(driver, PackedDriver):
        driver.send_raw([(iova, 48, INDIRECT)], head)
    else:
        driver.put_desc(head, iova, 48, INDIRECT)
        driver.offer(head)


def test_a_request_waits_for_each_of_its_translations_and_is_then_served(iommu: Drive) -> None:
    driver = iommu()
    where = read(driver)
    driver.poll()
    for offset, size, access in ((0, 16, READ), (PAGE, PAGE, WRITE), (2 * PAGE, 1, WRITE)):
        assert driver.completed() == []
        assert waits(driver) == (where + offset, size, access)
        tell(driver, where + offset)
        go_on(driver)
    assert waits(driver) is None
    assert driver.completed() == [(0, PAGE + 1)]
    assert driver.mem[where + 2 * PAGE] == OK
    assert driver.notices.broken == []


def test_a_request_that_waits_is_asked_for_once(iommu: Drive) -> None:
    driver = iommu()
    read(driver)
    driver.poll(20)
    assert driver.notices.log == ["translation"]


def test_what_came_before_is_served_and_what_comes_after_keeps_its_place(iommu: Drive) -> None:
    driver = iommu()
    for place in range(3):
        read(driver, place * 3, place=place)
        if place != 1:
            tell(driver, DATA + place * 4 * PAGE, 4 * PAGE)
    driver.poll()
    assert [head for head, _ in driver.completed()] == [0]
    assert waits(driver) == (DATA + 4 * PAGE, 16, READ)
    tell(driver, DATA + 4 * PAGE, 4 * PAGE)
    go_on(driver)
    assert [head for head, _ in driver.completed()] == [3, 6]


def test_in_order_requests_that_wait_stay_in_order(iommu: Drive) -> None:
    driver = iommu(features=VERSION_1 | INDIRECT_DESC | IN_ORDER)
    for place in range(2):
        read(driver, place * 3, place=place)
    tell(driver, DATA + 4 * PAGE, 4 * PAGE)
    driver.poll()
    assert driver.completed() == []
    tell(driver, DATA, 4 * PAGE)
    go_on(driver)
    assert [head for head, _ in driver.completed()] == [0, 3]


def test_an_indirect_table_is_translated_too(iommu: Drive) -> None:
    driver = iommu()
    table = DATA + 0x80000
    where = read(driver, table=table)
    tell(driver, where, 4 * PAGE)
    driver.poll()
    assert waits(driver) == (table, 48, READ)
    tell(driver, table)
    go_on(driver)
    assert driver.completed() == [(0, PAGE + 1)]


def test_a_table_in_two_pieces_of_memory_breaks_the_queue(iommu: Drive) -> None:
    driver = iommu()
    table = DATA + 0x80FF0
    where = read(driver, table=table)
    tell(driver, where, 4 * PAGE)
    tell(driver, table & -PAGE)
    elsewhere = USER_BASE + 0x40000
    next_page = IOVA + (table & -PAGE) + PAGE
    assert lib.iotlb_add(driver.table, next_page, PAGE, elsewhere, BOTH) == 0
    driver.poll()
    assert "not in one piece of memory" in driver.notices.broken[0]


def test_a_buffer_may_lie_in_pages_that_are_anywhere(iommu: Drive, ramdisk: CData) -> None:
    driver = iommu()
    data = os.urandom(2 * PAGE)
    pages = (0x40000, 0x60000)  # neither where the IOVA says nor next to each other
    for place, page in enumerate(pages):
        user = USER_BASE + page
        assert lib.iotlb_add(driver.table, IOVA + place * PAGE, PAGE, user, BOTH) == 0
    tell(driver, DATA)
    driver.put_header(DATA, 1, 0)
    driver.mem[pages[0] : pages[0] + PAGE] = data[:PAGE]
    driver.mem[pages[1] : pages[1] + PAGE] = data[PAGE:]
    send = [
        Buffer(IOVA + DATA, 16),
        Buffer(IOVA, 2 * PAGE),
        Buffer(IOVA + DATA + 16, 1, writable=True),
    ]
    driver.send(send)
    driver.poll()
    assert driver.completed() == [(0, 1)]
    driver.mem[pages[0] : pages[0] + PAGE] = driver.mem[pages[1] : pages[1] + PAGE] = bytes(PAGE)
    driver.put_header(DATA, IN, 0)
    send[1] = Buffer(IOVA, 2 * PAGE, writable=True)
    driver.send(send, 3)
    driver.poll()
    assert driver.completed() == [(3, 2 * PAGE + 1)]
    assert driver.mem[pages[0] : pages[0] + PAGE] == data[:PAGE]
    assert driver.mem[pages[1] : pages[1] + PAGE] == data[PAGE:]


@pytest.mark.parametrize(("part", "access"), [(0, WRITE), (PAGE, READ), (2 * PAGE, READ)])
def test_memory_that_may_not_be_accessed_like_this_is_asked_for(
    iommu: Drive, part: int, access: int
) -> None:
    driver = iommu()
    where = read(driver)
    for offset in (0, PAGE, 2 * PAGE):
        tell(driver, where + offset, access=access if offset == part else BOTH)
    driver.poll()
    found = waits(driver)
    assert found is not None
    assert (found[0], found[2]) == (where + part, BOTH ^ access)
    assert driver.mem[where + 2 * PAGE] == 0xFF


def test_a_guest_physical_address_is_no_iova(iommu: Drive) -> None:
    """Both name memory, but only one of them was given to the device."""
    driver = iommu()
    tell(driver, DATA, 4 * PAGE)
    driver.put_header(DATA, IN, 0)
    driver.send([Buffer(DATA, 16), Buffer(DATA + 16, 513, writable=True)])
    driver.poll()
    assert waits(driver) == (DATA - IOVA, 16, READ)


def test_an_address_that_is_not_translated_breaks_the_queue(iommu: Drive) -> None:
    driver = iommu()
    read(driver)
    driver.poll()
    lib.queue_fault(driver.queue)
    driver.poll()
    assert "does not translate" in driver.notices.broken[0]
    assert waits(driver) is None
    driver.stop()


def test_a_range_past_the_last_address_breaks_the_queue(iommu: Drive) -> None:
    driver = iommu()
    driver.send([Buffer(2**64 - 8, 16), Buffer(IOVA, 1, writable=True)])
    driver.poll()
    assert "outside of guest memory" in driver.notices.broken[0]


def test_a_queue_that_stops_while_a_request_waits_has_not_taken_it(iommu: Drive) -> None:
    driver = iommu()
    where = read(driver)
    driver.poll()
    assert waits(driver) is not None
    base = driver.stop()
    tell(driver, where, 4 * PAGE)
    driver.start(base=base)
    driver.poll()
    assert driver.completed() == [(0, PAGE + 1)]


def test_a_killed_process_leaves_a_request_that_waited_in_the_ring(iommu: Drive) -> None:
    driver = iommu()
    where = read(driver)
    driver.poll()
    driver.kill()
    tell(driver, where, 4 * PAGE)
    driver.start(recover=True)
    driver.poll()
    assert driver.completed() == [(0, PAGE + 1)]


def test_what_a_killed_process_had_taken_waits_and_is_served_again(
    iommu: Drive, filedisk: CData
) -> None:
    driver = iommu(bdev=filedisk)
    where = read(driver)
    tell(driver, where, 4 * PAGE)
    driver.poll(1)
    assert driver.completed() == []
    driver.kill()
    lib.iotlb_remove(driver.table, 0, LAST)
    driver.start(recover=True)
    driver.poll()
    assert waits(driver) == (where, 16, READ)
    tell(driver, where, 4 * PAGE)
    go_on(driver)
    driver.poll(50)
    assert driver.completed() == [(0, PAGE + 1)]


def test_what_a_killed_process_had_taken_does_not_hold_up_a_stop(
    iommu: Drive, filedisk: CData
) -> None:
    driver = iommu(bdev=filedisk)
    where = read(driver)
    tell(driver, where, 4 * PAGE)
    driver.poll(1)
    driver.kill()
    lib.iotlb_remove(driver.table, 0, LAST)
    driver.start(recover=True)
    driver.poll()
    driver.stop()
    assert "does not translate" in driver.notices.broken[0]


def test_a_request_whose_translations_never_last_breaks_the_queue(iommu: Drive) -> None:
    """Else whoever takes them away again could keep us asking for ever."""
    driver = iommu()
    where = read(driver)
    turns = 0
    while not driver.notices.broken:
        driver.poll(2)
        offset = (waits(driver) or (0, 0, 0))[0]
        lib.iotlb_remove(driver.table, 0, LAST)
        tell(driver, where if offset == where else where + PAGE)
        lib.queue_resume(driver.queue)
        turns += 1
        assert turns < 3000
    assert driver.completed() == []


def test_an_invalidation_is_over_when_nothing_in_flight_uses_it(
    iommu: Drive, filedisk: CData
) -> None:
    driver = iommu(bdev=filedisk)
    where = read(driver)
    tell(driver, where, 4 * PAGE)
    driver.poll(1)
    assert lib.queue_in_flight(driver.queue) == 1
    assert lib.iotlb_remove(driver.table, IOVA + where, LAST) == 1
    assert lib.iotlb_settle(driver.table) == 0
    assert not lib.iotlb_settled(driver.table)
    assert lib.iotlb_settle(driver.table) == -errno.EBUSY
    driver.poll(50)
    assert driver.completed() == [(0, PAGE + 1)]
    assert lib.iotlb_settled(driver.table)


def test_requests_that_come_after_an_invalidation_are_not_waited_for(
    iommu: Drive, filedisk: CData
) -> None:
    driver = iommu(bdev=filedisk)
    assert lib.iotlb_settle(driver.table) == 0
    where = read(driver)
    tell(driver, where, 4 * PAGE)
    driver.poll(1)
    assert lib.queue_in_flight(driver.queue) == 1
    assert lib.iotlb_settled(driver.table)
    driver.poll(50)
    assert driver.completed() == [(0, PAGE + 1)]
