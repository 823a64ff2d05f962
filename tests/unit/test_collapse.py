"""Transparent huge pages for malloc disks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

from bdev.collapse import SharedMemory
from bdev.malloc import create_memory
from reactor.native import lib
from tests.support.bdevs import LocalDisk, malloc_disk
from tests.support.descriptors import open_fds

EXTENT = lib.COLLAPSE_EXTENT
EXTENTS = 3


@pytest.fixture
def fd() -> Iterator[int]:
    fd, _ = create_memory("test", EXTENTS * EXTENT)
    yield fd
    os.close(fd)


@pytest.fixture
def disk(fd: int) -> Iterator[LocalDisk]:
    disk = malloc_disk(fd, EXTENTS * EXTENT // 512)
    yield disk
    disk.close()


@pytest.fixture
def memory(fd: int) -> Iterator[SharedMemory]:
    memory = SharedMemory(fd)
    yield memory
    memory.close()


def collapse(memory: SharedMemory) -> bool:
    try:
        return asyncio.run(memory.collapse())
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("this kernel has no MADV_COLLAPSE for shared memory")
        raise


def fill(disk: LocalDisk, extent: int, length: int = EXTENT) -> bytes:
    data = os.urandom(4096) * (length // 4096)
    disk.io.write(extent * EXTENT, data)
    return data


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_only_what_is_full_is_put_into_huge_pages(
    disk: LocalDisk, memory: SharedMemory, fd: int
) -> None:
    first, part = fill(disk, 0), fill(disk, 2, EXTENT - 4096)
    before = allocated(fd)
    assert collapse(memory)
    assert memory.huge_pages == 1
    assert allocated(fd) == before
    assert disk.io.read(0, EXTENT) == first
    assert disk.io.read(2 * EXTENT, EXTENT) == part + bytes(4096)


def test_memory_that_has_not_changed_is_not_looked_at_again(
    disk: LocalDisk, memory: SharedMemory
) -> None:
    fill(disk, 1)
    assert collapse(memory)
    assert not collapse(memory)
    fill(disk, 2)
    assert collapse(memory)
    assert memory.huge_pages == 2


def test_discarding_a_part_of_a_huge_page_gives_its_memory_back(
    disk: LocalDisk, memory: SharedMemory, fd: int
) -> None:
    data = fill(disk, 0)
    collapse(memory)
    disk.io.unmap(4096, EXTENT // 2)
    assert allocated(fd) == EXTENT // 2
    collapse(memory)
    assert memory.huge_pages == 0
    expected = data[:4096] + bytes(EXTENT // 2) + data[4096 + EXTENT // 2 :]
    assert disk.io.read(0, EXTENT) == expected


def test_memory_that_is_closed_while_it_is_looked_at_is_let_go_of_afterwards(fd: int) -> None:
    os.posix_fallocate(fd, 0, EXTENTS * EXTENT)
    before = open_fds()

    async def run() -> None:
        memory = SharedMemory(fd)
        looking = asyncio.create_task(memory.collapse())
        await asyncio.sleep(0)  # it has begun
        memory.close()
        with contextlib.suppress(OSError):
            await looking

    asyncio.run(run())
    assert open_fds() == before
