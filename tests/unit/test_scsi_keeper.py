"""Files of persistent reservations (scsi/keeper.py), and commands that wait for them (keep.c)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reactor.native import CData, ffi, lib
from scsi.keeper import DamagedError, Registration, ReservationStore
from scsi.units import snapshot
from tests.support.scsi import GOOD, HARDWARE_ERROR, INVALID_LIST, Pending, Port, Unit

UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "11234567-89ab-cdef-0123-456789abcdef"
KEPT = [Registration(1, 10, 0x11, 1, 5), Registration(2, 11, (1 << 64) - 1, 2)]
APTPL = 1


@pytest.fixture
def store(tmp_path: Path) -> ReservationStore:
    return ReservationStore(tmp_path / "made" / "when needed")


def save(store: ReservationStore, registrations: list[Registration] = KEPT) -> None:
    store.save(UUID, registrations, store.ticket())


def test_what_was_saved_is_loaded(store: ReservationStore) -> None:
    assert store.load(UUID) == []
    save(store)
    assert ReservationStore(store.directory).load(UUID) == KEPT
    assert os.listdir(store.directory) == [f"{UUID}.json"]
    assert store.path(UUID).stat().st_mode & 0o777 == 0o600


def test_file_goes_with_the_last_registration(store: ReservationStore) -> None:
    save(store, [])
    assert not store.directory.exists()
    save(store)
    save(store, [])
    assert os.listdir(store.directory) == []
    assert store.load(UUID) == []


def test_an_older_state_never_replaces_a_newer_one(store: ReservationStore) -> None:
    older = store.ticket()
    save(store)
    store.save(UUID, KEPT[:1], older)
    assert store.load(UUID) == KEPT


def test_file_that_cannot_be_replaced_stays(store: ReservationStore) -> None:
    save(store)
    store.path(UUID).with_suffix(".new").mkdir()
    with pytest.raises(OSError, match="directory"):
        save(store, KEPT[:1])
    assert store.load(UUID) == KEPT


def changed(document: dict[str, object], **fields: object) -> bytes:
    return json.dumps({**document, **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": 2}, "version 2"),
        ({"uuid": OTHER}, "checksum"),
        ({"registrations": []}, "checksum"),
        ({"crc32": 1}, "checksum"),
        ({"crc32": 1 << 70}, "checksum"),
        ({"more": 1}, "not a file of reservations"),
        ({"registrations": "many"}, "not a file of reservations"),
    ],
)
def test_file_that_was_changed_is_refused(
    store: ReservationStore, fields: dict[str, object], why: str
) -> None:
    save(store)
    document = json.loads(store.path(UUID).read_bytes())
    store.path(UUID).write_bytes(changed(document, **fields))
    with pytest.raises(DamagedError, match=why):
        store.load(UUID)


def test_file_of_another_bdev_is_refused(store: ReservationStore) -> None:
    save(store)
    os.rename(store.path(UUID), store.path(OTHER))
    with pytest.raises(DamagedError, match=f"of bdev {UUID}"):
        store.load(OTHER)


@pytest.mark.parametrize(
    "impossible",
    [
        [Registration(1, 10, 0, 1)],
        [Registration(1, 10, 5, 1), Registration(1, 10, 6, 1)],
        [Registration(1, 10, 5, 1, 5), Registration(2, 10, 6, 1, 5)],
        [Registration(1, 10, 5, 1, 2)],
        [Registration(1, 10, 5, 70000)],
        [Registration(-1, 10, 5, 1)],
        [Registration(n, 10, 5, 1) for n in range(lib.SCSI_MAX_NEXUSES + 1)],
    ],
    ids=["key", "twice", "holders", "type", "port", "address", "many"],
)
def test_registrations_that_cannot_be_are_refused(
    store: ReservationStore, impossible: list[Registration]
) -> None:
    save(store, impossible)
    with pytest.raises(DamagedError):
        store.load(UUID)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 399), data=st.binary(max_size=8), cut=st.integers(0, 8))
def test_damage_of_any_kind_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, data: bytes, cut: int
) -> None:
    store = ReservationStore(tmp_path_factory.mktemp("store"))
    save(store)
    whole = store.path(UUID).read_bytes()
    at %= len(whole)
    store.path(UUID).write_bytes(whole[:at] + data + whole[at + cut :])
    with suppress(DamagedError):
        assert store.load(UUID) == KEPT  # white space, say


# --- commands that wait ---------------------------------------------------------------------------


@pytest.fixture
def unit(native: CData, ramdisk: CData) -> Iterator[Unit]:
    unit = Unit(native, ramdisk)
    unit.keeper = os.eventfd(0, os.EFD_NONBLOCK)
    yield unit
    os.close(unit.keeper)
    unit.close()


def register(port: Port, key: int, to: int, flags: int = APTPL, **rest: object) -> Pending:
    data = struct.pack(">QQ4xB3x", key, to, flags)
    return port.prepare(bytes([0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0]), data, **rest).start()


def turn(unit: Unit) -> None:
    events = ffi.new("struct reactor_event[]", 4)
    for _ in range(20):
        lib.reactor_poll(unit.reactor, 100_000, events, 4)


def test_command_ends_when_its_change_is_on_disk(unit: Unit) -> None:
    port = unit.port()
    pending = register(port, 0, 5)
    turn(unit)
    assert not pending.done
    assert os.eventfd_read(unit.keeper) == 1
    number, registrations = snapshot(unit.shared)
    assert [one.key for one in registrations] == [5]
    lib.scsi_shared_kept(unit.shared, number, False)
    assert pending.wait().status == GOOD
    assert port.run(bytes([0x5E, 2, 0, 0, 0, 0, 0, 0, 8, 0]), into=8).data[2:4] == b"\1\x81"


def test_command_fails_when_its_change_cannot_be_written(unit: Unit) -> None:
    port = unit.port()
    pending = register(port, 0, 5)
    lib.scsi_shared_kept(unit.shared, snapshot(unit.shared)[0], True)
    assert pending.wait().code == (HARDWARE_ERROR, 0x4400)
    again = register(port, 5, 6)
    assert not again.done
    lib.scsi_shared_kept(unit.shared, snapshot(unit.shared)[0], False)
    assert again.wait().status == GOOD


def test_without_aptpl_nothing_waits_and_nothing_is_kept(unit: Unit) -> None:
    port = unit.port()
    assert register(port, 0, 5, flags=0).wait().status == GOOD
    assert snapshot(unit.shared) == (0, [])


def test_registering_without_aptpl_ends_it(unit: Unit) -> None:
    port = unit.port()
    first = register(port, 0, 5)
    lib.scsi_shared_kept(unit.shared, snapshot(unit.shared)[0], False)
    assert first.wait().status == GOOD
    last = register(port, 5, 6, flags=0)
    number, registrations = snapshot(unit.shared)
    assert (number, registrations, last.done) == (2, [], False)
    lib.scsi_shared_kept(unit.shared, number, False)
    assert last.wait().status == GOOD


def test_where_nothing_keeps_reservations_aptpl_is_refused(native: CData, ramdisk: CData) -> None:
    unit = Unit(native, ramdisk)
    answer = register(unit.port(), 0, 5).wait()
    assert (answer.code, answer.field) == (INVALID_LIST, (20, 0))
    unit.close()


def test_command_that_comes_again_is_not_done_twice_and_waits_for_the_disk(unit: Unit) -> None:
    """As after the death of the reactor that has changed the state and not answered."""
    port = unit.port()
    first = register(port, 0, 5, tag=9)
    assert not first.done
    again = register(port, 0, 5, tag=9, again=True)
    assert not again.done
    number, registrations = snapshot(unit.shared)
    assert [one.key for one in registrations] == [5]
    lib.scsi_shared_kept(unit.shared, number, False)
    assert (first.wait().status, again.wait().status) == (GOOD, GOOD)
    assert register(port, 0, 5, tag=9).wait().status == 0x18
