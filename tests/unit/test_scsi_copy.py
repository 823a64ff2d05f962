"""EXTENDED COPY and RECEIVE COPY RESULTS: SPC-5 sections 6.6 and 6.20 to 6.24."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, lib
from tests.support.scsi import (
    CHECK_CONDITION,
    CONFLICT,
    GOOD,
    INVALID_FIELD,
    INVALID_LIST,
    LIST_LENGTH,
    Answer,
    Port,
    Unit,
)
from tests.unit.conftest import DISK_BLOCKS

BLOCK = 512
COPY_ABORTED = 10
UNREACHABLE, THIRD_PARTY = (COPY_ABORTED, 0x0804), (COPY_ABORTED, 0x0D01)
HERE, THERE = bytes(range(16)), bytes(range(16, 32))  # UUIDs of the units at LUN 0 and 1


def cdb(length: int) -> bytes:
    return struct.pack(">BB8xI2x", 0x83, 0, length)


def by_uuid(uuid: bytes, *, kind: int = 0xE4, block: int = BLOCK) -> bytes:
    designator = b"\x10\0" + uuid
    fixed = struct.pack(">B3xBBxB20s", kind, 1, 10, len(designator), designator)
    return fixed + block.to_bytes(4, "big")


def by_naa(name: bytes) -> bytes:
    return struct.pack(">B3xBBxB20sI", 0xE4, 1, 3, 8, name, BLOCK)


def segment(
    blocks: int, at: int, to: int, *, source: int = 0, destination: int = 1, flags: int = 0
) -> bytes:
    return struct.pack(">BBHHHxxHQQ", 2, flags, 24, source, destination, blocks, at, to)


def parameters(
    cscds: list[bytes], segments: list[bytes], *, number: int = 1, usage: int = 0, inline: int = 0
) -> bytes:
    both = b"".join(cscds), b"".join(segments)
    head = struct.pack(">BBH4xII", number, usage << 3, len(both[0]), len(both[1]), inline)
    return head + both[0] + both[1]


@pytest.fixture
def units(native: CData, ramdisk: CData, filedisk: CData) -> Iterator[list[Unit]]:
    units = [Unit(native, ramdisk), Unit(native, filedisk)]
    yield units
    for unit in units:
        unit.close()


@pytest.fixture
def port(units: list[Unit]) -> Port:
    """A target with both disks."""
    port = units[0].port()
    assert port.add(units[1], 1, uuid=THERE) == 0
    port.run(bytes(6), lun=1)
    return port


def copy(port: Port, *segments: bytes, **rest: int) -> Answer:
    data = parameters([by_uuid(HERE), by_uuid(THERE)], list(segments), **rest)
    return port.run(cdb(len(data)), data)


def write(port: Port, lun: int, lba: int, data: bytes) -> None:
    command = struct.pack(">BBIBHB", 0x2A, 0, lba, 0, len(data) // BLOCK, 0)
    assert port.run(command, data, lun=lun).status == GOOD


def read(port: Port, lun: int, lba: int, blocks: int) -> bytes:
    command = struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)
    return port.run(command, into=blocks * BLOCK, lun=lun).data


def results(port: Port, action: int, number: int = 1) -> Answer:
    return port.run(struct.pack(">BBB7xI2x", 0x84, action, number, 200), into=200)


def test_blocks_are_copied_from_one_unit_to_another_and_back(port: Port) -> None:
    data = os.urandom(1000 * BLOCK)
    write(port, 0, 10, data)
    assert copy(port, segment(1000, 10, 700), segment(3, 10, 5)).status == GOOD
    assert read(port, 1, 700, 1000) == data
    assert read(port, 1, 5, 3) == data[: 3 * BLOCK]
    assert copy(port, segment(8, 700, 4, source=1, destination=0)).status == GOOD
    assert read(port, 0, 4, 6) == data[: 6 * BLOCK]
    status = results(port, 0).data
    assert status == struct.pack(">IBHBI", 8, 1, 1, 0, 8 * BLOCK)


def test_unit_is_found_by_the_name_of_its_identification_page(port: Port) -> None:
    write(port, 0, 0, b"n" * BLOCK)
    page = port.run(b"\x12\1\x83\0\xff\0", into=255).data
    assert page[4:8] == b"\1\3\0\x08"
    data = parameters([by_naa(page[8:16])], [segment(1, 0, 9, destination=0)])
    assert port.run(cdb(len(data)), data).status == GOOD
    assert read(port, 0, 9, 1) == b"n" * BLOCK


def test_nothing_to_copy(port: Port) -> None:
    assert port.run(cdb(0)).status == GOOD
    assert copy(port).status == GOOD
    assert copy(port, segment(0, 0, 0)).status == GOOD
    assert results(port, 0).data[5:7] == b"\0\1"


@pytest.mark.parametrize(
    ("segments", "again", "good"),
    [
        ([segment(8, 0, 4, destination=0)], False, True),
        ([segment(8, 0, 4, destination=0)], True, False),
        ([segment(8, 4, 0, destination=0)], True, False),
        ([segment(8, 0, 8, destination=0)], True, True),
        ([segment(8, 8, 0, destination=0)], True, True),
        ([segment(8, 0, 4)], True, True),
        ([segment(8, 0, 100), segment(8, 100, 200, source=1)], True, True),
        ([segment(8, 0, 100), segment(1, 50, 7, destination=0)], True, False),
        ([segment(8, 0, 100), segment(1, 50, 8, destination=0)], True, True),
    ],
)
def test_what_a_dead_process_had_begun_is_copied_again_if_that_is_the_same(
    port: Port, segments: list[bytes], again: bool, good: bool
) -> None:
    """It is not where something is read, and written at once or later: it may have been already."""
    write(port, 0, 0, b"".join(bytes([i]) * BLOCK for i in range(16)))
    before = read(port, 0, 0, 16)
    data = parameters([by_uuid(HERE), by_uuid(THERE)], segments)
    answer = port.run(cdb(len(data)), data, again=again)
    assert answer.code == (None if good else THIRD_PARTY)
    if not good:
        assert read(port, 0, 0, 16) == before


@pytest.mark.parametrize(
    ("bad", "code", "field"),
    [
        (segment(1, 0, 0, destination=2), UNREACHABLE, 6),
        (segment(1, 0, 0, source=0xFFFF), UNREACHABLE, 4),
        (segment(2, DISK_BLOCKS - 1, 0), (COPY_ABORTED, 0), 12),
        (segment(2, 0, DISK_BLOCKS - 1), (COPY_ABORTED, 0), 20),
        (segment(1, 1 << 63, 0), (COPY_ABORTED, 0), 12),
    ],
)
def test_segment_that_cannot_be_copied_ends_the_copy(
    port: Port, bad: bytes, code: tuple[int, int], field: int
) -> None:
    write(port, 0, 0, b"1" * BLOCK)
    answer = copy(port, segment(1, 0, 30), bad, segment(1, 0, 31))
    assert (answer.status, answer.code) == (CHECK_CONDITION, code)
    assert answer.sense[8:12] == b"\0\0\0\1", "the number of the segment"
    assert answer.sense[15:18] == bytes([0xA0, 0, field])
    assert read(port, 1, 30, 1) == b"1" * BLOCK
    assert results(port, 0).code == INVALID_FIELD
    failed = results(port, 4).data
    assert (failed[56], failed[60:]) == (CHECK_CONDITION, answer.sense)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: data[:15], LIST_LENGTH),
        (lambda data: data[:-1], LIST_LENGTH),
        (lambda data: data[:3] + b"\x41" + data[4:], LIST_LENGTH),
        (lambda data: data[:3] + b"\x3f" + data[4:], INVALID_LIST),
        (lambda data: data[:11] + b"\4" + data[12:], INVALID_LIST),
        (lambda data: data[:11] + b"\4" + data[12:80] + b"\0" + data[81:], (5, 0x2609)),
        (lambda data: data[:1] + b"\x08" + data[2:], INVALID_LIST),
        (lambda data: data[:1] + b"\x18" + data[2:], INVALID_LIST),
        (lambda data: data[:15] + b"\4" + data[16:] + bytes(4), (5, 0x260B)),
        (lambda data: data[:16] + b"\xe0" + data[17:], (5, 0x2607)),
        (lambda data: data[:80] + b"\3" + data[81:], (5, 0x2609)),
        (lambda data: data[:83] + b"\x17" + data[84:], INVALID_LIST),
        (lambda data: data[:46] + b"\x10" + data[47:], INVALID_LIST),
        (lambda data: data[:23] + b"\x15" + data[24:], INVALID_LIST),
    ],
)
def test_list_that_cannot_be_copies_nothing(
    port: Port, change: Callable[[bytes], bytes], code: tuple[int, int]
) -> None:
    write(port, 0, 0, b"x" * BLOCK)
    write(port, 1, 8, bytes(BLOCK))
    data = change(parameters([by_uuid(HERE), by_uuid(THERE)], [segment(1, 0, 8)]))
    assert port.run(cdb(len(data)), data).code == code
    assert read(port, 1, 8, 1) == bytes(BLOCK)
    assert results(port, 0).code == INVALID_FIELD


def test_more_descriptors_than_there_may_be(port: Port) -> None:
    most = results(port, 3).data
    cscds, segments, room = struct.unpack_from(">HHI", most, 8)
    assert (most[43], most[44:]) == (2, b"\x02\xe4")
    data = parameters([by_uuid(HERE)] * (cscds + 1), [segment(1, 0, 0)])
    assert port.run(cdb(len(data)), data).code == (5, 0x2606)
    data = parameters([by_uuid(HERE)], [segment(1, 0, 0, destination=0)] * (segments + 1))
    assert port.run(cdb(len(data)), data).code == (5, 0x2608)
    data = parameters([by_uuid(HERE)] * (cscds + 1), [segment(1, 0, 0)] * (segments + 1))
    assert len(data) - 16 > room
    assert port.run(cdb(len(data)), data).code == LIST_LENGTH
    data = parameters([by_uuid(HERE)] * cscds, [segment(1, 0, 0, destination=0)] * segments)
    assert port.run(cdb(len(data)), data).status == GOOD


def test_reservation_of_the_destination_holds(units: list[Unit], port: Port) -> None:
    other = units[1].port(2, 2)
    assert other.run(b"\x16" + bytes(5)).status == GOOD
    assert copy(port, segment(1, 0, 8)).code == THIRD_PARTY
    assert other.run(b"\x17" + bytes(5)).status == GOOD
    assert copy(port, segment(1, 0, 8)).status == GOOD
    blocker = units[0].port(2, 3)
    assert blocker.run(b"\x16" + bytes(5)).status == GOOD
    assert copy(port, segment(1, 0, 8)).status == CONFLICT


def test_unit_that_is_write_protected_or_gone(native: CData, units: list[Unit]) -> None:
    port = units[0].port(5, 5)
    assert port.add(units[1], 1, uuid=THERE, readonly=True) == 0
    assert copy(port, segment(1, 0, 8)).code == THIRD_PARTY
    assert copy(port, segment(1, 8, 0, source=1, destination=0)).status == GOOD
    assert lib.scsi_target_remove(port.target, 1) == 0
    assert copy(port, segment(1, 0, 8)).code == UNREACHABLE


def test_results_are_of_a_nexus_and_its_last_copy(units: list[Unit], port: Port) -> None:
    assert results(port, 0).code == INVALID_FIELD
    assert copy(port, segment(1, 0, 8), number=7).status == GOOD
    assert results(port, 4, 7).data == bytes(4)
    assert results(port, 0, 6).code == INVALID_FIELD
    assert results(units[0].port(2, 2), 0, 7).code == INVALID_FIELD
    assert results(port, 0, 7).status == GOOD
    assert results(port, 0, 7).code == INVALID_FIELD, "it is told once"
    assert copy(port, segment(1, 0, 8), number=0, usage=3).status == GOOD
    assert results(port, 0, 0).code == INVALID_FIELD


def test_third_party_copy_page(port: Port) -> None:
    page = port.run(b"\x12\1\x8f\0\xff\0", into=255).data
    found, at = {}, 4
    while at < len(page):
        kind, length = struct.unpack_from(">HH", page, at)
        found[kind] = page[at + 4 : at + 4 + length]
        assert length % 4 == 0
        at += 4 + length
    assert sorted(found) == [1, 4, 8, 12, 0x8001]
    assert found[1][:9] == bytes([8, 0x83, 1, 0, 0x84, 3, 0, 3, 4])
    assert found[4][4:12] == results(port, 3).data[8:16]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    head=st.binary(min_size=16, max_size=16),
    tail=st.lists(
        st.one_of(
            st.just(by_uuid(HERE)),
            st.just(by_uuid(THERE)),
            st.builds(segment, st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
            st.binary(max_size=40),
        ),
        max_size=6,
    ),
    sound=st.booleans(),
)
def test_any_list_gets_a_well_formed_answer(
    port: Port, head: bytes, tail: list[bytes], sound: bool
) -> None:
    body = b"".join(tail)
    if sound:
        cscds = 32 * sum(len(one) == 32 for one in tail)
        head = struct.pack(">BBH4xII", head[0], 0, cscds, max(len(body) - cscds, 0), 0)
    answer = port.run(cdb(16 + len(body)), head + body)
    assert answer.status in (GOOD, CHECK_CONDITION)
    assert lib.scsi_target_in_flight(port.target) == 0
