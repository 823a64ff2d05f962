"""COMPARE AND WRITE when the process that carries it out dies in the middle."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdev.shared import Shared
from reactor.native import CData, ffi, lib
from tests.support.scsi import GOOD, MISCOMPARE, Port, Unit
from tests.unit.conftest import DISK_BLOCKS

BLOCK = 512
OLD, NEW, NEWER = b"o" * BLOCK, b"n" * BLOCK, b"N" * BLOCK
COMPARE_AND_WRITE = struct.pack(">BBQ3xBBB", 0x89, 0, 8, 1, 0, 0)
WRITE = struct.pack(">BBIBHB", 0x2A, 0, 8, 0, 1, 0)
TAG = 5
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


def contents(port: Port) -> bytes:
    return port.run(READ, into=BLOCK).data


def test_command_that_was_done_and_not_answered(unit: Unit, port: Port) -> None:
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5).status == GOOD
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5, again=True).status == GOOD
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=5).code == (MISCOMPARE, 0x1D00)
    assert contents(port) == NEW


def test_command_that_had_not_compared_compares_when_it_comes_again(port: Port) -> None:
    assert port.run(COMPARE_AND_WRITE, NEW + NEWER, tag=5, again=True).status != GOOD
    assert port.run(COMPARE_AND_WRITE, OLD + NEW, tag=6, again=True).status == GOOD
    assert contents(port) == NEW


def test_write_that_was_promised_happens_before_anything_else(
    native: CData, filedisk: CData, tmp_path: Path
) -> None:
    """A child dies in the write; who opens the disk next does it, and knows the command."""
    unit = Unit(native, filedisk)
    first = unit.port(1)
    assert first.run(WRITE, OLD).status == GOOD
    die_in_the_middle(unit, tmp_path / "disk", turns=1)
    assert unit.ranges.owner_gone(1) == 1
    lib.bdev_ranges_repair(filedisk)
    assert first.run(COMPARE_AND_WRITE, OLD + NEW, tag=6).code == (MISCOMPARE, 0x1D00)
    assert contents(first) == NEWER
    assert first.run(COMPARE_AND_WRITE, OLD + NEWER, tag=TAG, again=True).status == GOOD
    assert first.run(COMPARE_AND_WRITE, NEWER + NEW, tag=7).status == GOOD
    unit.close()


def test_range_of_a_process_that_died_is_free_again(
    native: CData, filedisk: CData, tmp_path: Path
) -> None:
    """A child has locked it, and is reading, when it dies."""
    unit = Unit(native, filedisk)
    port = unit.port(1)
    assert port.run(WRITE, OLD).status == GOOD
    die_in_the_middle(unit, tmp_path / "disk", turns=0)
    assert unit.ranges.used == 1
    assert unit.ranges.owner_gone(1) == 0
    assert port.run(COMPARE_AND_WRITE, OLD + NEW).status == GOOD
    assert contents(port) == NEW
    unit.close()


def die_in_the_middle(unit: Unit, path: Path, *, turns: int) -> None:
    """Have a child, owner 1, begin COMPARE AND WRITE, and die after so many requests of it."""
    child = os.fork()
    if child == 0:
        os._exit(_begin(unit, path, turns))
    assert os.waitpid(child, 0)[1] == 0


def _begin(unit: Unit, path: Path, turns: int) -> int:
    """Return 0 if the command is under way after ``turns`` of its requests have ended."""
    reactor = lib.reactor_create(lib.REACTOR_NEVER, 0, ffi.NULL, 0)
    fd = os.open(path, os.O_RDWR)
    setup = {
        "fd": fd,
        "block_size": BLOCK,
        "block_count": DISK_BLOCKS,
        "memory_alignment": 1,
        "offset_alignment": 1,
    }
    file = lib.file_bdev_open(reactor, 1, 0, ffi.new("struct file_setup *", setup))
    rules = Shared("rules", "struct error_rules")
    disk = lib.error_bdev_open(2, 0, DISK_BLOCKS, file, rules.fd, 1)
    if ffi.NULL in (reactor, file, disk) or lib.bdev_set_ranges(disk, unit.ranges.fd, 1) < 0:
        return 1
    hang = rules.struct.rule[lib.BDEV_WRITE if turns else lib.BDEV_READ]
    hang.left, hang.type = lib.ERROR_NO_END, lib.ERROR_PENDING
    unit.reactor, unit.bdev = reactor, disk
    unit.shared = lib.scsi_shared_map(unit.fd)
    # The same initiator, by the same port: the same nexus.
    other = Port(reactor, unit, 1, 1)
    other.run(bytes(6))
    pending = other.prepare(COMPARE_AND_WRITE, OLD + NEWER, tag=TAG).start()
    events = ffi.new("struct reactor_event[]", 4)
    for _ in range(20):
        lib.reactor_poll(reactor, 1_000_000, events, 4)
    return 2 if pending.done else 0
