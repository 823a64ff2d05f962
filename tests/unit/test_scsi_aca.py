"""Auto contingent allegiance: SAM-6 section 5.10, of a nexus whose command had NACA and failed."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from reactor.native import CData, lib
from tests.support.scsi import GOOD, OUT_OF_RANGE, Port, Unit

ACTIVE = 0x30
ACA = 3  # task attribute
READY, INQUIRY = bytes(6), b"\x12\0\0\0\x24\0"
INVALID_MESSAGE = (5, 0x4900)


def read(lba: int, control: int = 0) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, 1, control)


@pytest.fixture
def unit(native: CData, ramdisk: CData) -> Iterator[Unit]:
    unit = Unit(native, ramdisk)
    yield unit
    unit.close()


@pytest.fixture
def port(unit: Unit) -> Port:
    """A port whose last command has failed, with NACA."""
    port = unit.port()
    assert port.run(read(1 << 30, control=4), into=512).code == OUT_OF_RANGE
    return port


def clear(port: Port) -> None:
    lib.scsi_target_clear_aca(port.target, 0)


def test_without_naca_there_is_none(unit: Unit) -> None:
    port = unit.port()
    assert port.run(read(0, control=4), into=512).status == GOOD
    assert port.run(read(1 << 30), into=512).code == OUT_OF_RANGE
    assert port.run(READY).status == GOOD
    assert port.run(READY, attribute=ACA).code == INVALID_MESSAGE


def test_commands_wait_for_the_initiator_to_clear_it(port: Port) -> None:
    for cdb, into in ((READY, 0), (INQUIRY, 36), (read(0), 512)):
        assert port.run(cdb, into=into).status == ACTIVE
    clear(port)
    for cdb, into in ((READY, 0), (INQUIRY, 36), (read(0), 512)):
        assert port.run(cdb, into=into).status == GOOD


def test_commands_with_the_attribute_are_carried_out(port: Port) -> None:
    assert port.run(read(0), into=512, attribute=ACA).status == GOOD
    assert port.run(READY).status == ACTIVE


def test_other_nexuses_have_task_sets_of_their_own(unit: Unit, port: Port) -> None:
    assert port.run(READY).status == ACTIVE
    assert unit.port(2, 2).run(READY).status == GOOD


def test_reservations_hold_for_its_commands_too(unit: Unit, port: Port) -> None:
    assert unit.port(2, 2).run(b"\x16" + bytes(5)).status == GOOD
    assert port.run(read(0), into=512, attribute=ACA).status == 0x18
    assert port.run(read(0), into=512).status == ACTIVE


def test_unit_attention_waits_for_it_to_be_cleared(unit: Unit, port: Port) -> None:
    lib.scsi_shared_attention(unit.shared, lib.SCSI_ATTENTION_MODE_CHANGED, -1)
    assert port.run(READY).status == ACTIVE
    assert port.run(READY, attribute=ACA).status == GOOD
    clear(port)
    assert port.run(READY).code == (6, 0x2A01)


@pytest.mark.parametrize("end", ["reset", "nexus"])
def test_resets_clear_it(unit: Unit, port: Port, end: str) -> None:
    if end == "reset":
        lib.scsi_shared_reset(unit.shared)
    else:
        lib.scsi_target_nexus_reset(port.target)
    assert port.run(READY).code in ((6, 0x2903), (6, 0x2907))
    assert port.run(READY).status == GOOD


@pytest.mark.parametrize(
    "cdb", [bytes([0xC0]) + bytes(5), b"\x01" + bytes(4) + b"\4", b"\x44" + bytes(8) + b"\4"]
)
def test_commands_that_there_are_not_have_a_control_byte_too(unit: Unit, cdb: bytes) -> None:
    port = unit.port()
    assert port.run(cdb).code == (5, 0x2000)
    assert port.run(READY).status == (ACTIVE if cdb[-1] else GOOD)
