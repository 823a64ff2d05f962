"""Nexuses that a unit knows, and forgets when nothing is left of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from reactor.native import CData, lib
from tests.support.scsi import CONFLICT, GOOD, Port, Unit

TARGET = 0x3000_0000_0000_0101  # of tests.support.scsi.Port number 1
READY = bytes(6)


@pytest.fixture
def unit(native: CData, ramdisk: CData) -> Iterator[Unit]:
    unit = Unit(native, ramdisk)
    yield unit
    unit.close()


def leave(unit: Unit, port: Port, initiator: int) -> None:
    unit.ports.remove(port)
    port.close()
    lib.scsi_shared_nexus_gone(unit.shared, initiator, TARGET)


def reserve_out(port: Port, action: int, key: int, to: int = 0, kind: int = 0) -> int:
    data = struct.pack(">QQ8x", key, to)
    return port.run(bytes([0x5F, action, kind, 0, 0, 0, 0, 0, len(data), 0]), data).status


def test_any_number_of_initiators_come_and_go(unit: Unit) -> None:
    for initiator in range(1, 2 * lib.SCSI_MAX_NEXUSES):
        leave(unit, unit.port(initiator), initiator)
    assert lib.scsi_shared_nexuses(unit.shared) == 0


def test_more_than_there_is_room_for_are_refused(unit: Unit) -> None:
    for initiator in range(1, lib.SCSI_MAX_NEXUSES + 1):
        unit.port(initiator)
    port = Port(unit.reactor, None, 9999, 1)
    assert port.add(unit, 0) == -28
    leave(unit, unit.ports[7], 8)
    assert port.add(unit, 0) == 0
    port.close()


def test_registration_keeps_a_nexus_until_it_is_taken_away(unit: Unit) -> None:
    gone, here = unit.port(1), unit.port(2)
    assert reserve_out(gone, 0, 0, 0x11) == GOOD
    assert reserve_out(gone, 1, 0x11, kind=1) == GOOD
    leave(unit, gone, 1)
    assert lib.scsi_shared_nexuses(unit.shared) == 2
    write = struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 1, 0)
    assert here.run(write, bytes(512)).status == CONFLICT
    assert reserve_out(here, 0, 0, 0x22) == GOOD
    assert reserve_out(here, 4, 0x22, 0x11, kind=1) == GOOD
    assert lib.scsi_shared_nexuses(unit.shared) == 1
    back = unit.port(1)
    assert back.run(READY).status == GOOD
    assert lib.scsi_shared_nexuses(unit.shared) == 2


def test_reserve_of_one_that_has_gone_is_no_more(unit: Unit) -> None:
    gone, here = unit.port(1), unit.port(2)
    assert gone.run(b"\x16" + bytes(5)).status == GOOD
    assert here.run(READY).status == CONFLICT
    leave(unit, gone, 1)
    assert here.run(READY).status == GOOD
