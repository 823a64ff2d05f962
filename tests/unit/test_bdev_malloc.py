"""Malloc disks: where their memory is, and how it is given back."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdev import malloc
from reactor.native import lib
from tests.support.bdevs import LocalDisk, malloc_disk

PAGE = 4096
SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[int]:
    fd, _ = malloc.create_memory("test", SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def disk(memory: int) -> Iterator[LocalDisk]:
    disk = malloc_disk(memory, SIZE // 512)
    yield disk
    disk.close()


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_memory_cannot_shrink_under_a_reactor(memory: int) -> None:
    seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    for size in (0, SIZE - 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)


def test_a_new_disk_takes_no_memory_and_reads_as_zeroes(disk: LocalDisk, memory: int) -> None:
    assert allocated(memory) == 0
    assert disk.io.read(SIZE - 4096, 4096) == bytes(4096)


def test_two_handles_see_one_memory(disk: LocalDisk, memory: int) -> None:
    other = malloc_disk(memory, SIZE // 512)
    disk.io.write(512, b"shared!!" * 64)
    assert other.io.read(512, 512) == b"shared!!" * 64
    other.close()


def test_contents_outlive_a_handle(memory: int) -> None:
    first = malloc_disk(memory, SIZE // 512)
    first.io.write(0, b"x" * 512)
    first.close()
    second = malloc_disk(memory, SIZE // 512)
    assert second.io.read(0, 512) == b"x" * 512
    second.close()


def test_buffers_are_filled_one_after_another(disk: LocalDisk) -> None:
    data = os.urandom(1536)
    disk.io.write(512, data[:100], data[100:1000], data[1000:])
    parts = [bytearray(n) for n in (1, 511, 700, 324)]
    disk.io.read_into(512, *parts)
    assert b"".join(parts) == data


@pytest.mark.parametrize("zero", ["unmap", "write_zeroes"])
def test_zeroing_gives_whole_pages_back(disk: LocalDisk, memory: int, zero: str) -> None:
    disk.io.write(0, b"\xff" * SIZE)
    assert allocated(memory) == SIZE
    getattr(disk.io, zero)(512, 10 * PAGE)
    assert allocated(memory) == SIZE - 9 * PAGE


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (512, 512), (3584, 1024), (3584, 512 + PAGE), (PAGE, PAGE), (512, 3 * PAGE)],
)
def test_zeroing_touches_nothing_else(disk: LocalDisk, offset: int, length: int) -> None:
    expected = bytearray(b"\xff" * (8 * PAGE))
    disk.io.write(0, bytes(expected))
    disk.io.write_zeroes(offset, length)
    expected[offset : offset + length] = bytes(length)
    assert disk.io.read(0, 8 * PAGE) == expected


def test_memory_of_huge_pages_is_kept(tmp_path: Path) -> None:
    """Reserved pages that were given back could be gone when they are wanted again."""
    huge = 2 << 20
    fd = os.memfd_create("plain")  # the handle is told that it has huge pages; that is all it sees
    os.ftruncate(fd, huge)
    disk = malloc_disk(fd, huge // 512, page_size=huge)
    disk.io.write(0, b"\xff" * huge)
    disk.io.unmap(0, huge)
    assert allocated(fd) == huge
    assert disk.io.read(0, huge) == bytes(huge)
    disk.close()
    os.close(fd)


def test_without_free_huge_pages_ordinary_ones_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(malloc, "_HUGE_PAGES", tmp_path)
    folder = tmp_path / "hugepages-2048kB"
    folder.mkdir()
    (folder / "free_hugepages").write_text("5\n")
    (folder / "resv_hugepages").write_text("3\n")
    assert malloc.free_huge_pages(2 << 20) == 2
    fd, page = malloc.create_memory("test", 3 * (2 << 20))
    assert page == 0
    assert os.fstat(fd).st_size == 3 * (2 << 20)
    os.close(fd)


def test_huge_pages_that_vanish_meanwhile_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is a promise that another process may have used up."""
    monkeypatch.setattr(malloc, "free_huge_pages", lambda _size: 1 << 40)
    many = 1 << 40  # bytes: no machine that runs this has so many huge pages
    fd, page = malloc.create_memory("test", many)
    assert page == 0
    assert os.fstat(fd).st_size == many
    os.close(fd)


def test_memory_goes_back_although_it_is_mapped(disk: LocalDisk, memory: int) -> None:
    disk.io.write(0, b"\xff" * SIZE)
    assert lib.malloc_bdev_discard(memory, 0) == 0
    assert allocated(memory) == 0


def test_a_handle_on_no_memory_is_refused() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        malloc_disk(1 << 20, 8)
