"""The dirty log: exactly the pages that the device has written, against a map made by comparing."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, lib
from tests.support.driver import (
    DATA,
    EVENT_IDX,
    GET_ID,
    IN,
    OK,
    OUT,
    VERSION_1,
    Buffer,
    Driver,
)

Drive = Callable[..., Driver]

LOG_ALL = 1 << 26
PAGE = lib.DIRTY_PAGE_SIZE
MEMORY = 1 << 20
LOG_BYTES = MEMORY // PAGE // 8


@dataclass
class Log:
    """The bitmap in a file of its own."""

    fd: int
    map: mmap.mmap
    event: int

    def take(self) -> set[int]:
        """Return the pages that are marked and clear them, as a front-end does."""
        pages = {page for page in range(LOG_BYTES * 8) if self.map[page // 8] >> page % 8 & 1}
        self.map[:LOG_BYTES] = bytes(LOG_BYTES)
        return pages


@pytest.fixture
def log() -> Iterator[Log]:
    fd = os.memfd_create("dirty")
    os.ftruncate(fd, PAGE)
    made = Log(fd, mmap.mmap(fd, PAGE), os.eventfd(0, os.EFD_NONBLOCK))
    yield made
    made.map.close()
    os.close(fd)
    os.close(made.event)


@pytest.fixture(params=["split", "packed"])
def drive(drive: Drive, log: Log, request: pytest.FixtureRequest) -> Drive:
    """Make drivers that log, in both formats of a ring."""

    def make(features: int = LOG_ALL, *, log_used: bool = True, **options: object) -> Driver:
        driver = partial(drive, packed=request.param == "packed")(
            features=features | VERSION_1 | 1 << 28, log_used=log_used, start=False, **options
        )
        assert lib.guest_memory_log(driver.table, log.fd, 0, LOG_BYTES, log.event) == 0
        driver.start()
        return driver

    return make


def rings(driver: Driver) -> set[int]:
    """Return the pages of a small ring's used entries, and of the device's event suppression."""
    return {driver.used // PAGE, *([driver.desc // PAGE] if type(driver) is not Driver else [])}


def pages(start: int, length: int) -> set[int]:
    return set(range(start // PAGE, (start + length - 1) // PAGE + 1))


def test_a_read_marks_what_it_wrote_and_the_ring(drive: Drive, log: Log) -> None:
    driver = drive()
    log.take()
    assert driver.request(IN, 0, into=3 * PAGE)[0] == OK
    assert log.take() == pages(DATA + 16, 3 * PAGE + 1) | rings(driver)


def test_a_write_marks_its_status_and_the_ring(drive: Drive, log: Log) -> None:
    driver = drive()
    log.take()
    assert driver.request(OUT, 0, bytes(3 * PAGE))[0] == OK
    assert log.take() == pages(DATA + 16 + 3 * PAGE, 1) | rings(driver)


def test_an_answer_marks_no_more_than_itself_and_its_status(drive: Drive, log: Log) -> None:
    driver = drive()
    log.take()
    assert driver.request(GET_ID, into=4 * PAGE)[0] == OK
    status = DATA + 16 + 4 * PAGE
    assert log.take() == pages(DATA + 16, 20) | pages(status, 1) | rings(driver)


def test_each_buffer_is_marked_where_it_is(drive: Drive, log: Log) -> None:
    driver = drive()
    driver.put_header(DATA, IN)
    log.take()
    places = [DATA + 20 * PAGE, DATA + 10 * PAGE - 256, DATA + 30 * PAGE + 8]
    buffers = [Buffer(place, 512, writable=True) for place in places]
    driver.send([Buffer(DATA, 16), *buffers, Buffer(DATA + 40 * PAGE, 1, writable=True)])
    driver.poll()
    assert driver.completed() == [(0, 3 * 512 + 1)]
    expected = set().union(*(pages(place, 512) for place in places))
    assert log.take() == expected | pages(DATA + 40 * PAGE, 1) | rings(driver)


def test_without_log_all_nothing_is_marked(drive: Drive, log: Log) -> None:
    driver = drive(0)
    assert driver.request(IN, 0, into=4096)[0] == OK
    assert log.take() == set()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(log.event)


def test_without_the_flag_the_ring_is_not_marked(drive: Drive, log: Log) -> None:
    driver = drive(log_used=False)
    assert driver.request(IN, 0, into=512)[0] == OK
    assert log.take() == pages(DATA + 16, 513)


def test_the_front_end_is_told_that_something_was_logged(drive: Drive, log: Log) -> None:
    driver = drive()
    driver.request(IN, 0, into=512)
    assert os.eventfd_read(log.event) == 1


def test_a_page_without_a_bit_is_left_alone(drive: Drive, log: Log) -> None:
    """The control process refuses such a log; if it did not, no other memory may be hurt."""
    driver = drive()
    where = MEMORY - 1024
    log.map[LOG_BYTES] = 0
    driver.put_header(DATA, IN)
    driver.send([Buffer(DATA, 16), Buffer(where, 513, writable=True)])
    driver.poll()
    assert len(driver.completed()) == 1
    assert log.map[LOG_BYTES] == 0


@pytest.mark.parametrize("features", [LOG_ALL, LOG_ALL | EVENT_IDX])
def test_a_ring_of_several_pages_is_marked_as_it_wraps(
    drive: Drive, log: Log, features: int
) -> None:
    driver = drive(features, size=512)
    marked: set[int] = set()
    for place in range(driver.size + 20):
        # A status that was not there, and a ring of which the driver has written its part.
        where = DATA + place % 100 * PAGE
        driver.put_header(where, OUT, place)
        driver.mem[where + 528] = 0xFF
        driver.send([Buffer(where, 528), Buffer(where + 528, 1, writable=True)], place % 256)
        before = bytes(driver.mem)
        log.take()
        driver.poll()
        assert len(driver.completed()) == 1
        now = log.take()
        changed = differing(before, bytes(driver.mem))
        assert changed <= now
        assert len(now) <= 4  # the status, the used entry, the index, and the event suppression
        marked |= now
    ring = driver.used if type(driver) is Driver else driver.desc
    assert marked >= pages(ring, 8 * driver.size)
    assert marked <= pages(ring, 16 * driver.size) | rings(driver) | pages(DATA, 100 * PAGE)


def differing(before: bytes, after: bytes) -> set[int]:
    return {
        page
        for page in range(MEMORY // PAGE)
        if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]
    }


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 40).map(lambda sectors: sectors * 512), min_size=1, max_size=4),
    shifts=st.lists(st.integers(0, PAGE - 1), min_size=4, max_size=4),
    status=st.integers(0, PAGE - 1),
)
def test_reads_of_any_shape_mark_exactly_what_changed(
    drive: Drive, log: Log, sizes: list[int], shifts: list[int], status: int
) -> None:
    """The reference: memory is filled with something that the disk does not have, then compared."""
    driver = drive()
    driver.mem[DATA:] = b"\xa5" * (MEMORY - DATA)
    driver.put_header(DATA, IN)
    starts = [DATA + (1 + 20 * i) * PAGE + shift for i, shift in enumerate(shifts)]
    buffers = [
        Buffer(start, size, writable=True) for start, size in zip(starts, sizes, strict=False)
    ]
    before = bytes(driver.mem)
    log.take()
    end = DATA + 100 * PAGE + status
    driver.send([Buffer(DATA, 16), *buffers, Buffer(end, 1, writable=True)])
    driver.poll()
    assert driver.completed() == [(0, sum(sizes) + 1)]
    found = differing(before, bytes(driver.mem))
    in_data = {page for page in found if page >= DATA // PAGE}
    assert log.take() == in_data | rings(driver)


def test_what_another_process_may_have_published_is_marked_at_recovery(
    drive: Drive, log: Log
) -> None:
    driver = drive(size=512)
    driver.request(OUT, 0, bytes(512))
    driver.kill()
    log.take()
    driver.start(recover=True)
    ring = driver.used if type(driver) is Driver else driver.desc
    assert log.take() >= pages(ring, 8 * 512)


def test_a_log_that_cannot_be_mapped_is_refused(native: CData, log: Log) -> None:
    driver = Driver(native, lib.null_bdev_open(native, 5, 0, 512, 100), start=False)
    assert lib.guest_memory_log(driver.table, 1 << 20, 0, 8, -1) < 0
    assert lib.guest_memory_log(driver.table, log.fd, 0, 8, 1 << 20) < 0
    assert lib.guest_memory_log(driver.table, log.fd, 0, 0, -1) < 0
    lib.bdev_close(driver.bdev)
    driver.close()
