"""COMPARE AND WRITE when the process that carries it out dies in the middle."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor.native import CData, ffi, lib
from tests.support.scsi import GOOD, MISCOMPARE, Port, Unit
from tests.unit.conftest import DISK_BLOCKS

BLOCK = 512
OLD, NEW, NEWER = b"o" * BLOCK, b"n" * BLOCK, b"N" * BLOCK
COMPARE_AND_WRITE = struct.pack(">BBQ3xBBB", 0x89, 0, 8, 1, 0, 0)
WRITE = struct.pack(">BBIBHB", 0x2A, 0, 8, 0, 1, 0)
READ = struct.pack(">BBIBHB", 0x28, 0, 8, 0, 1, 0)


@pytest.fixture
def unit(native: CData, ramdisk: CData) -> Iterator[Unit]:
    unit = Unit(native, ramdisk)
    yield unit
    unit.close()


@pytest.fixture
def port(unit: Unit) -> Port:
    port = unit.port()
    assert port.run(WRITE, OLD).status == GOOD
    return port


def leave_intent(unit: Unit, *, tag: int, data: bytes, state: int) -> None:
    """Leave what a process leaves that dies after its comparison has succeeded."""
    intent = lib.scsi_shared_intent(unit.shared)
    intent.nexus, intent.tag, intent.offset, intent.length = 0, tag, 8 * BLOCK, BLOCK
    ffi.memmove(intent.data, data, len(data))
    intent.state = state


def contents(port: Port) -> bytes:
    return port.run(READ, into=BLOCK).data


def test_write_that_was_promised_happens_before_anything_else(unit: Unit, port: Port) -> None:
    leave_intent(unit, tag=5, data=NEW, state=lib.SCSI_INTENT_PENDING)
    assert port.run(COMPARE_AND_WRITE, OLD + NEWER, tag=6).code == (MISCOMPARE, 0x1D00)
    assert contents(port) == NEW
    assert port.run(COMPARE_AND_WRITE, NEW + NEWER, tag=7).status == GOOD
    assert contents(port) == NEWER


def test_command_that_comes_again_is_told_that_it_was_done(unit: Unit, port: Port) -> None:
    leave_intent(unit, tag=5, data=NEW, state=lib.SCSI_INTENT_PENDING)
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5, again=True).status == GOOD
    assert contents(port) == NEW


def test_command_that_was_done_and_not_answered(unit: Unit, port: Port) -> None:
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5).status == GOOD
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5, again=True).status == GOOD
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5).code == (MISCOMPARE, 0x1D00)
    assert contents(port) == NEW


def test_command_that_had_not_compared_compares_when_it_comes_again(port: Port) -> None:
    assert port.run(COMPARE_AND_WRITE, NEW + NEWER, tag=5, again=True).status != GOOD
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=6, again=True).status == GOOD
    assert contents(port) == NEW


def test_turn_of_a_process_that_died_is_taken_over(
    native: CData, filedisk: CData, tmp_path: Path
) -> None:
    """A child has its turn, and the file's I/O in flight, when it dies."""
    unit = Unit(native, filedisk)
    port = unit.port(1)
    assert port.run(WRITE, OLD).status == GOOD
    child = os.fork()
    if child == 0:
        os._exit(_die_in_the_middle(unit, tmp_path / "disk"))
    assert os.waitpid(child, 0)[1] == 0
    assert port.run(COMPARE_AND_WRITE, OLD + NEW).status == GOOD
    assert contents(port) == NEW
    unit.close()


def _die_in_the_middle(unit: Unit, path: Path) -> int:
    reactor = lib.reactor_create(lib.REACTOR_NEVER, 0, ffi.NULL, 0)
    setup = {
        "fd": os.open(path, os.O_RDWR),
        "block_size": BLOCK,
        "block_count": DISK_BLOCKS,
        "memory_alignment": 1,
        "offset_alignment": 1,
    }
    disk = lib.file_bdev_open(reactor, 1, 0, ffi.new("struct file_setup *", setup))
    if ffi.NULL in (reactor, disk):
        return 1
    unit.reactor, unit.bdev = reactor, disk
    unit.shared = lib.scsi_shared_map(unit.fd)
    other = Port(reactor, unit, 2, 2)
    other.reactor = reactor
    lib.scsi_target_attention(other.target, -1, lib.SCSI_ATTENTION_POWER_ON)
    other.run(bytes(6))
    pending = other.prepare(COMPARE_AND_WRITE, OLD + NEWER).start()
    return 2 if pending.done else 0
