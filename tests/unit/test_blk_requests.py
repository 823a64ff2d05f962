"""virtio-blk requests, as virtio 1.2 section 5.2.6 has them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, ffi, lib
from tests.support.driver import (
    DATA,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    Buffer,
    Driver,
)
from tests.unit.conftest import DISK_BLOCKS

Drive = Callable[..., Driver]
CAPACITY = DISK_BLOCKS


def ranges(*items: tuple[int, int, int]) -> bytes:
    """Return discard or write-zeroes segments: (sector, count, flags)."""
    return b"".join(struct.pack("<QII", *item) for item in items)


@pytest.fixture(params=["split", "packed"])
def drive(drive: Drive, request: pytest.FixtureRequest) -> Drive:
    """Requests mean the same in both formats of a ring."""
    return partial(drive, packed=request.param == "packed")


def test_reads_what_was_written(drive: Drive) -> None:
    driver = drive()
    data = os.urandom(4096)
    assert driver.request(OUT, 16, data) == (OK, 1, b"")
    assert driver.request(IN, 16, into=4096) == (OK, 4097, data)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    write=st.booleans(),
    cut=st.lists(st.integers(0, 16 + 1024 + 1), max_size=10),
    indirect=st.booleans(),
)
def test_framing_is_the_drivers_choice(
    drive: Drive, write: bool, cut: list[int], indirect: bool
) -> None:
    driver = drive()
    data = os.urandom(1024)
    driver.request(OUT, 0, data)
    if write:
        data = os.urandom(1024)
        cuts = [edge for edge in cut if edge <= 16 + 1024] or [16]
        assert driver.request(OUT, 0, data, cut=[*cuts, 16 + 1024], indirect=indirect)[:2] == (
            OK,
            1,
        )
        assert driver.request(IN, 0, into=1024)[2] == data
    else:
        answer = driver.request(IN, 0, into=1024, cut=[16, *cut], indirect=indirect)
        assert answer == (OK, 1025, data)


@pytest.mark.parametrize(
    ("kind", "sector", "size"),
    [
        (IN, CAPACITY, 512),
        (IN, CAPACITY - 1, 1024),
        (IN, (1 << 55) - 1, 512),
        (IN, (1 << 64) - 1, 512),
        (IN, 0, 100),
        (OUT, CAPACITY, 512),
        (OUT, 1 << 63, 512),
        (OUT, 0, 700),
    ],
)
def test_range_that_the_disk_does_not_have_is_an_error(
    drive: Drive, kind: int, sector: int, size: int
) -> None:
    driver = drive()
    before = driver.request(IN, 0, into=512)[2]
    out = os.urandom(size) if kind == OUT else b""
    assert driver.request(kind, sector, out, into=0 if out else size)[0] == IOERR
    assert driver.request(IN, 0, into=512)[2] == before


def test_flush_succeeds(drive: Drive) -> None:
    assert drive().request(FLUSH) == (OK, 1, b"")


def test_get_id_answers_the_serial(drive: Drive) -> None:
    status, length, text = drive().request(GET_ID, into=20)
    assert (status, length, text) == (OK, 21, b"serial-of-the-disk\0\0")


def test_get_id_fills_a_short_buffer_and_no_more(drive: Drive) -> None:
    assert drive().request(GET_ID, into=4) == (OK, 5, b"seri")


@pytest.mark.parametrize("kind", [2, 3, 5, 10, 14, 15, 0xFFFFFFFF])
def test_unknown_request_is_unsupported(drive: Drive, kind: int) -> None:
    assert drive().request(kind, into=512)[0] == UNSUPP


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_ranges_read_as_zeroes_and_the_rest_stays(drive: Drive, kind: int) -> None:
    driver = drive()
    data = os.urandom(16 * 512)
    driver.request(OUT, 0, data)
    assert driver.request(kind, 0, ranges((2, 3, 0), (9, 0, 0), (8, 1, 0)))[0] == OK
    expected = bytearray(data)
    expected[2 * 512 : 5 * 512] = bytes(3 * 512)
    expected[8 * 512 : 9 * 512] = bytes(512)
    assert driver.request(IN, 0, into=len(data))[2] == expected


def test_write_zeroes_takes_the_unmap_flag(drive: Drive) -> None:
    driver = drive()
    driver.request(OUT, 0, b"x" * 4096)
    assert driver.request(WRITE_ZEROES, 0, ranges((0, 8, 1)))[0] == OK
    assert driver.request(IN, 0, into=4096)[2] == bytes(4096)


@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        (DISCARD, ranges((0, 1, 1)), UNSUPP),
        (WRITE_ZEROES, ranges((0, 1, 2)), UNSUPP),
        (DISCARD, b"", IOERR),
        (DISCARD, b"x" * 15, IOERR),
        (DISCARD, ranges((0, 1, 0)) * 9, IOERR),
        (DISCARD, ranges((0, (1 << 20) + 1, 0)), IOERR),
        (DISCARD, ranges((CAPACITY, 1, 0)), IOERR),
        (WRITE_ZEROES, ranges((CAPACITY - 1, 2, 0)), IOERR),
        (WRITE_ZEROES, ranges(((1 << 64) - 1, 2, 0)), IOERR),
    ],
)
def test_bad_ranges_are_refused(drive: Drive, kind: int, payload: bytes, status: int) -> None:
    driver = drive()
    driver.request(OUT, 0, b"x" * 512)
    assert driver.request(kind, 0, payload)[0] == status
    assert driver.request(IN, 0, into=512)[2] == b"x" * 512


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(OUT, b"y" * 512), (DISCARD, ranges((0, 1, 0))), (WRITE_ZEROES, ranges((0, 1, 0)))],
)
def test_read_only_disk_refuses_every_change(drive: Drive, kind: int, payload: bytes) -> None:
    drive().request(OUT, 0, b"x" * 512)
    driver = drive(readonly=True)
    assert driver.request(kind, 0, payload)[0] == IOERR
    assert driver.request(IN, 0, into=512)[2] == b"x" * 512


def test_header_that_is_too_short_is_an_error(drive: Drive) -> None:
    driver = drive()
    driver.send([Buffer(DATA, 15), Buffer(DATA + 100, 1, writable=True)])
    driver.poll()
    assert driver.completed() == [(0, 1)]
    assert driver.mem[DATA + 100] == IOERR


def test_chain_without_room_for_a_status_is_completed(drive: Drive) -> None:
    driver = drive()
    driver.send([Buffer(DATA, 16)])
    driver.poll()
    assert driver.completed() == [(0, 1)]
    assert not driver.notices.broken


def test_empty_buffers_are_skipped(drive: Drive) -> None:
    driver = drive()
    driver.put_header(DATA, IN)
    driver.send(
        [
            Buffer(DATA, 0),
            Buffer(DATA, 16),
            Buffer(DATA + 16, 0, writable=True),
            Buffer(DATA + 16, 513, writable=True),
            Buffer(DATA, 0, writable=True),
        ],
    )
    driver.poll()
    assert driver.completed() == [(0, 513)]


def test_disk_that_is_gone_answers_errors(drive: Drive) -> None:
    driver = drive()
    assert driver.queue is not None
    lib.blk_queue_set_bdev(driver.queue, ffi.NULL)
    assert driver.request(IN, 0, into=512)[0] == IOERR
    assert driver.request(DISCARD, 0, ranges((0, 1, 0)))[0] == IOERR
    assert driver.request(GET_ID, into=20)[0] == OK


@pytest.fixture
def removed(native: CData) -> Iterator[CData]:
    bdev = lib.null_bdev_open(native, 5, 0, 512, 100)
    yield bdev
    lib.bdev_close(bdev)


def test_removed_disk_answers_errors(drive: Drive, removed: CData) -> None:
    driver = drive(bdev=removed)
    assert driver.request(IN, 0, into=512)[0] == OK
    lib.bdev_remove(removed)
    assert driver.request(IN, 0, into=512)[0] == IOERR


def test_a_turn_moves_so_many_bytes_and_leaves_the_rest_to_the_next(drive: Drive) -> None:
    """A guest with large requests keeps those of the other queues waiting for one turn."""
    driver = drive()
    size = 64 << 10
    driver.put_header(DATA, IN)
    data = Buffer(DATA + 64, size, writable=True)
    status = Buffer(DATA + 32, 1, writable=True)
    for place in range(5):
        driver.send([Buffer(DATA, 16), data, status], 3 * place)
    done = []
    for _ in range(10):
        driver.poll(1)
        done.append(len(driver.completed()))
    assert [count for count in done if count] == [4, 1]
