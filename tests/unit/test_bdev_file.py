"""File disks: the way of a request into a file and back, whatever its shape."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdev.io import Op
from bdev.statistics import in_flight
from reactor.native import lib
from tests.support.bdevs import LocalDisk, file_disk, pages
from tests.support.descriptors import open_fds
from tests.support.tmpfs import small_tmpfs

SIZE = 4 << 20
BOUNCE_SIZE = 128 << 10  # bdev/piece.h
BOUNCE_BUFFERS = 32  # bdev/transfer.c
DEPTH = 512

ENGINES = {
    "": lib.KERNEL_IO_URING,
    "aio": lib.KERNEL_IO_AIO,
    "threads": lib.KERNEL_IO_THREADS,
}

Open = Callable[..., LocalDisk]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def open_disk() -> Iterator[Open]:
    disks: list[LocalDisk] = []

    def make(path: Path, **setup: object) -> LocalDisk:
        disks.append(file_disk(path, **setup))  # type: ignore[arg-type]
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture(params=["direct", "buffered", "direct-aio", "direct-threads", "buffered-threads"])
def disk(request: pytest.FixtureRequest, path: Path, open_disk: Open) -> LocalDisk:
    mode, _, engine = request.param.partition("-")
    return open_disk(path, direct=mode == "direct", engine=ENGINES[engine])


def write_back(path: Path) -> None:
    """Have the file system allocate what it has put off."""
    with path.open("rb+") as file:
        os.fsync(file)


def contents(path: Path) -> bytes:
    return path.read_bytes()


def test_aligned_memory_is_read_and_written_in_place(disk: LocalDisk, path: Path) -> None:
    memory = pages(8192)
    disk.io.read_into(4096, memory)
    assert memory[:] == contents(path)[4096:12288]
    memory[:] = os.urandom(8192)
    disk.io.write(0, memory)
    disk.io.flush()
    assert contents(path)[:8192] == memory[:]


@pytest.mark.parametrize("shift", [1, 4, 511])
@pytest.mark.parametrize("length", [512, 4096, BOUNCE_SIZE, BOUNCE_SIZE + 512, 3 * BOUNCE_SIZE])
def test_unaligned_memory_works_at_any_length(
    disk: LocalDisk, path: Path, shift: int, length: int
) -> None:
    memory = memoryview(pages(length + 4096))[shift : shift + length]
    disk.io.read_into(512, memory)
    assert memory == contents(path)[512 : 512 + length]
    memory[:] = os.urandom(length)
    disk.io.write(1024, memory)
    assert contents(path)[1024 : 1024 + length] == memory


def test_buffers_of_odd_lengths_make_up_one_request(disk: LocalDisk, path: Path) -> None:
    parts = [bytearray(n) for n in (1, 510, 513, 3, 509, 0, 512)]
    disk.io.read_into(0, *parts)
    assert b"".join(parts) == contents(path)[:2048]


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2048, 3000])
def test_more_buffers_than_one_system_call_takes(disk: LocalDisk, path: Path, count: int) -> None:
    memory = memoryview(pages(count * 512))
    parts = [memory[i * 512 : i * 512 + 512] for i in range(count)]
    disk.io.read_into(0, *parts)
    assert memory == contents(path)[: count * 512]
    memory[:] = os.urandom(count * 512)
    disk.io.write(512, *parts)
    assert contents(path)[512 : 512 + count * 512] == memory


def test_more_requests_than_the_ring_has_entries(disk: LocalDisk, path: Path) -> None:
    memory = memoryview(pages(2 * DEPTH * 512))
    requests = [
        disk.io.start(Op.READ, i * 512, buffers=[memory[i * 512 : i * 512 + 512]])
        for i in range(2 * DEPTH)
    ]
    assert in_flight(disk.stats) == 2 * DEPTH
    for request in requests:
        request.finish()
    assert memory == contents(path)[: 2 * DEPTH * 512]


def test_more_unaligned_requests_than_bounce_buffers(path: Path, open_disk: Open) -> None:
    """They wait their turn, and each has its own data in the end."""
    disk = open_disk(path)
    length = BOUNCE_SIZE + 4096  # two pieces
    count = 2 * BOUNCE_BUFFERS
    memory = [memoryview(pages(length + 4096))[1 : 1 + length] for _ in range(count)]
    requests = [
        disk.io.start(Op.READ, i * 4096, buffers=[buffer]) for i, buffer in enumerate(memory)
    ]
    for request in requests:
        request.finish()
    whole = contents(path)
    for i, buffer in enumerate(memory):
        assert buffer == whole[i * 4096 : i * 4096 + length]


def dirty_pages(path: Path) -> int:
    """Return how many pages of a file only the page cache has: cachestat(2)."""
    whole, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with path.open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(451, file.fileno(), whole, counts, 0) != 0:
            pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
    return counts[1] + counts[2]  # dirty, or on their way


@pytest.fixture
def buffered(path: Path, open_disk: Open) -> LocalDisk:
    """A disk in the page cache that has just been given a block."""
    write_back(path)
    disk = open_disk(path, direct=False)
    disk.io.write(0, b"d" * 4096)
    if dirty_pages(path) == 0:
        pytest.skip("this file system does not keep written data back")
    return disk


def test_a_flush_makes_writes_durable(buffered: LocalDisk, path: Path) -> None:
    buffered.io.flush()
    assert dirty_pages(path) == 0


def test_a_write_through_is_durable_without_a_flush(buffered: LocalDisk, path: Path) -> None:
    buffered.io.write(0, b"e" * 4096, fua=True)
    assert dirty_pages(path) == 0


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_unmap_punches_a_hole(disk: LocalDisk, path: Path) -> None:
    write_back(path)
    before = allocated(path)
    disk.io.unmap(1 << 20, 1 << 20)
    assert allocated(path) == before - (1 << 20)
    assert disk.io.read(1 << 20, 1 << 20) == bytes(1 << 20)
    assert path.stat().st_size == SIZE


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("offset", [0, 512, 1 << 20])
def test_zeroes_are_written_where_they_belong(
    disk: LocalDisk, path: Path, offset: int, unmap: bool
) -> None:
    expected = bytearray(contents(path))
    length = 300 * 1024 + 512  # more than one buffer of zeroes
    disk.io.write_zeroes(offset, length, unmap=unmap)
    expected[offset : offset + length] = bytes(length)
    assert contents(path) == expected


def test_zeroes_keep_their_space_unless_it_may_go(disk: LocalDisk, path: Path) -> None:
    write_back(path)
    before = allocated(path)
    disk.io.write_zeroes(0, 1 << 20)
    assert allocated(path) == before
    disk.io.write_zeroes(0, 1 << 20, unmap=True)
    assert allocated(path) == before - (1 << 20)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which knows no FALLOC_FL_ZERO_RANGE."""
    folder = tmp_path / "small"
    folder.mkdir()
    with small_tmpfs(folder, 1 << 20):
        yield folder


