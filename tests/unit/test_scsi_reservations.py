"""Reservations between initiators: SPC-5 sections 5.14, 6.16 and 6.17, and what SPC-2 had."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.native import CData, ffi, lib
from tests.support.scsi import (
    CONFLICT,
    GOOD,
    INVALID_FIELD,
    INVALID_LIST,
    LIST_LENGTH,
    UNIT_ATTENTION,
    Answer,
    Port,
    Unit,
)

BLOCK = 512
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, ABORT, IGNORE, MOVE = range(8)
WE, EA, WE_RO, EA_RO, WE_AR, EA_AR = 1, 3, 5, 6, 7, 8
KEY = {1: 0x11, 2: 0x22, 3: 0x33}

REGISTRATIONS_PREEMPTED = (UNIT_ATTENTION, 0x2A05)
RESERVATIONS_PREEMPTED = (UNIT_ATTENTION, 0x2A03)
RESERVATIONS_RELEASED = (UNIT_ATTENTION, 0x2A04)


@pytest.fixture
def unit(native: CData, ramdisk: CData) -> Iterator[Unit]:
    unit = Unit(native, ramdisk)
    yield unit
    unit.close()


@pytest.fixture
def ports(unit: Unit) -> list[Port]:
    """Three initiators, with an unused first place so that they are called 1, 2, 3."""
    first = unit.port(1, 1)
    return [first, first, unit.port(2, 2), unit.port(3, 3)]


def reserve_out(
    port: Port, action: int, key: int = 0, to: int = 0, kind: int = 0, flags: int = 0
) -> Answer:
    data = struct.pack(">QQ4xB3x", key, to, flags)
    return port.run(bytes([0x5F, action, kind, 0, 0, 0, 0, 0, len(data), 0]), data)


def reserve_in(port: Port, action: int) -> bytes:
    answer = port.run(bytes([0x5E, action, 0, 0, 0, 0, 0, 0x20, 0, 0]), into=8192)
    assert answer.status == GOOD
    assert len(answer.data) == 8 + int.from_bytes(answer.data[4:8], "big")
    return answer.data


def keys(port: Port) -> list[int]:
    data = reserve_in(port, 0)
    return [key for (key,) in struct.iter_unpack(">Q", data[8:])]


def reservation(port: Port) -> tuple[int, int] | None:
    """Return (key, type) of the reservation."""
    data = reserve_in(port, 1)[8:]
    return (int.from_bytes(data[:8], "big"), data[13]) if data else None


def generation(port: Port) -> int:
    return int.from_bytes(reserve_in(port, 0)[:4], "big")


def write(port: Port) -> Answer:
    return port.run(struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 1, 0), bytes(BLOCK))


def read(port: Port) -> Answer:
    return port.run(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0), into=BLOCK)


def register_all(ports: list[Port]) -> None:
    for number in KEY:
        assert reserve_out(ports[number], REGISTER, 0, KEY[number]).status == GOOD


def test_registering_takes_the_right_key(ports: list[Port]) -> None:
    port = ports[1]
    assert reserve_out(port, REGISTER, 5, 6).status == CONFLICT
    assert reserve_out(port, REGISTER, 0, 6).status == GOOD
    assert reserve_out(port, REGISTER, 0, 7).status == CONFLICT
    assert reserve_out(port, REGISTER, 6, 7).status == GOOD
    assert keys(ports[2]) == [7]
    assert reserve_out(port, IGNORE, 99, 8).status == GOOD
    assert keys(port) == [8]
    assert generation(port) == 3
    assert reserve_out(port, REGISTER, 8, 0).status == GOOD
    assert keys(port) == []


@pytest.mark.parametrize(
    ("kind", "holder", "registered", "other"),
    [
        (WE, "rw", "r", "r"),
        (EA, "rw", "", ""),
        (WE_RO, "rw", "rw", "r"),
        (EA_RO, "rw", "rw", ""),
        (WE_AR, "rw", "rw", "r"),
        (EA_AR, "rw", "rw", ""),
    ],
)
def test_who_may_do_what(
    ports: list[Port], kind: int, holder: str, registered: str, other: str
) -> None:
    for number in (1, 2):
        assert reserve_out(ports[number], REGISTER, 0, KEY[number]).status == GOOD
    assert reserve_out(ports[1], RESERVE, KEY[1], kind=kind).status == GOOD
    for port, may in [(ports[1], holder), (ports[2], registered), (ports[3], other)]:
        assert (read(port).status == GOOD) == ("r" in may)
        assert (write(port).status == GOOD) == ("w" in may)
        assert port.run(bytes(6)).status == GOOD
        assert port.run(b"\x12\0\0\0\x24\0", into=36).status == GOOD
        assert port.run(b"\x25" + bytes(9), into=8).status == GOOD
    assert reservation(ports[3]) == (0 if kind >= WE_AR else KEY[1], kind)


def test_only_registrants_reserve_and_only_one(ports: list[Port]) -> None:
    assert reserve_out(ports[1], RESERVE, 0, kind=WE).status == CONFLICT
    register_all(ports)
    assert reserve_out(ports[1], RESERVE, KEY[2], kind=WE).status == CONFLICT
    assert reserve_out(ports[1], RESERVE, KEY[1], kind=WE).status == GOOD
    assert reserve_out(ports[1], RESERVE, KEY[1], kind=WE).status == GOOD
    assert reserve_out(ports[1], RESERVE, KEY[1], kind=EA).status == CONFLICT
    assert reserve_out(ports[2], RESERVE, KEY[2], kind=WE).status == CONFLICT


@pytest.mark.parametrize("kind", [0, 2, 4, 9, 15, 0x11])
def test_types_and_scopes_that_there_are_not(ports: list[Port], kind: int) -> None:
    register_all(ports)
    assert reserve_out(ports[1], RESERVE, KEY[1], kind=kind).code == INVALID_FIELD
    assert reservation(ports[1]) is None


def test_release_tells_the_other_registrants(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=WE_RO)
    assert reserve_out(ports[2], RELEASE, KEY[2], kind=WE_RO).status == GOOD
    assert reservation(ports[1]) == (KEY[1], WE_RO)
    assert reserve_out(ports[1], RELEASE, KEY[1], kind=WE).code == (5, 0x2604)
    assert reserve_out(ports[1], RELEASE, KEY[1], kind=WE_RO).status == GOOD
    assert write(ports[1]).status == GOOD
    for number in (2, 3):
        assert write(ports[number]).code == RESERVATIONS_RELEASED
        assert write(ports[number]).status == GOOD


def test_reservation_ends_with_its_holders_registration(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=EA)
    assert reserve_out(ports[1], REGISTER, KEY[1], 0).status == GOOD
    assert reservation(ports[2]) is None


def test_reservation_of_all_registrants_ends_with_the_last(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=WE_AR)
    for number in (1, 2):
        assert reserve_out(ports[number], REGISTER, KEY[number], 0).status == GOOD
        assert reservation(ports[3]) == (0, WE_AR)
    assert write(ports[1]).status == CONFLICT
    assert reserve_out(ports[3], REGISTER, KEY[3], 0).status == GOOD
    assert reservation(ports[3]) is None


def test_clear(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=EA)
    assert reserve_out(ports[2], CLEAR, KEY[2]).status == GOOD
    assert (keys(ports[2]), reservation(ports[2])) == ([], None)
    assert write(ports[2]).status == GOOD
    for number in (1, 3):
        assert write(ports[number]).code == RESERVATIONS_PREEMPTED


@pytest.mark.parametrize("action", [PREEMPT, ABORT])
def test_preempting_the_holder_takes_its_reservation(ports: list[Port], action: int) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=WE_RO)
    assert reserve_out(ports[2], action, KEY[2], KEY[1], kind=WE_RO).status == GOOD
    assert (sorted(keys(ports[2])), reservation(ports[2])) == ([KEY[2], KEY[3]], (KEY[2], WE_RO))
    assert write(ports[1]).code == REGISTRATIONS_PREEMPTED
    assert write(ports[1]).status == CONFLICT
    assert read(ports[1]).status == GOOD
    assert write(ports[3]).status == GOOD


def test_preempting_another_leaves_the_reservation(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=WE_RO)
    assert reserve_out(ports[2], PREEMPT, KEY[2], KEY[3]).status == GOOD
    assert reservation(ports[2]) == (KEY[1], WE_RO)
    assert write(ports[3]).code == REGISTRATIONS_PREEMPTED
    assert write(ports[3]).status == CONFLICT


def test_preempting_a_key_that_nobody_has(ports: list[Port]) -> None:
    register_all(ports)
    before = generation(ports[1])
    assert reserve_out(ports[1], PREEMPT, KEY[1], 0x99).status == CONFLICT
    answer = reserve_out(ports[1], PREEMPT, KEY[1], 0)
    assert (answer.code, answer.field) == (INVALID_LIST, (8, None))
    assert (len(keys(ports[1])), generation(ports[1])) == (3, before)


def test_preempt_of_all_registrants(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[1], RESERVE, KEY[1], kind=EA_AR)
    assert reserve_out(ports[3], PREEMPT, KEY[3], 0, kind=WE).status == GOOD
    assert (keys(ports[3]), reservation(ports[3])) == ([KEY[3]], (KEY[3], WE))
    assert write(ports[2]).code == REGISTRATIONS_PREEMPTED


def test_preempt_and_abort_waits_for_what_is_in_flight(native: CData, filedisk: CData) -> None:
    unit = Unit(native, filedisk)
    first, second = unit.port(1, 1), unit.port(2, 2)
    for number, port in ((1, first), (2, second)):
        reserve_out(port, REGISTER, 0, KEY[number])
    reserve_out(first, RESERVE, KEY[1], kind=WE_RO)
    data = struct.pack(">QQ8x", KEY[2], KEY[1])
    cdb = bytes([0x5F, ABORT, WE_RO, 0, 0, 0, 0, 0, 24, 0])
    writes = [
        first.prepare(struct.pack(">BBIBHB", 0x2A, 8, i, 0, 1, 0), bytes(BLOCK)).start()
        for i in range(16)
    ]
    assert not any(one.done for one in writes)
    assert second.prepare(cdb, data).start().wait().status == GOOD
    assert all(one.done for one in writes)
    for one in writes:
        assert one.wait().status == GOOD
    unit.close()


def move(port: Port, key: int, to_key: int, initiator: int, number: int, unreg: bool) -> Answer:
    head = struct.pack(">QQBBHI", key, to_key, 0, 2 if unreg else 0, number, 24)
    data = head + struct.pack(">B3xQ12x", 6, initiator)
    return port.run(bytes([0x5F, MOVE, 0, 0, 0, 0, 0, 0, len(data), 0]), data)


@pytest.mark.parametrize("unreg", [False, True])
def test_register_and_move(ports: list[Port], unreg: bool) -> None:
    reserve_out(ports[1], REGISTER, 0, KEY[1])
    reserve_out(ports[1], RESERVE, KEY[1], kind=WE)
    assert move(ports[2], KEY[1], 0x77, 3, 3, unreg).status == CONFLICT
    assert move(ports[1], KEY[1], 0, 3, 3, unreg).code == INVALID_LIST
    assert move(ports[1], KEY[1], 0x77, 9, 9, unreg).code == INVALID_LIST
    assert move(ports[1], KEY[1], 0x77, 3, 3, unreg).status == GOOD
    assert reservation(ports[1]) == (0x77, WE)
    assert sorted(keys(ports[1])) == ([0x77] if unreg else [KEY[1], 0x77])
    assert write(ports[3]).status == GOOD
    assert write(ports[1]).status == CONFLICT


def test_full_status_names_every_registrant(ports: list[Port]) -> None:
    register_all(ports)
    reserve_out(ports[2], RESERVE, KEY[2], kind=EA)
    data = reserve_in(ports[1], 3)[8:]
    found = {}
    for at in range(0, len(data), 48):
        key, flags, kind, port, size, initiator = struct.unpack_from(">Q4xBB4xHI4xQ", data, at)
        assert size == 24
        found[initiator] = (key, flags, kind, port)
    assert found == {1: (0x11, 0, 0, 1), 2: (0x22, 1, EA, 2), 3: (0x33, 0, 0, 3)}


def test_capabilities(ports: list[Port]) -> None:
    answer = ports[1].run(bytes([0x5E, 2, 0, 0, 0, 0, 0, 0, 8, 0]), into=8)
    assert answer.data == bytes([0, 8, 0, 0x80, 0xEA, 1, 0, 0])


@pytest.mark.parametrize(
    ("length", "flags", "code"),
    [(23, 0, LIST_LENGTH), (25, 0, LIST_LENGTH), (24, 8, INVALID_LIST), (24, 4, INVALID_LIST)],
)
def test_lists_that_are_refused(
    ports: list[Port], length: int, flags: int, code: tuple[int, int]
) -> None:
    data = struct.pack(">QQ4xB3x", 0, 5, flags).ljust(length, b"\0")[:length]
    assert ports[1].run(bytes([0x5F, 0, 0, 0, 0, 0, 0, 0, length, 0]), data).code == code
    assert keys(ports[1]) == []


# --- RESERVE and RELEASE --------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0x16, 0x56])
def test_reserve_keeps_others_out_until_release(ports: list[Port], opcode: int) -> None:
    size = 6 if opcode == 0x16 else 10
    reserve, release = bytes([opcode]).ljust(size, b"\0"), bytes([opcode + 1]).ljust(size, b"\0")
    assert ports[1].run(reserve).status == GOOD
    assert write(ports[1]).status == GOOD
    for cdb in (reserve, bytes(6), b"\x5e" + bytes(6) + b"\x10\0\0"):
        assert ports[2].run(cdb, into=16 if cdb[0] == 0x5E else 0).status == CONFLICT
    assert read(ports[2]).status == write(ports[2]).status == CONFLICT
    assert ports[2].run(b"\x12\0\0\0\x24\0", into=36).status == GOOD
    assert ports[2].run(release).status == GOOD
    assert write(ports[2]).status == CONFLICT
    assert ports[1].run(release).status == GOOD
    assert write(ports[2]).status == GOOD


def test_reserve_ends_with_its_nexus_or_a_reset(unit: Unit, ports: list[Port]) -> None:
    for end in (
        lambda: lib.scsi_shared_nexus_lost(
            unit.shared, 1, 0x3000_0000_0000_0101, lib.SCSI_ATTENTION_NEXUS_LOSS
        ),
        lambda: lib.scsi_shared_reset(unit.shared),
    ):
        assert ports[1].run(b"\x16" + bytes(5)).status == GOOD
        assert write(ports[2]).status == CONFLICT
        end()
        write(ports[2])
        assert write(ports[2]).status == GOOD
        ports[1].run(bytes(6))


def test_reserve_conflicts_with_registrations(ports: list[Port]) -> None:
    reserve_out(ports[1], REGISTER, 0, KEY[1])
    for number in (1, 2):
        assert ports[number].run(b"\x16" + bytes(5)).status == CONFLICT
        assert ports[number].run(b"\x17" + bytes(5)).status == CONFLICT


# --- state that outlives its reactor --------------------------------------------------------------


def test_registrations_are_kept_and_restored(native: CData, ramdisk: CData, unit: Unit) -> None:
    ports = [unit.port(1, 1), unit.port(2, 2)]
    for number, port in enumerate(ports, 1):
        reserve_out(port, REGISTER, 0, KEY[number])
    reserve_out(ports[0], RESERVE, KEY[1], kind=EA)
    items = ffi.new("struct scsi_registration[]", lib.SCSI_MAX_NEXUSES)
    snapshot = ffi.new("struct scsi_snapshot *")
    lib.scsi_shared_registrations(unit.shared, items, snapshot)
    assert snapshot.count == 2
    other = Unit(native, ramdisk)
    assert lib.scsi_shared_restore(other.shared, items, 2) == 0
    first, second = other.port(1, 1), other.port(2, 2)
    assert (keys(second), reservation(second)) == ([KEY[1], KEY[2]], (KEY[1], EA))
    assert generation(second) == 0
    assert write(second).status == CONFLICT
    assert write(first).status == GOOD
    other.close()


ACTION = st.tuples(
    st.integers(1, 3),
    st.sampled_from([REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, ABORT, IGNORE]),
    st.sampled_from([0, 0x11, 0x22, 0x33]),
    st.sampled_from([0, 0x11, 0x22, 0x33]),
    st.sampled_from([WE, EA, WE_RO, EA_RO, WE_AR, EA_AR, 2]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTION, max_size=20))
def test_whatever_is_asked_the_state_stays_sound(
    ports: list[Port], actions: list[tuple[int, int, int, int, int]]
) -> None:
    for number, action, key, to, kind in actions:
        reserve_out(ports[number], action, key, to, kind)
        for port in ports[1:]:
            while port.run(bytes(6)).status not in (GOOD, CONFLICT):
                pass
        held = reservation(ports[1])
        registered = keys(ports[1])
        if held is not None:
            assert registered
            assert held[1] in (WE, EA, WE_RO, EA_RO, WE_AR, EA_AR)
            assert held[0] in registered or held[1] >= WE_AR
        elif not registered:
            assert all(write(port).status == GOOD for port in ports[1:])
        # Whoever is left out can always be let in again by someone.
        assert any(write(port).status == GOOD for port in ports[1:])
