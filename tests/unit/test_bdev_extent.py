"""What disks have storage for: bdev/extent.h."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdev import malloc
from reactor.native import CData, ffi, lib
from tests.support.bdevs import Bench, file_disk, malloc_disk, null_disk, on_bench
from tests.support.descriptors import open_fds

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 32
SIZE = PAGES * PAGE


def extent(handle: CData, offset: int) -> tuple[int, int]:
    """Return the kind, or -errno, and the length of the extent at ``offset``."""
    length = ffi.new("uint64_t *")
    kind: int = lib.bdev_extent(handle, offset, length)
    return kind, length[0]


def extents(handle: CData) -> Iterator[tuple[int, int, int]]:
    """Yield offset, length, and whether it is a hole, of all extents, like ones as one."""
    at, begin, before = 0, 0, None
    while at < lib.bdev_size(handle):
        kind, length = extent(handle, at)
        assert kind >= 0
        assert length > 0
        if before not in (None, kind):
            yield begin, at - begin, before == lib.BDEV_HOLE
            begin = at
        at, before = at + length, kind
    assert at == lib.bdev_size(handle)
    yield begin, at - begin, before == lib.BDEV_HOLE


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@given(
    written=st.sets(st.integers(0, PAGES - 1)),
    block_size=st.sampled_from([512, PAGE]),
)
def test_a_block_of_a_file_is_a_hole_when_none_of_it_was_written(
    written: set[int], block_size: int
) -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    for page in written:
        os.pwrite(fd, b"x", page * PAGE)
    disk = file_disk(Path(f"/proc/self/fd/{fd}"), direct=False, block_size=block_size)
    found = bytearray()
    for _, length, hole in extents(disk.handle):
        found += bytes([hole]) * (length // block_size)
    expected = [
        all(page // (block_size // PAGE) != block for page in written)
        if block_size > PAGE
        else block * block_size // PAGE not in written
        for block in range(SIZE // block_size)
    ]
    assert list(found) == [int(hole) for hole in expected]
    disk.close()
    os.close(fd)


def test_a_new_malloc_disk_is_a_hole_and_what_is_written_is_not(memory: int) -> None:
    disk = malloc_disk(memory, SIZE // 512)
    assert extent(disk.handle, 0) == (lib.BDEV_HOLE, SIZE)
    disk.io.write(3 * 512, b"x" * 1024)
    assert list(extents(disk.handle)) == [
        (0, 3 * 512, True),
        (3 * 512, 1024, False),
        (5 * 512, SIZE - 5 * 512, True),
    ]
    disk.io.unmap(3 * 512, 512)
    assert extent(disk.handle, 0) == (lib.BDEV_HOLE, 4 * 512)
    disk.close()


def test_reading_a_malloc_disk_leaves_it_a_hole(memory: int) -> None:
    disk = malloc_disk(memory, SIZE // 512)
    assert disk.io.read(0, SIZE) == bytes(SIZE)
    assert list(extents(disk.handle)) == [(0, SIZE, True)]
    disk.close()


def test_a_malloc_disk_looks_at_a_bounded_part_of_its_contents() -> None:
    fd, _ = malloc.create_memory("test", 4 << 20)
    disk = malloc_disk(fd, (4 << 20) // 512)
    disk.io.write(0, b"x" * (4 << 20))
    assert extent(disk.handle, 512) == (lib.BDEV_MAPPED, 1 << 20)
    disk.close()
    os.close(fd)


def test_a_disk_that_knows_no_holes_is_mapped() -> None:
    disk = null_disk(1000)
    assert extent(disk.handle, 512) == (lib.BDEV_MAPPED, 999 * 512)
    assert not lib.bdev_sparse(disk.handle)
    disk.close()


@pytest.mark.parametrize(
    ("offset", "error"),
    [(1, errno.EINVAL), (SIZE, errno.ERANGE), (SIZE + 512, errno.ERANGE)],
)
def test_what_is_not_on_the_disk_is_an_error(memory: int, offset: int, error: int) -> None:
    disk = malloc_disk(memory, SIZE // 512)
    assert extent(disk.handle, offset)[0] == -error
    disk.close()


def test_a_removed_disk_has_no_extents(memory: int) -> None:
    disk = malloc_disk(memory, SIZE // 512)
    lib.bdev_remove(disk.handle)
    assert extent(disk.handle, 0)[0] == -errno.ENODEV
    disk.close()


@on_bench()
async def test_what_stands_on_one_disk_has_its_holes(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="M")
    latency = dict.fromkeys(
        ("avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency"), 0
    )
    await bench.rpc("bdev_delay_create", name="D", base_bdev_name="P", **latency)
    await bench.rpc("bdev_error_create", base_name="D")
    await bench.rpc("bdev_split_create", base_bdev="EE_D", split_count=2)
    low, high = await bench.open("EE_Dp0"), await bench.open("EE_Dp1")
    assert lib.bdev_sparse(high.handle)
    high.write(4096, b"x" * 512)
    assert list(extents(low.handle)) == [(0, 1024 * 512, True)]
    assert list(extents(high.handle)) == [
        (0, 4096, True),
        (4096, 512, False),
        (4608, 1024 * 512 - 4608, True),
    ]
    await bench.close("EE_Dp0")
    await bench.close("EE_Dp1")


@on_bench()
async def test_holes_of_what_is_encrypted_do_not_read_as_zeroes(
    bench: Bench, tmp_path: Path
) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=2048)
    key = tmp_path / "key"
    key.write_text("00112233445566778899aabbccddeeffffeeddccbbaa99887766554433221100")
    key.chmod(0o600)
    await bench.rpc("accel_crypto_key_create", name="K", key_file=str(key))
    await bench.rpc("bdev_crypto_create", base_bdev_name="M", name="C", key_name="K")
    io = await bench.open("C")
    assert not lib.bdev_sparse(io.handle)
    assert list(extents(io.handle)) == [(0, 1 << 20, False)]
    await bench.close("C")


def test_a_malloc_handle_has_a_descriptor_of_its_own_and_closes_it() -> None:
    fd, _ = malloc.create_memory("test", SIZE)
    before = open_fds()
    disk = malloc_disk(fd, SIZE // 512)
    os.close(fd)
    assert extent(disk.handle, 0) == (lib.BDEV_HOLE, SIZE)
    disk.close()
    assert len(open_fds()) == len(before) - 1
