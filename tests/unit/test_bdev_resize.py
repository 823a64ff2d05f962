"""Disks in memory that get another size while they are used."""

from __future__ import annotations

import errno

import pytest

from bdev import malloc
from bdev.kind import Bdev
from reactor.errors import OperationError
from tests.support.bdevs import Bench, on_bench

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk in huge pages, which this machine may have, gets no more of them."""
    monkeypatch.setattr(malloc, "free_huge_pages", lambda _size: 0)


async def make(bench: Bench, kind: str = "malloc") -> None:
    await bench.rpc(f"bdev_{kind}_create", name="D", block_size=512, num_blocks=2048)


@pytest.mark.parametrize("kind", ["malloc", "null"])
@on_bench(reactors=2)
async def test_a_new_size_holds_in_every_reactor_and_is_told(bench: Bench, kind: str) -> None:
    await make(bench, kind)
    told = []

    async def resized(bdev: Bdev) -> None:
        told.append(bdev.num_blocks)

    bench.registry.on_resized(bench.registry.find("D"), resized)
    ios = [await bench.open("D", reactor) for reactor in (0, 1)]
    assert await bench.rpc(f"bdev_{kind}_resize", name="D", new_size=3) is True
    for io in ios:
        io.write(3 * MIB - 512, bytes(512))
        with pytest.raises(OSError, match="READ") as caught:
            io.read(3 * MIB, 512)
        assert caught.value.errno == errno.ERANGE
    assert told == [6144]
    assert bench.registry.config()[0]["params"]["num_blocks"] == 6144
    for reactor in (0, 1):
        await bench.close("D", reactor)


@on_bench(reactors=2)
async def test_contents_stay_and_what_is_new_is_zeroes(bench: Bench) -> None:
    await make(bench)
    ios = [await bench.open("D", reactor) for reactor in (0, 1)]
    ios[0].write(0, b"o" * MIB)
    await bench.rpc("bdev_malloc_resize", name="D", new_size=9)
    ios[0].write(8 * MIB, b"n" * 512)
    for io in ios:
        assert io.read(0, MIB) == b"o" * MIB
        assert io.read(MIB, MIB) == bytes(MIB)
        assert io.read(8 * MIB, 1024) == b"n" * 512 + bytes(512)
    for reactor in (0, 1):
        await bench.close("D", reactor)


@on_bench()
async def test_what_was_cut_off_does_not_come_back(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("D")
    await bench.rpc("bdev_malloc_resize", name="D", new_size=2)
    io.write(0, b"x" * 2 * MIB)
    await bench.rpc("bdev_malloc_resize", name="D", new_size=1)
    await bench.rpc("bdev_malloc_resize", name="D", new_size=2)
    assert io.read(0, 2 * MIB) == b"x" * MIB + bytes(MIB)
    await bench.close("D")


@on_bench()
async def test_a_disk_that_nobody_has_open_is_opened_with_its_new_size(bench: Bench) -> None:
    await make(bench)
    await bench.rpc("bdev_malloc_resize", name="D", new_size=4)
    io = await bench.open("D")
    io.write(4 * MIB - 512, b"e" * 512)
    await bench.close("D")


@on_bench()
async def test_a_resize_reaches_what_stands_on_the_disk(bench: Bench) -> None:
    await make(bench)
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="D")
    io = await bench.open("P")
    await bench.rpc("bdev_malloc_resize", name="D", new_size=2)
    io.write(2 * MIB - 512, b"p" * 512)
    assert (await bench.rpc("bdev_get_bdevs", name="P"))[0]["num_blocks"] == 4096
    await bench.close("P")


@pytest.mark.parametrize("kind", ["malloc", "null"])
@pytest.mark.parametrize("size", [0, -1, 1 << 50])
@on_bench()
async def test_a_size_that_cannot_be_is_refused(bench: Bench, kind: str, size: int) -> None:
    await make(bench, kind)
    with pytest.raises(OperationError, match="new_size"):
        await bench.rpc(f"bdev_{kind}_resize", name="D", new_size=size)
    assert bench.registry.find("D").num_blocks == 2048


@on_bench()
async def test_more_than_the_machine_has_is_refused(bench: Bench) -> None:
    await make(bench)
    with pytest.raises(OperationError, match="of this machine"):
        await bench.rpc("bdev_malloc_resize", name="D", new_size=1 << 30)
    with pytest.raises(OperationError, match="null bdev 'D'"):
        await bench.rpc("bdev_null_resize", name="D", new_size=1)


@on_bench()
async def test_a_disk_in_reserved_huge_pages_says_why_it_cannot_grow(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told that its memory is of such pages; it need not be to be refused."""
    plain = malloc.create_memory

    def reserved(name: str, size: int) -> tuple[int, int]:
        return plain(name, size)[0], 2 * MIB

    monkeypatch.setattr(malloc, "create_memory", reserved)
    await bench.rpc("bdev_malloc_create", name="D", block_size=512, num_blocks=4096)
    with pytest.raises(OperationError, match="extends no mapping of such pages") as no:
        await bench.rpc("bdev_malloc_resize", name="D", new_size=4)
    assert no.value.code == -errno.EOPNOTSUPP
    assert bench.registry.find("D").num_blocks == 4096