def test_zeroes_are_emulated_where_a_file_system_has_none(small: Path, open_disk: Open) -> None:
    path = small / "disk"
    path.write_bytes(b"\xff" * (768 << 10))
    disk = open_disk(path, direct=False)
    disk.io.write_zeroes(512, 700 << 10)
    disk.io.write_zeroes(0, 512)  # it is known by now
    assert contents(path) == bytes((700 << 10) + 512) + b"\xff" * ((68 << 10) - 512)
    assert disk.stats.errors == 0


def test_a_full_file_system_is_an_error_of_that_request_alone(small: Path, open_disk: Open) -> None:
    path = small / "disk"
    path.touch()
    os.truncate(path, 8 << 20)  # sparse: more than there is room for
    disk = open_disk(path, direct=False)
    disk.io.write(0, b"1" * 4096)
    with pytest.raises(OSError, match="WRITE") as caught:
        disk.io.write(0, bytes(2 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert disk.stats.errors == 1
    disk.io.unmap(0, 8 << 20)
    disk.io.write(0, b"2" * 4096)
    assert disk.io.read(0, 4096) == b"2" * 4096


def test_a_file_that_was_cut_off_fails_reads_past_its_end(disk: LocalDisk, path: Path) -> None:
    os.truncate(path, 8192)
    for offset, length in ((8192, 4096), (4096, 8192), (SIZE - 512, 512)):
        with pytest.raises(OSError, match="READ") as caught:
            disk.io.read(offset, length)
        assert caught.value.errno == errno.EIO
    assert len(disk.io.read(0, 8192)) == 8192


@pytest.mark.parametrize("end", [8192, 8292, 4608, 100])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_short_read_goes_on_where_it_stopped(
    disk: LocalDisk, path: Path, end: int, shift: int
) -> None:
    """What is there is delivered before the missing rest fails."""
    expected = contents(path)[:end]
    os.truncate(path, end)
    memory = memoryview(pages(20480))[shift : shift + 16384]
    with pytest.raises(OSError, match="READ") as caught:
        disk.io.read_into(0, memory)
    assert caught.value.errno == errno.EIO
    assert memory[:end] == expected
    assert not any(memory[end:])


def test_an_error_of_the_system_call_is_the_status(path: Path, open_disk: Open) -> None:
    fd = os.open(path, os.O_RDONLY)  # what the handle is told differs from what it has
    disk = open_disk(path, direct=False, fd=fd)
    with pytest.raises(OSError, match="WRITE") as caught:
        disk.io.write(0, bytes(512))
    assert caught.value.errno == errno.EBADF


def test_a_read_only_handle_refuses_changes_and_reads(path: Path, open_disk: Open) -> None:
    disk = open_disk(path, readonly=True)
    for change in (
        lambda: disk.io.write(0, bytes(512)),
        lambda: disk.io.unmap(0, 512),
        lambda: disk.io.write_zeroes(0, 512),
    ):
        with pytest.raises(OSError, match="Read-only") as caught:
            change()
        assert caught.value.errno == errno.EROFS
    disk.io.flush()
    assert disk.io.read(0, 512) == contents(path)[:512]


def test_without_holes_unmap_is_not_supported(path: Path, open_disk: Open) -> None:
    disk = open_disk(path, unmap=False)
    with pytest.raises(OSError, match="not supported"):
        disk.io.unmap(0, 4096)


def test_files_of_one_reactor_share_a_ring(path: Path, tmp_path: Path, open_disk: Open) -> None:
    """The second file is opened and closed while the first has requests in flight."""
    first = open_disk(path)
    other = tmp_path / "other"
    other.write_bytes(b"o" * 8192)
    before = open_fds()
    request = first.io.start(Op.READ, buffers=[pages(4096)])
    second = file_disk(other)
    second.io.read(0, 512)
    second.close()
    request.finish()
    assert open_fds() == before


def test_a_closed_handle_leaves_no_descriptor(path: Path) -> None:
    before = open_fds()
    for _ in range(3):
        disk = file_disk(path)
        disk.io.read(0, 512)
        disk.close()
    assert open_fds() == before


def test_a_sleeping_reactor_is_woken_by_a_completion(disk: LocalDisk) -> None:
    """Nothing spins in this mode, so every completion comes by way of an eventfd."""
    sleeps = lib.reactor_counters(disk.selector.native).sleeps
    for i in range(20):
        disk.io.flush()
        disk.io.read(i * 4096, 4096)
    assert lib.reactor_counters(disk.selector.native).sleeps > sleeps


def test_what_the_kernel_still_holds_is_aborted(tmp_path: Path) -> None:
    """A read of a FIFO waits, as one of a disk does that hangs."""
    (tmp_path / "fifo").touch()
    os.truncate(tmp_path / "fifo", 4096)
    os.mkfifo(tmp_path / "pipe")
    fd = os.open(tmp_path / "pipe", os.O_RDWR | os.O_CLOEXEC)
    disk = file_disk(tmp_path / "fifo", direct=False, fd=fd)
    request = disk.io.start(Op.READ, 0, 0, [bytearray(512)])
    disk.poll()
    assert not request.done
    assert request.abort()
    with pytest.raises(OSError, match="READ") as caught:
        request.finish()
    assert caught.value.errno == errno.ECANCELED
    assert not request.abort()
    disk.close()


def test_what_no_thread_has_begun_is_aborted(path: Path) -> None:
    disk = file_disk(path, engine=lib.KERNEL_IO_THREADS)
    request = disk.io.start(Op.READ, 0, 0, [pages(4096)])
    others = [disk.io.start(Op.READ, 0, 0, [pages(4096)]) for _ in range(20)]
    assert request.abort()
    with pytest.raises(OSError, match="READ") as caught:
        request.finish()
    assert caught.value.errno == errno.ECANCELED
    for other in others:
        other.finish()
    assert not others[0].abort()
    disk.close()
