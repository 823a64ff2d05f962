"""Devices on devices: claims, handles, removal, resizing, and requests that go through."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from bdev.io import Op
from bdev.kind import Bdev
from bdev.stacked import MAX_DEPTH
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench

DISK = {"block_size": 512, "num_blocks": 2048}


async def make_stack(bench: Bench, *, layers: int = 2, kind: str = "malloc") -> None:
    """Create M, P0 on M, P1 on P0 ..."""
    await bench.rpc(f"bdev_{kind}_create", name="M", **DISK)
    below = "M"
    for i in range(layers):
        await bench.rpc("bdev_passthru_create", name=f"P{i}", base_bdev_name=below)
        below = f"P{i}"


def names(bench: Bench) -> list[str]:
    return [bdev.name for bdev in bench.registry]


@on_bench()
async def test_what_is_written_above_is_read_below(bench: Bench) -> None:
    await make_stack(bench)
    top, bottom = await bench.open("P1"), await bench.open("M")
    top.write(4096, b"a" * 512, b"b" * 1024)
    assert bottom.read(4096, 1536) == b"a" * 512 + b"b" * 1024
    top.write_zeroes(4096, 512)
    top.unmap(5120, 512)
    top.flush()
    assert top.read(4096, 1536) == bytes(512) + b"b" * 512 + bytes(512)
    await bench.close("P1")
    await bench.close("M")


@on_bench()
async def test_each_layer_counts_what_goes_through_it(bench: Bench) -> None:
    await make_stack(bench)
    io = await bench.open("P1")
    io.read(0, 4096)
    for name in ("P1", "P0", "M"):
        entry = (await bench.rpc("bdev_get_iostat", name=name))["bdevs"][0]
        assert (entry["num_read_ops"], entry["bytes_read"]) == (1, 4096)
    await bench.close("P1")


@on_bench()
async def test_bases_are_opened_first_and_closed_last(bench: Bench) -> None:
    await make_stack(bench)
    ids = [bench.registry.find(name).id for name in ("M", "P0", "P1")]
    await bench.open("P1")
    assert list(bench.reactor.handles) == ids
    await bench.close("P1")
    assert bench.reactor.handles == {}
    assert bench.reactor.calls == ["bdev_open"] * 3 + ["bdev_close"] * 3


@on_bench()
async def test_a_base_stays_open_for_its_other_users(bench: Bench) -> None:
    await make_stack(bench)
    await bench.open("M")
    await bench.open("P1")
    await bench.close("P1")
    assert list(bench.reactor.handles) == [bench.registry.find("M").id]
    await bench.close("M")


@on_bench()
async def test_an_open_that_fails_leaves_nothing_open(bench: Bench) -> None:
    await make_stack(bench)
    bench.registry.find("P1").kind = "nonsense"  # type: ignore[misc]
    with pytest.raises(OperationError, match="nonsense"):
        await bench.open("P1")
    assert bench.reactor.handles == {}
    bench.registry.find("P1").kind = "passthru"  # type: ignore[misc]
    await bench.open("P1")
    await bench.close("P1")


@on_bench()
async def test_a_claimed_base_is_refused_with_the_name_of_its_owner(bench: Bench) -> None:
    await make_stack(bench, layers=1)
    with pytest.raises(OperationError, match="claimed already, by passthru P0") as caught:
        await bench.rpc("bdev_passthru_create", name="Q", base_bdev_name="M")
    assert caught.value.code == -errno.EBUSY
    assert names(bench) == ["M", "P0"]
    assert (await bench.rpc("bdev_get_bdevs", name="M"))[0]["claimed"] is True
    await bench.rpc("bdev_passthru_delete", name="P0")
    await bench.rpc("bdev_passthru_create", name="Q", base_bdev_name="M")


@on_bench()
async def test_a_base_that_is_served_to_a_guest_is_refused(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)

    async def removed(_: Bdev) -> None:
        pass

    bench.registry.on_removed(bench.registry.find("M"), removed)
    with pytest.raises(OperationError, match="M is in use") as caught:
        await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="M")
    assert caught.value.code == -errno.EBUSY


@on_bench()
async def test_read_only_bases_are_shared(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"r" * 4096)
    await bench.rpc("bdev_uring_create", name="F", filename=str(path), readonly=True)
    for name in ("P0", "P1"):
        await bench.rpc("bdev_passthru_create", name=name, base_bdev_name="F")
    io = await bench.open("P1")
    assert io.read(0, 512) == b"r" * 512
    with pytest.raises(OSError, match="WRITE") as caught:
        io.write(0, bytes(512))
    assert caught.value.errno == errno.EROFS
    await bench.close("P1")


@on_bench()
async def test_a_name_that_is_taken_leaves_the_base_unclaimed(bench: Bench) -> None:
    await make_stack(bench, layers=0)
    with pytest.raises(OperationError, match="File exists"):
        await bench.rpc("bdev_passthru_create", name="M", base_bdev_name="M")
    assert bench.registry.find("M").claims == []


@on_bench()
async def test_stacks_have_a_highest_layer(bench: Bench) -> None:
    await make_stack(bench, layers=MAX_DEPTH - 1)
    with pytest.raises(OperationError, match="layers") as caught:
        await bench.rpc("bdev_passthru_create", name="Q", base_bdev_name=f"P{MAX_DEPTH - 2}")
    assert caught.value.code == -errno.ELOOP
    io = await bench.open(f"P{MAX_DEPTH - 2}")
    io.write(0, b"x" * 512)
    assert io.read(0, 512) == b"x" * 512
    await bench.close(f"P{MAX_DEPTH - 2}")


@on_bench()
async def test_a_base_with_something_on_it_is_not_deleted(bench: Bench) -> None:
    await make_stack(bench)
    with pytest.raises(OperationError, match="M is claimed by passthru P0") as caught:
        await bench.rpc("bdev_malloc_delete", name="M")
    assert caught.value.code == -errno.EBUSY
    io = await bench.open("P1")
    io.write(0, b"w" * 512)
    await bench.close("P1")
    for name in ("P1", "P0"):
        await bench.rpc("bdev_passthru_delete", name=name)
    await bench.rpc("bdev_malloc_delete", name="M")
    assert names(bench) == []


@on_bench(reactors=2)
async def test_a_base_that_goes_away_takes_the_stack_with_it(bench: Bench) -> None:
    await make_stack(bench)
    ios = [await bench.open("P1", reactor) for reactor in (0, 1)]
    top = bench.registry.find("P1")
    told = []

    async def removed(bdev: Bdev) -> None:
        told.append(bdev.name)

    bench.registry.on_removed(top, removed)
    await bench.registry.remove("M", unplug=True)
    assert told == ["P1"]
    assert names(bench) == []
    for io in ios:
        with pytest.raises(OSError, match="READ") as caught:
            io.read(0, 512)
        assert caught.value.errno == errno.ENODEV
    for reactor in bench.cluster.reactors:
        await bench.registry.close(top, reactor)
        assert reactor.handles == {}


@on_bench(reactors=2)
async def test_a_resize_travels_up(bench: Bench) -> None:
    await make_stack(bench, kind="null")
    ios = [await bench.open("P1", reactor) for reactor in (0, 1)]
    told = []

    async def resized(bdev: Bdev) -> None:
        told.append((bdev.name, bdev.num_blocks))

    for name in ("P1", "P0"):
        bench.registry.on_resized(bench.registry.find(name), resized)
    await bench.registry.resize(bench.registry.find("M"), 4096)
    assert told == [("P0", 4096), ("P1", 4096)]
    for io in ios:
        io.read(4095 * 512, 512)
    for reactor in (0, 1):
        await bench.close("P1", reactor)


@on_bench()
async def test_a_reactor_that_dies_takes_its_handles_of_all_layers(bench: Bench) -> None:
    await make_stack(bench)
    io = await bench.open("P1")
    io.write(0, b"k" * 512)
    reactor = bench.reactor
    await reactor.stop()
    fenced: list[str] = []
    for bdev in bench.registry:

        async def fence(_: object, name: str = bdev.name) -> None:
            fenced.append(name)

        bdev.fence = fence  # type: ignore[method-assign]
    await bench.registry.reactor_lost(reactor)
    assert fenced == ["M", "P0", "P1"]
    reactor.start()
    io = await bench.open("P1")
    assert io.read(0, 512) == b"k" * 512
    await bench.close("P1")
    assert reactor.handles == {}


@on_bench()
async def test_bases_come_first_in_a_saved_configuration(bench: Bench) -> None:
    await make_stack(bench)
    calls = bench.registry.config()
    assert [call["params"]["name"] for call in calls] == ["M", "P0", "P1"]
    async with Bench() as again:
        for call in calls:
            await again.rpc(call["method"], **call["params"])
        assert again.registry.config() == calls


@on_bench()
async def test_requests_that_find_the_pool_dry_wait_in_line(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096 * 64))
    await bench.rpc("bdev_uring_create", name="F", filename=str(path))
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="F")
    io = await bench.open("P")
    base = bench.reactor.handles[bench.registry.find("F").id]
    requests = [io.start(Op.WRITE, i % 64 * 4096, 0, [bytes([i % 64]) * 512]) for i in range(1100)]
    assert lib.bdev_in_flight(io.handle) == 1100
    assert lib.bdev_in_flight(base) == 1024
    reset = io.start(Op.RESET)
    reset.finish()
    for request in requests:
        assert request.done
        request.finish()
    assert [io.read(i * 4096, 512) for i in range(64)] == [bytes([i]) * 512 for i in range(64)]
    await bench.close("P")


@on_bench()
async def test_removal_waits_for_what_is_in_flight_below(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    await bench.rpc("bdev_uring_create", name="F", filename=str(path))
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="F")
    io, top = await bench.open("P"), bench.registry.find("P")
    requests = [io.start(Op.WRITE, i * 512, 0, [b"z" * 512]) for i in range(64)]
    removal = asyncio.create_task(bench.registry.remove("P"))
    await removal
    for request in requests:
        request.finish()
    assert path.read_bytes()[: 64 * 512] == b"z" * (64 * 512)
    await bench.registry.close(top, bench.reactor)
    assert bench.reactor.handles == {}
