"""Commands of a logical unit, as SPC-5 and SBC-4 have them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, ffi, lib
from tests.support.scsi import (
    CHECK_CONDITION,
    GOOD,
    INVALID_FIELD,
    INVALID_LIST,
    INVALID_OPCODE,
    LIST_LENGTH,
    MISCOMPARE,
    NO_SUCH_UNIT,
    NOT_READY,
    OUT_OF_RANGE,
    PROTECTED,
    UNIT_ATTENTION,
    WELL_KNOWN,
    Port,
    Unit,
)
from tests.unit.conftest import DISK_BLOCKS

BLOCK = 512


@pytest.fixture(params=["malloc", "file"])
def unit(native: CData, request: pytest.FixtureRequest) -> Iterator[Unit]:
    """A unit on a disk that answers at once, and on one that answers later."""
    disk = request.getfixturevalue("ramdisk" if request.param == "malloc" else "filedisk")
    unit = Unit(native, disk)
    yield unit
    unit.close()


@pytest.fixture
def port(unit: Unit) -> Port:
    return unit.port()


def read_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)


def write_10(lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, flags, lba, 0, blocks, 0)


def sixteen(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIBB", opcode, flags, lba, blocks, 0, 0)


def contents(port: Port, lba: int, blocks: int) -> bytes:
    """Return what the medium holds."""
    answer = port.run(read_10(lba, blocks), into=blocks * BLOCK)
    assert answer.status == GOOD
    return answer.data


# --- READ and WRITE -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (b"\x0a\0\0\x10\4\0", b"\x08\0\0\x10\4\0"),
        (write_10(16, 4), read_10(16, 4)),
        (write_10(16, 4, 0x18), read_10(16, 4)),
        (
            struct.pack(">BBIIBB", 0xAA, 0, 16, 4, 0, 0),
            struct.pack(">BBIIBB", 0xA8, 0x08, 16, 4, 0, 0),
        ),
        (sixteen(0x8A, 16, 4, 0x08), sixteen(0x88, 16, 4, 0x18)),
    ],
    ids=["6", "10", "10-fua", "12", "16"],
)
def test_reads_what_was_written(port: Port, write: bytes, read: bytes) -> None:
    data = os.urandom(4 * BLOCK)
    assert port.run(write, data).status == GOOD
    answer = port.run(read, into=4 * BLOCK)
    assert (answer.status, answer.data, answer.transferred) == (GOOD, data, len(data))


def test_six_byte_transfer_length_of_zero_is_256_blocks(port: Port) -> None:
    data = os.urandom(256 * BLOCK)
    assert port.run(b"\x0a\0\0\0\0\0", data).status == GOOD
    assert port.run(b"\x08\0\0\0\0\0", into=256 * BLOCK).data == data


def test_data_may_lie_in_any_pieces(port: Port) -> None:
    data = os.urandom(2 * BLOCK)
    assert port.run(write_10(3, 2), data, cut=[1, 700, 323]).status == GOOD
    assert port.run(read_10(3, 2), cut=[1000, 3, 21], into=1024).data == data


@pytest.mark.parametrize(
    ("lba", "blocks"), [(DISK_BLOCKS, 1), (DISK_BLOCKS - 1, 2), (0xFFFFFFFF, 1), (0xFFFFFFFF, 0)]
)
def test_range_past_the_end_is_refused(port: Port, lba: int, blocks: int) -> None:
    before = contents(port, DISK_BLOCKS - 1, 1)
    assert port.run(read_10(lba, blocks), into=max(blocks, 1) * BLOCK).code == OUT_OF_RANGE
    assert port.run(write_10(lba, blocks), bytes(max(blocks, 1) * BLOCK)).code == OUT_OF_RANGE
    assert contents(port, DISK_BLOCKS - 1, 1) == before


def test_lba_that_overflows_is_refused(port: Port) -> None:
    assert port.run(sixteen(0x88, (1 << 64) - 1, 2), into=2 * BLOCK).code == OUT_OF_RANGE


def test_buffer_that_is_too_large_leaves_a_residual(port: Port) -> None:
    answer = port.run(read_10(0, 1), into=3 * BLOCK)
    assert (answer.status, answer.transferred, answer.overrun) == (GOOD, BLOCK, False)
    data = os.urandom(3 * BLOCK)
    tail = contents(port, 1, 2)
    answer = port.run(write_10(0, 1), data)
    assert (answer.status, answer.transferred) == (GOOD, BLOCK)
    assert contents(port, 0, 3) == data[:BLOCK] + tail


def test_buffer_that_is_too_small_is_an_overrun_and_nothing_is_written(port: Port) -> None:
    before = contents(port, 0, 2)
    assert port.run(read_10(0, 2), into=BLOCK).overrun
    assert port.run(write_10(0, 2), os.urandom(BLOCK)).overrun
    assert contents(port, 0, 2) == before


def test_protection_information_is_refused_with_a_field_pointer(port: Port) -> None:
    answer = port.run(b"\x28\x20" + read_10(0, 1)[2:], into=BLOCK)
    assert (answer.code, answer.field) == (INVALID_FIELD, (1, 5))


def test_read_only_unit_refuses_every_change(native: CData, unit: Unit) -> None:
    port = Port(native, None, 5, 1)
    unit.ports.append(port)
    assert port.add(unit, 0, readonly=True) == 0
    port.ready()
    before = contents(port, 0, 2)
    for cdb, out in [
        (write_10(0, 1), bytes(BLOCK)),
        (sixteen(0x93, 0, 1), bytes(BLOCK)),
        (sixteen(0x8E, 0, 1, 2), bytes(BLOCK)),
        (sixteen(0x8B, 0, 1), b"\xff" * BLOCK),
        (b"\x89" + bytes(12) + b"\1\0\0", before[:BLOCK] + b"x" * BLOCK),
        (struct.pack(">BB5xHB", 0x42, 0, 24, 0), struct.pack(">HHIQII", 22, 16, 0, 0, 1, 0)),
    ]:
        assert port.run(cdb, out).code == PROTECTED, cdb.hex()
    assert contents(port, 0, 2) == before
    assert port.run(b"\x1a\x08\x3f\0\xff\0", into=255).data[2] & 0x80


# --- what is not there ----------------------------------------------------------------------------


def test_unknown_operation_code(port: Port) -> None:
    assert port.run(b"\xff" + bytes(15)).code == INVALID_OPCODE


def test_unknown_service_action_points_at_it(port: Port) -> None:
    answer = port.run(b"\x9e\x1f" + bytes(14))
    assert (answer.code, answer.field) == (INVALID_FIELD, (1, 4))


@pytest.mark.parametrize("opcode", [0x00, 0x28, 0x1A, 0xFF])
def test_no_unit_at_the_lun(port: Port, opcode: int) -> None:
    assert port.run(bytes([opcode, *bytes(15)]), into=512, lun=9).code == NO_SUCH_UNIT


def test_inquiry_where_there_is_no_unit(port: Port) -> None:
    answer = port.run(b"\x12\0\0\0\xff\0", into=255, lun=9)
    assert (answer.status, answer.data[0]) == (GOOD, 0x7F)


def test_request_sense_where_there_is_no_unit(port: Port) -> None:
    answer = port.run(b"\x03\0\0\0\xfc\0", into=252, lun=9)
    assert (answer.status, answer.data[2], answer.data[12]) == (GOOD, 5, 0x25)


def test_removed_disk_answers_as_a_unit_that_is_not_there(native: CData) -> None:
    disk = lib.null_bdev_open(native, 5, 0, 512, 100)
    unit = Unit(native, disk)
    port = unit.port()
    lib.bdev_remove(disk)
    assert port.run(read_10(0, 1), into=BLOCK).code == NO_SUCH_UNIT
    assert lib.scsi_target_detach(port.target, 0) == 0
    assert port.run(bytes(6)).code == NO_SUCH_UNIT
    assert lib.scsi_target_remove(port.target, 0) == 0
    assert lib.scsi_target_remove(port.target, 0) < 0
    unit.close()
    lib.bdev_close(disk)


# --- INQUIRY --------------------------------------------------------------------------------------


def inquiry(page: int | None = None, allocation: int = 255) -> bytes:
    return struct.pack(">BBBHB", 0x12, page is not None, page or 0, allocation, 0)


def test_standard_inquiry(port: Port) -> None:
    data = port.run(inquiry(), into=255).data
    assert (data[0], data[2], data[4] + 5) == (0, 6, len(data))
    assert data[8:36] == b"TEST    unit            0001"


def test_allocation_length_cuts_the_answer(port: Port) -> None:
    answer = port.run(inquiry(allocation=5), into=255)
    assert (answer.status, answer.transferred, answer.overrun) == (GOOD, 5, False)


def test_every_page_that_is_listed_is_there(port: Port) -> None:
    pages = port.run(inquiry(0), into=255).data[4:]
    assert list(pages) == [0, 0x80, 0x83, 0x85, 0x86, 0x87, 0x88, 0x8F, 0xB0, 0xB1, 0xB2]
    for page in pages:
        data = port.run(inquiry(page), into=255).data
        assert data[1] == page
        assert len(data) == 4 + int.from_bytes(data[2:4], "big")


def test_unknown_page_points_at_it(port: Port) -> None:
    answer = port.run(inquiry(0xC0), into=255)
    assert (answer.code, answer.field) == (INVALID_FIELD, (2, 7))


def test_serial_number(port: Port) -> None:
    assert port.run(inquiry(0x80), into=255).data[4:] == b"serial-1".ljust(32)


def test_identity_is_the_units_and_not_the_ports(unit: Unit) -> None:
    def of_unit(data: bytes) -> list[bytes]:
        found, at = [], 4
        while at < len(data):
            size = 4 + data[at + 3]
            if not data[at + 1] & 0x30:
                found.append(data[at : at + size])
            at += size
        return found

    pages = [port.run(inquiry(0x83), into=255).data for port in (unit.port(1, 1), unit.port(2, 2))]
    assert pages[0] != pages[1]
    assert of_unit(pages[0]) == of_unit(pages[1]) != []
    assert bytes(range(16)) in of_unit(pages[0])[1]


# --- capacity, mode and log pages -----------------------------------------------------------------


def test_capacity(port: Port) -> None:
    expected = struct.pack(">II", DISK_BLOCKS - 1, BLOCK)
    assert port.run(b"\x25" + bytes(9), into=8).data == expected
    data = port.run(sixteen(0x9E, 0, 32, 0x10), into=32).data
    assert data[:12] == struct.pack(">QI", DISK_BLOCKS - 1, BLOCK)
    assert data[14] & 0x80


def test_lba_status_runs_to_the_end(port: Port) -> None:
    data = port.run(sixteen(0x9E, 8, 24, 0x12), into=24).data
    assert data == struct.pack(">I4xQI4x", 20, 8, DISK_BLOCKS - 8)
    assert port.run(sixteen(0x9E, DISK_BLOCKS, 24, 0x12), into=24).code == OUT_OF_RANGE


def mode_sense(page: int, control: int = 0, allocation: int = 255) -> bytes:
    return bytes([0x1A, 0x08, control << 6 | page, 0, allocation, 0])


def test_all_mode_pages(port: Port) -> None:
    data = port.run(mode_sense(0x3F), into=255).data
    assert data[0] + 1 == len(data)
    at, pages = 4, []
    while at < len(data):
        pages.append(data[at])
        at += 2 + data[at + 1]
    assert (at, pages) == (len(data), [1, 8, 10, 0x1C])


def test_mode_sense_10_has_a_long_descriptor(port: Port) -> None:
    data = port.run(b"\x5a\x10\x08\0\0\0\0\0\xff\0", into=255).data
    assert int.from_bytes(data[:2], "big") + 2 == len(data)
    assert data[8:24] == struct.pack(">Q4xI", DISK_BLOCKS, BLOCK)


def test_saved_values_are_not_there(port: Port) -> None:
    assert port.run(mode_sense(8, 3), into=255).code == (5, 0x3900)


def test_unknown_mode_page_is_refused(port: Port) -> None:
    assert port.run(mode_sense(2), into=255).code == INVALID_FIELD


def select(port: Port, page: bytes | bytearray) -> tuple[int, int] | None:
    data = bytes(4) + page
    return port.run(bytes([0x15, 0x10, 0, 0, len(data), 0]), data).code


def test_write_cache_can_be_switched_off_and_others_learn_of_it(unit: Unit) -> None:
    port, other = unit.port(1), unit.port(2)
    page = bytearray(port.run(mode_sense(8), into=255).data[4:])
    assert page[2] & 4
    page[2] &= ~4
    assert select(port, page) is None
    assert not port.run(mode_sense(8), into=255).data[6] & 4
    assert port.run(mode_sense(8, 2), into=255).data[6] & 4
    assert other.run(bytes(6)).code == (UNIT_ATTENTION, 0x2A01)
    assert other.run(bytes(6)).status == GOOD
    assert port.run(write_10(0, 1), bytes(BLOCK)).status == GOOD


def test_what_cannot_be_changed_is_refused_and_nothing_changes(port: Port) -> None:
    page = bytearray(port.run(mode_sense(8), into=255).data[4:])
    page[2] ^= 5
    answer = port.run(b"\x15\x10\0\0\x18\0", bytes(4) + page)
    assert (answer.code, answer.field) == (INVALID_LIST, (6, 0))
    assert port.run(mode_sense(8), into=255).data[6] & 4


@pytest.mark.parametrize("page", [b"\x08", b"\x08\x12", b"\x08\x12" + bytes(17), b"\x08\x10"])
def test_mode_page_that_is_cut_short_is_refused(port: Port, page: bytes) -> None:
    assert select(port, page) in (LIST_LENGTH, INVALID_LIST)


def test_descriptor_sense_data_when_asked_for(port: Port) -> None:
    page = bytearray(port.run(mode_sense(10), into=255).data[4:])
    page[2] |= 4
    assert select(port, page) is None
    answer = port.run(b"\x28\x20" + read_10(0, 1)[2:], into=BLOCK)
    assert (answer.sense[0], answer.code) == (0x72, INVALID_FIELD)
    assert answer.sense[8:] == bytes([2, 6, 0, 0, 0xCD, 0, 1, 0])


def test_software_write_protect(port: Port) -> None:
    page = bytearray(port.run(mode_sense(10), into=255).data[4:])
    page[4] |= 8
    assert select(port, page) is None
    assert port.run(write_10(0, 1), bytes(BLOCK)).code == PROTECTED


def test_every_log_page_that_is_listed_is_there(port: Port) -> None:
    def sense(page: int, subpage: int = 0) -> bytes:
        cdb = bytes([0x4D, 0, 0x40 | page, subpage, 0, 0, 0, 0, 0xFF, 0])
        answer = port.run(cdb, into=255)
        assert answer.status == GOOD
        assert len(answer.data) == 4 + int.from_bytes(answer.data[2:4], "big")
        return answer.data

    assert list(sense(0)[4:]) == [0, 0x0C, 0x0D, 0x0E]
    for page in sense(0)[4:]:
        assert sense(page)[0] & 0x3F == page
    assert list(sense(0, 0xFF)[4:8]) == [0, 0, 0, 0xFF]


# --- UNMAP and WRITE SAME -------------------------------------------------------------------------


def unmap(port: Port, *ranges: tuple[int, int], size: int | None = None) -> tuple[int, int] | None:
    body = b"".join(struct.pack(">QII", lba, blocks, 0) for lba, blocks in ranges)
    data = struct.pack(">HHI", 6 + len(body), len(body), 0) + body
    data = data[:size] if size is not None else data
    return port.run(struct.pack(">BB5xHB", 0x42, 0, len(data), 0), data).code


def test_unmapped_blocks_read_as_zeroes_and_the_rest_stays(port: Port) -> None:
    data = os.urandom(16 * BLOCK)
    port.run(write_10(0, 16), data)
    assert unmap(port, (2, 3), (9, 0), (8, 1)) is None
    expected = bytearray(data)
    expected[2 * BLOCK : 5 * BLOCK] = bytes(3 * BLOCK)
    expected[8 * BLOCK : 9 * BLOCK] = bytes(BLOCK)
    assert contents(port, 0, 16) == expected


def test_one_bad_range_unmaps_nothing(port: Port) -> None:
    data = os.urandom(4 * BLOCK)
    port.run(write_10(0, 4), data)
    assert unmap(port, (0, 2), (DISK_BLOCKS - 1, 2)) == OUT_OF_RANGE
    assert contents(port, 0, 4) == data


def test_unmap_list_that_is_cut_short(port: Port) -> None:
    assert unmap(port, (0, 1), size=7) == LIST_LENGTH
    assert unmap(port, (0, 1), size=20) is None  # no whole descriptor
    assert unmap(port, size=0) is None


def test_too_many_unmap_descriptors(port: Port) -> None:
    assert unmap(port, *[(0, 1)] * 257) == INVALID_LIST


@pytest.mark.parametrize("pattern", [bytes(BLOCK), b"\xa5" * 511 + b"\x5a"])
@pytest.mark.parametrize("flags", [0, 8])
def test_write_same(port: Port, pattern: bytes, flags: int) -> None:
    data = os.urandom(600 * BLOCK)
    port.run(write_10(0, 600), data)
    assert port.run(sixteen(0x93, 1, 598, flags), pattern).status == GOOD
    assert contents(port, 0, 600) == data[:BLOCK] + pattern * 598 + data[-BLOCK:]


def test_write_same_without_data_writes_zeroes(port: Port) -> None:
    port.run(write_10(0, 2), b"x" * 2 * BLOCK)
    assert port.run(sixteen(0x93, 0, 1, 1)).status == GOOD
    assert contents(port, 0, 2) == bytes(BLOCK) + b"x" * BLOCK


def test_write_same_of_no_blocks_is_refused(port: Port) -> None:
    assert port.run(sixteen(0x93, 0, 0), bytes(BLOCK)).field == (10, 7)


# --- VERIFY, COMPARE AND WRITE, ORWRITE -----------------------------------------------------------


def test_verify_finds_the_first_difference(port: Port) -> None:
    data = bytearray(os.urandom(300 * BLOCK))
    port.run(write_10(0, 300), bytes(data))
    assert port.run(sixteen(0x8F, 0, 300)).status == GOOD
    assert port.run(sixteen(0x8F, 0, 300, 2), bytes(data)).status == GOOD
    data[140_000] ^= 1
    answer = port.run(sixteen(0x8F, 0, 300, 2), bytes(data))
    assert (answer.code, answer.information) == ((MISCOMPARE, 0x1D00), 140_000)


def test_verify_of_one_block_against_many(port: Port) -> None:
    port.run(write_10(0, 4), b"q" * 4 * BLOCK)
    assert port.run(sixteen(0x8F, 0, 4, 6), b"q" * BLOCK).status == GOOD
    answer = port.run(sixteen(0x8F, 0, 4, 6), b"q" * 511 + b"r")
    assert answer.information == 511


def test_write_and_verify(port: Port) -> None:
    data = os.urandom(3 * BLOCK)
    assert port.run(sixteen(0x8E, 5, 3, 2), data).status == GOOD
    assert contents(port, 5, 3) == data


def compare_and_write(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBQ3xBBB", 0x89, 0, lba, blocks, 0, 0)


def test_compare_and_write_writes_what_compares(port: Port) -> None:
    old, new = os.urandom(5 * BLOCK), os.urandom(5 * BLOCK)
    port.run(write_10(7, 5), old)
    assert port.run(compare_and_write(7, 5), old + new).status == GOOD
    assert contents(port, 7, 5) == new


def test_compare_and_write_leaves_what_does_not(port: Port) -> None:
    old, new = os.urandom(5 * BLOCK), os.urandom(5 * BLOCK)
    port.run(write_10(7, 5), old)
    other = bytearray(old)
    other[600] ^= 0x80
    answer = port.run(compare_and_write(7, 5), bytes(other) + new)
    assert (answer.code, answer.information) == ((MISCOMPARE, 0x1D00), 600)
    assert contents(port, 7, 5) == old


def test_compare_and_write_is_done_one_at_a_time(unit: Unit) -> None:
    ports = [unit.port(1), unit.port(2)]
    start = struct.pack("<Q", 0).ljust(BLOCK, b"\0")
    ports[0].run(write_10(0, 1), start)
    started = [
        ports[i % 2]
        .prepare(compare_and_write(0, 1), start + struct.pack("<Q", i + 1).ljust(BLOCK, b"\0"))
        .start()
        for i in range(8)
    ]
    answers = [pending.wait() for pending in started]
    assert [answer.status for answer in answers].count(GOOD) == 1
    winner = next(i for i, answer in enumerate(answers) if answer.status == GOOD)
    assert struct.unpack("<Q", contents(ports[0], 0, 1)[:8]) == (winner + 1,)


def test_compare_and_write_larger_than_it_may_be(port: Port) -> None:
    assert port.run(inquiry(0xB0), into=64).data[5] == 255


def atomic(lba: int, blocks: int, flags: int = 0, boundary: int = 0) -> bytes:
    return struct.pack(">BBQHHBB", 0x9C, flags, lba, boundary, blocks, 0, 0)


def test_write_atomic_where_contents_are_in_memory(native: CData, ramdisk: CData) -> None:
    unit = Unit(native, ramdisk)
    port = unit.port()
    limits = port.run(b"\x12\1\xb0\0\xff\0", into=255).data
    (most,) = struct.unpack_from(">I", limits, 44)
    assert most * BLOCK == 131072
    data = os.urandom(most * BLOCK)
    assert port.run(atomic(3, most), data, cut=[5, len(data) - 5]).status == GOOD
    read = port.run(struct.pack(">BBQIBB", 0x88, 0, 3, most, 0, 0), into=len(data))
    assert read.data == data
    assert port.run(atomic(0, 0)).status == GOOD
    assert port.run(atomic(0, most + 1), bytes(len(data) + BLOCK)).code == INVALID_FIELD
    assert port.run(atomic(0, 1, boundary=1), bytes(BLOCK)).code == INVALID_FIELD
    assert port.run(atomic(DISK_BLOCKS, 1), bytes(BLOCK)).code == OUT_OF_RANGE
    assert port.run(atomic(0, 2), bytes(BLOCK)).overrun
    unit.close()


def test_write_atomic_is_not_for_what_a_loss_of_power_may_tear(
    native: CData, filedisk: CData
) -> None:
    unit = Unit(native, filedisk)
    port = unit.port()
    assert port.run(atomic(0, 1), bytes(BLOCK)).code == INVALID_OPCODE
    limits = port.run(b"\x12\1\xb0\0\xff\0", into=255).data
    assert limits[44:48] == bytes(4)
    unit.close()


def test_orwrite(port: Port) -> None:
    port.run(write_10(0, 2), b"\x0f" * 2 * BLOCK)
    assert port.run(sixteen(0x8B, 0, 2), b"\xf0" * BLOCK + bytes(BLOCK)).status == GOOD
    assert contents(port, 0, 2) == b"\xff" * BLOCK + b"\x0f" * BLOCK


# --- state ----------------------------------------------------------------------------------------


def test_stopped_unit_is_not_ready_until_it_is_started(port: Port) -> None:
    assert port.run(b"\x1b\0\0\0\0\0").status == GOOD
    assert port.run(read_10(0, 1), into=BLOCK).code == (NOT_READY, 0x0402)
    assert port.run(b"\x03\0\0\0\xfc\0", into=252).data[2] == NOT_READY
    assert port.run(b"\x1b\0\0\0\1\0").status == GOOD
    assert port.run(read_10(0, 1), into=BLOCK).status == GOOD


def test_prevent_allow_and_caches(port: Port) -> None:
    for cdb in [b"\x1e\0\0\0\1\0", b"\x1e\0\0\0\0\0", b"\x35" + bytes(9), sixteen(0x91, 1, 4),
                sixteen(0x90, 1, 4), b"\x34" + bytes(9)]:  # fmt: skip
        assert port.run(cdb).status == GOOD


def test_resets_and_resizes_are_told_to_every_nexus_once(unit: Unit) -> None:
    ports = [unit.port(1), unit.port(2)]
    lib.scsi_shared_attention(unit.shared, lib.SCSI_ATTENTION_CAPACITY_CHANGED, -1)
    for port in ports:
        assert port.run(read_10(0, 1), into=BLOCK).code == (UNIT_ATTENTION, 0x2A09)
        assert port.run(read_10(0, 1), into=BLOCK).status == GOOD
    lib.scsi_shared_reset(unit.shared)
    for port in ports:
        assert port.run(b"\x12\0\0\0\x24\0", into=36).status == GOOD
        assert port.run(b"\x03\0\0\0\xfc\0", into=252).data[12:14] == b"\x29\x03"
        assert port.run(bytes(6)).status == GOOD


# --- REPORT LUNS, operation codes -----------------------------------------------------------------


def report_luns(select: int = 0, allocation: int = 4096) -> bytes:
    return struct.pack(">BBB3xIBB", 0xA0, 0, select, allocation, 0, 0)


def test_report_luns(unit: Unit, port: Port) -> None:
    assert port.add(unit, 200) == 0
    luns = [bytes(8), bytes([0, 200, *bytes(6)])]
    well_known = b"\xc1\1" + bytes(6)
    for select, expected in [(0, luns), (1, [well_known]), (2, [*luns, well_known]), (0x11, [])]:
        for lun in (0, 7, WELL_KNOWN):
            answer = port.run(report_luns(select), into=4096, lun=lun)
            assert answer.data == struct.pack(">I4x", 8 * len(expected)) + b"".join(expected)
    assert port.run(report_luns(3), into=64).field == (2, 7)
    assert port.run(report_luns(0, 15), into=64).field == (6, 7)


def test_well_known_unit_has_few_commands(port: Port) -> None:
    assert port.run(inquiry(), into=96, lun=WELL_KNOWN).data[0] == 0x1E
    assert port.run(bytes(6), lun=WELL_KNOWN).status == GOOD
    assert port.run(read_10(0, 1), into=BLOCK, lun=WELL_KNOWN).code == INVALID_OPCODE


def opcodes(option: int, opcode: int = 0, action: int = 0) -> bytes:
    return struct.pack(">BBBBHIBB", 0xA3, 0x0C, 0x80 | option, opcode, action, 8192, 0, 0)


def test_every_command_that_is_listed_is_described_and_known(port: Port) -> None:
    data = port.run(opcodes(0), into=8192).data
    assert (len(data) - 4) % 20 == 0
    listed = [data[at : at + 8] for at in range(4, len(data), 20)]
    assert len(listed) > 50
    for entry in listed:
        opcode, action = entry[0], int.from_bytes(entry[2:4], "big")
        size = int.from_bytes(entry[6:8], "big")
        one = port.run(opcodes(2 if entry[5] & 1 else 1, opcode, action), into=8192).data
        assert (one[1], int.from_bytes(one[2:4], "big")) == (0x83, size)
        usage = one[4 : 4 + size]
        assert usage[0] == opcode
        # A bit that the usage data does not have is refused, and pointed at.
        for byte in range(1, size):
            for bit in range(8):
                if not usage[byte] >> bit & 1 and not (byte == 1 and bit < 5 and entry[5] & 1):
                    cdb = bytearray(size)
                    cdb[0], cdb[1] = opcode, action if entry[5] & 1 else 0
                    cdb[byte] |= 1 << bit
                    assert port.run(bytes(cdb)).field == (byte, bit), cdb.hex()


def test_command_that_is_not_there_is_not_supported(port: Port) -> None:
    assert port.run(opcodes(1, 0xFF), into=64).data == b"\0\1\0\0"
    assert port.run(opcodes(3, 0x9E, 0x1F), into=64).data[1] == 1
    assert port.run(opcodes(1, 0x9E), into=64).field == (2, 2)
    assert port.run(opcodes(2, 0x28), into=64).field == (2, 2)


def test_task_management_functions(port: Port) -> None:
    cdb = struct.pack(">BBB3xIBB", 0xA3, 0x0D, 0, 16, 0, 0)
    assert port.run(cdb, into=16).data == b"\xfc\x03\0\0"


# --- order, and hostile input ---------------------------------------------------------------------


def test_ordered_task_waits_and_is_waited_for(unit: Unit, port: Port) -> None:
    first = port.prepare(write_10(0, 1), b"1" * BLOCK).start()
    ordered = port.prepare(read_10(0, 1), into=BLOCK, attribute=lib.SCSI_ORDERED).start()
    last = port.prepare(write_10(0, 1), b"2" * BLOCK).start()
    assert ordered.wait().data == b"1" * BLOCK
    assert first.done
    assert first.wait().status == last.wait().status == GOOD
    assert contents(port, 0, 1) == b"2" * BLOCK


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cdb=st.one_of(
        st.binary(min_size=1, max_size=32),
        st.builds(
            lambda op, rest: bytes([op, *rest]),
            st.sampled_from(b"\x00\x03\x08\x0a\x12\x15\x16\x17\x1a\x1b\x1e\x25\x28\x2a\x2e\x2f\x34\x35"
                            b"\x37\x41\x42\x4d\x55\x56\x57\x5a\x5e\x5f\x88\x89\x8a\x8b\x8e\x8f\x90\x91"
                            b"\x93\x9e\xa0\xa3\xa8\xaa\xae\xaf\xb7"),
            st.lists(st.sampled_from([0] * 12 + [1, 2, 8, 16, 24, 255]), min_size=15, max_size=15),
        ),
    ),
    size=st.integers(0, 4096),
    outwards=st.booleans(),
    lun=st.sampled_from([0, 0, 0, 1, WELL_KNOWN]),
    attribute=st.integers(0, 7),
)  # fmt: skip
def test_any_cdb_gets_a_well_formed_answer(
    port: Port, cdb: bytes, size: int, outwards: bool, lun: int, attribute: int
) -> None:
    """The unit of earlier examples is used again: whatever state they left it in."""
    lib.scsi_target_clear_aca(port.target, 0)
    out = os.urandom(size) if outwards else b""
    answer = port.run(cdb, out, into=0 if outwards else size, lun=lun, attribute=attribute)
    assert answer.status in (GOOD, CHECK_CONDITION, 0x18)
    assert (answer.status == CHECK_CONDITION) == bool(answer.sense)
    assert answer.overrun or answer.status != GOOD or answer.transferred <= size
    assert lib.scsi_target_in_flight(port.target) == 0


def test_shared_state_is_refused_when_it_is_something_else() -> None:
    fd = os.memfd_create("not a unit")
    assert lib.scsi_shared_map(fd) == ffi.NULL
    os.ftruncate(fd, lib.scsi_shared_size())
    assert lib.scsi_shared_map(fd) == ffi.NULL
    os.close(fd)
