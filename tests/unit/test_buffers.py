"""Registered buffers: what the io_uring has registered is used where it can be, not elsewhere."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdev.memory import RegisteredMemory
from reactor.native import CData, ffi, lib
from tests.support.bdevs import LocalDisk, file_disk, pages

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LocalDisk]:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    disk = file_disk(path)
    yield disk
    disk.close()


@pytest.fixture
def memory(disk: LocalDisk) -> Iterator[mmap.mmap]:
    """Memory of which the first half is registered."""
    memory = pages(SIZE)
    assert lib.file_buffer_add(disk.selector.native, address(memory), SIZE // 2) == 0
    yield memory
    assert lib.file_buffer_remove(disk.selector.native, address(memory)) == 0


def address(memory: mmap.mmap, offset: int = 0) -> CData:
    return ffi.from_buffer(memory) + offset


def part(memory: mmap.mmap, offset: int, length: int) -> memoryview:
    return memoryview(memory)[offset : offset + length]


def uses(disk: LocalDisk) -> int:
    return int(lib.file_buffer_uses(disk.selector.native))


def test_a_buffer_inside_is_used_for_reading_and_writing(
    disk: LocalDisk, memory: mmap.mmap
) -> None:
    data = os.urandom(8192)
    memory[4096:12288] = data
    disk.io.write(0, part(memory, 4096, 8192))
    disk.io.read_into(0, part(memory, SIZE // 2 - 8192, 8192))
    assert memory[SIZE // 2 - 8192 : SIZE // 2] == data
    assert uses(disk) == 2


@pytest.mark.parametrize("offset", [SIZE // 2 - 4096, SIZE // 2, SIZE - 8192])
def test_a_buffer_that_is_not_all_inside_goes_the_usual_way(
    disk: LocalDisk, memory: mmap.mmap, offset: int
) -> None:
    data = disk.io.read(0, 8192)
    disk.io.read_into(0, part(memory, offset, 8192))
    assert memory[offset : offset + 8192] == data
    assert uses(disk) == 0


def test_an_unaligned_buffer_goes_through_a_bounce_buffer(
    disk: LocalDisk, memory: mmap.mmap
) -> None:
    data = disk.io.read(0, 4096)
    disk.io.read_into(0, part(memory, 1, 4096))
    assert memory[1:4097] == data
    assert uses(disk) == 0


def test_ranges_in_any_order_are_found_and_removed(disk: LocalDisk) -> None:
    memory = pages(64 * 4096)
    order = [(7 * i + 3) % 32 for i in range(32)]
    for place in order:
        assert lib.file_buffer_add(disk.selector.native, address(memory, place * 8192), 4096) == 0
    for place in range(32):
        disk.io.read_into(0, part(memory, place * 8192, 4096))
    assert uses(disk) == 32
    for place in order[:16]:
        assert lib.file_buffer_remove(disk.selector.native, address(memory, place * 8192)) == 0
    for place in range(32):
        disk.io.read_into(0, part(memory, place * 8192, 4096))
    assert uses(disk) == 48
    for place in order[16:]:
        assert lib.file_buffer_remove(disk.selector.native, address(memory, place * 8192)) == 0


def test_what_cannot_be_registered_is_refused(disk: LocalDisk, memory: mmap.mmap) -> None:
    def add(offset: int, size: int) -> int:
        return int(lib.file_buffer_add(disk.selector.native, address(memory, offset), size))

    assert add(0, 4096) == -errno.EEXIST
    assert add(SIZE // 2 - 4096, 8192) == -errno.EEXIST
    assert add(SIZE // 2, 0) == -errno.EINVAL
    assert add(SIZE // 2, lib.FILE_BUFFER_MAX + 1) == -errno.EINVAL
    assert lib.file_buffer_remove(disk.selector.native, address(memory, 4096)) == -errno.ENOENT
    assert add(SIZE // 2, SIZE // 2) == 0
    assert lib.file_buffer_remove(disk.selector.native, address(memory, SIZE // 2)) == 0


async def test_memory_that_cannot_be_pinned_is_refused_as_a_whole(
    disk: LocalDisk,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages of an ordinary file cannot be pinned for writing."""
    monkeypatch.setattr("bdev.memory._warned", False)
    (tmp_path / "guest").write_bytes(bytes(SIZE))
    with (tmp_path / "guest").open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as bad:
        good = pages(SIZE)
        registered = RegisteredMemory(disk.selector.native)
        data = ffi.from_buffer(bad)
        await registered.add([(address(good), SIZE), (data, SIZE)])
        ffi.release(data)
        assert registered.size == 0
        disk.io.read_into(0, part(good, 0, 4096))
        assert uses(disk) == 0
    assert "memory-backend-memfd" in caplog.text
