"""The registry: names, handles counted across reactors, removal, resizing, lost reactors."""

from __future__ import annotations

import asyncio
import errno

import pytest

from bdev.io import Op
from bdev.kind import Bdev
from reactor.errors import OperationError
from tests.support.bdevs import Bench, on_bench, pages

DISK = {"block_size": 512, "num_blocks": 2048}
UUID = "6ad70f1a-54cb-4d6c-8e4e-0f8f3b0a8a01"


async def refused(code: int, awaitable) -> str:
    with pytest.raises(OperationError) as caught:
        await awaitable
    assert caught.value.code == code, caught.value.message
    return caught.value.message


@on_bench()
async def test_a_disk_is_found_by_name_and_by_uuid_in_any_case(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", uuid=UUID.upper(), **DISK)
    disk = bench.registry.find("M")
    assert bench.registry.find(UUID) is bench.registry.find(UUID.upper()) is disk
    assert disk.uuid == UUID


@on_bench()
async def test_ids_are_not_used_again(bench: Bench) -> None:
    ids = []
    for _ in range(3):
        await bench.rpc("bdev_null_create", name="N", **DISK)
        ids.append(bench.registry.find("N").id)
        await bench.rpc("bdev_null_delete", name="N")
    assert ids == sorted(set(ids))


@on_bench()
async def test_slots_are_used_again_and_begin_at_zero(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="A", **DISK)
    io = await bench.open("A")
    io.read(0, 512)
    slot = bench.registry.find("A").slot
    await bench.close("A")
    await bench.rpc("bdev_null_delete", name="A")
    await bench.rpc("bdev_null_create", name="B", **DISK)
    assert bench.registry.find("B").slot == slot
    stat = (await bench.rpc("bdev_get_iostat", names=["B"]))["bdevs"][0]
    assert stat["num_read_ops"] == 0


@on_bench()
async def test_users_of_one_reactor_share_a_handle(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    await bench.open("M")
    await bench.open("M")
    await bench.close("M")
    assert bench.reactor.calls == ["bdev_open"]
    await bench.close("M")
    assert bench.reactor.calls == ["bdev_open", "bdev_close"]
    assert bench.reactor.handles == {}


@on_bench()
async def test_concurrent_opens_are_one(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    disk = bench.registry.find("M")
    await asyncio.gather(*(bench.registry.open(disk, bench.reactor) for _ in range(10)))
    assert bench.reactor.calls == ["bdev_open"]
    for _ in range(10):
        await bench.close("M")
    assert bench.reactor.handles == {}


@on_bench()
async def test_an_open_that_fails_counts_nothing(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    bench.cluster.refuse["bdev_open"] = OperationError(-errno.ENOMEM, "no memory")
    disk = bench.registry.find("M")
    results = await asyncio.gather(
        *(bench.registry.open(disk, bench.reactor) for _ in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [OperationError] * 3
    bench.cluster.refuse.clear()
    await bench.open("M")
    await bench.close("M")
    assert bench.reactor.calls == ["bdev_open", "bdev_close"]


@on_bench()
async def test_a_close_too_many_does_nothing(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    await bench.close("M")
    assert bench.reactor.calls == []


@on_bench()
async def test_a_busy_handle_stays_until_it_can_be_closed(bench: Bench, tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    await bench.rpc("bdev_uring_create", name="U", filename=str(path))
    io = await bench.open("U")
    request = io.start(Op.READ, buffers=[pages(4096)])
    disk = bench.registry.find("U")
    # Neither awaits anything that would let the request complete.
    closing = bench.registry.close(disk, bench.reactor)
    await refused(-errno.EBUSY, closing_without_turns(bench, closing))
    request.finish()
    await bench.close("U")
    assert bench.reactor.handles == {}


async def closing_without_turns(bench: Bench, closing) -> None:
    """Run ``closing`` while the reactor stands still."""
    select = bench.reactor.selector.select
    bench.reactor.selector.select = lambda _timeout=None: []
    try:
        await closing
    finally:
        bench.reactor.selector.select = select


@on_bench(reactors=2)
async def test_reactors_serve_one_disk_together(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    first, second = await bench.open("M", 0), await bench.open("M", 1)
    first.write(512, b"ab" * 256)
    assert second.read(512, 512) == b"ab" * 256
    stat = (await bench.rpc("bdev_get_iostat", name="M"))["bdevs"][0]
    assert (stat["bytes_written"], stat["bytes_read"]) == (512, 512)


@on_bench()
async def test_a_lost_reactor_has_no_handles(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    io = await bench.open("M")
    io.write(0, b"kept" * 128)
    await bench.reactor.stop()
    await bench.registry.reactor_lost(bench.reactor)
    bench.reactor.start()
    io = await bench.open("M")
    assert io.read(0, 512) == b"kept" * 128
    await bench.close("M")
    assert bench.reactor.handles == {}


@on_bench()
async def test_an_open_that_waited_for_a_lost_one_begins_again(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    disk = bench.registry.find("M")
    bench.cluster.refuse["bdev_open"] = OperationError(-errno.ECONNRESET, "reactor-0 died")
    first = asyncio.create_task(bench.registry.open(disk, bench.reactor))
    second = asyncio.create_task(bench.registry.open(disk, bench.reactor))
    await asyncio.sleep(0)
    await bench.registry.reactor_lost(bench.reactor)
    await refused(-errno.ECONNRESET, first)
    bench.cluster.refuse.clear()
    await second
    assert disk.id in bench.reactor.handles


# --- removal


@on_bench(reactors=2)
async def test_removal_closes_what_holders_let_go(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    disk = bench.registry.find("M")
    await bench.open("M", 0)
    await bench.open("M", 1)

    async def let_go(bdev: Bdev) -> None:
        for reactor in bench.cluster.reactors:
            await bench.registry.close(bdev, reactor)

    bench.registry.on_removed(disk, let_go)
    assert await bench.rpc("bdev_malloc_delete", name="M") is True
    assert [reactor.handles for reactor in bench.cluster.reactors] == [{}, {}]
    assert list(bench.registry) == []
    assert bench.slots.allocate() == disk.slot


@on_bench()
async def test_a_handle_that_is_kept_fails_requests_until_it_is_closed(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    disk = bench.registry.find("M")
    io = await bench.open("M")
    await bench.rpc("bdev_malloc_delete", name="M")
    with pytest.raises(OSError, match="No such device"):
        io.read(0, 512)
    await bench.rpc("bdev_malloc_create", name="M", **DISK)  # the name is free again
    assert bench.registry.find("M").slot != disk.slot
    await bench.registry.close(disk, bench.reactor)
    assert bench.reactor.handles == {}
    assert bench.slots.allocate() == disk.slot


@on_bench()
async def test_removal_waits_for_requests_in_flight(bench: Bench, tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 << 10))
    await bench.rpc("bdev_uring_create", name="U", filename=str(path))
    io = await bench.open("U")
    requests = [io.start(Op.WRITE, i * 512, buffers=[b"w" * 512]) for i in range(64)]
    await bench.rpc("bdev_uring_delete", name="U")
    assert all(request.done for request in requests)
    for request in requests:
        request.finish()
    assert path.read_bytes()[: 64 * 512] == b"w" * (64 * 512)


@on_bench()
async def test_a_removal_that_takes_too_long_says_so_and_can_be_tried_again(
    bench: Bench, tmp_path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    await bench.rpc("bdev_uring_create", name="U", filename=str(path))
    io = await bench.open("U")
    request = io.start(Op.READ, buffers=[pages(4096)])
    removal = bench.registry.remove("U", timeout=0.02)
    message = await refused(-errno.ETIMEDOUT, closing_without_turns(bench, removal))
    assert message.startswith("1 requests are in flight")
    with pytest.raises(OSError, match="No such device"):
        io.read(0, 512)
    await refused(-errno.ENODEV, bench.rpc("bdev_get_bdevs", name="U"))
    request.finish()
    await bench.registry.remove("U")
    await refused(-errno.ENODEV, bench.registry.remove("U"))


@on_bench()
async def test_a_disk_that_is_being_removed_cannot_be_opened_or_removed(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    disk = bench.registry.find("M")
    await bench.open("M")
    seen = []

    async def look(bdev: Bdev) -> None:
        seen.append(await refused(-errno.ENODEV, bench.registry.open(bdev, bench.reactor)))
        seen.append(await refused(-errno.EEXIST, bench.rpc("bdev_null_create", name="M", **DISK)))

    bench.registry.on_removed(disk, look)
    removal = asyncio.create_task(bench.registry.remove("M"))
    await asyncio.sleep(0)
    await refused(-errno.EBUSY, bench.registry.remove("M"))
    await removal
    assert len(seen) == 2


@on_bench()
async def test_a_holder_that_raises_stops_nothing(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", **DISK)
    disk = bench.registry.find("N")
    told = []

    async def broken(_: Bdev) -> None:
        raise RuntimeError("a bug")

    async def sound(bdev: Bdev) -> None:
        told.append(bdev)

    bench.registry.on_removed(disk, broken)
    bench.registry.on_removed(disk, sound)
    await bench.rpc("bdev_null_delete", name="N")
    assert told == [disk]


@pytest.mark.parametrize("told_first", [True, False])
@on_bench()
async def test_a_reactor_that_dies_during_a_removal_does_not_stop_it(
    bench: Bench, told_first: bool
) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    disk = bench.registry.find("M")
    await bench.open("M")
    bench.cluster.refuse["bdev_remove"] = OperationError(-errno.ECONNRESET, "reactor-0 died")
    removal = asyncio.create_task(bench.registry.remove("M"))
    await asyncio.sleep(0)
    if told_first:
        await bench.registry.reactor_lost(bench.reactor)
    await removal
    await bench.registry.reactor_lost(bench.reactor)
    assert list(bench.registry) == []
    assert bench.slots.allocate() == disk.slot


# --- resizing


@on_bench(reactors=2)
async def test_a_new_size_reaches_every_open_handle_and_the_holders(bench: Bench, tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    await bench.rpc("bdev_uring_create", name="U", filename=str(path), block_size=512)
    disk = bench.registry.find("U")
    ios = [await bench.open("U", i) for i in range(2)]
    told = []

    async def resized(bdev: Bdev) -> None:
        told.append(bdev.num_blocks)

    bench.registry.on_resized(disk, resized)
    path.write_bytes(b"g" * 16384)
    assert await bench.rpc("bdev_uring_rescan", name="U") is True
    assert told == [32]
    assert [io.read(12288, 4096) for io in ios] == [b"g" * 4096] * 2
    await bench.rpc("bdev_uring_rescan", name="U")
    assert told == [32]  # nothing has changed

    path.write_bytes(b"s" * 4096)
    await bench.rpc("bdev_aio_rescan", name="U")
    assert told == [32, 8]
    for io in ios:
        with pytest.raises(OSError, match="READ") as caught:
            io.read(4096, 512)
        assert caught.value.errno == errno.ERANGE


@on_bench()
async def test_forgotten_callbacks_are_not_called(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", **DISK)
    disk = bench.registry.find("N")
    told = []

    async def callback(bdev: Bdev) -> None:
        told.append(bdev)

    bench.registry.on_removed(disk, callback)
    bench.registry.forget_callbacks(disk, callback)
    await bench.rpc("bdev_null_delete", name="N")
    assert told == []


@on_bench()
async def test_a_claim_excludes_others_until_it_is_released(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", **DISK)
    disk = bench.registry.find("N")
    bench.registry.claim(disk, "controller c0")
    with pytest.raises(OperationError, match="controller c0"):
        bench.registry.claim(disk, "controller c1")
    assert (await bench.rpc("bdev_get_bdevs", name="N"))[0]["claimed"] is True
    bench.registry.release(disk, "controller c0")
    bench.registry.claim(disk, "controller c1")


@on_bench()
async def test_more_disks_than_slots_is_a_clear_error(bench: Bench) -> None:
    for i in range(64):
        await bench.rpc("bdev_null_create", name=f"N{i}", **DISK)
    with pytest.raises(OSError, match="slots are in use"):
        await bench.rpc("bdev_malloc_create", name="M", **DISK)
    assert "M" not in {disk.name for disk in bench.registry}
