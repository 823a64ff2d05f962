"""Copy-on-write disks: what is copied when, what is kept, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdev import overlay
from bdev.cow import CowBdev
from bdev.io import Op
from reactor.errors import OperationError
from reactor.native import ffi, lib
from tests.support.bdevs import Bench, on_bench
from tests.support.cow import make_base, make_cow
from tests.support.tmpfs import small_tmpfs

CLUSTER = 4096
SIZE = 256 << 10
BASE = random.Random(5).randbytes(SIZE)


def disk(bench: Bench, name: str = "C") -> CowBdev:
    return bench.registry.find_as(name, CowBdev)


async def describe(bench: Bench, name: str = "C") -> dict[str, Any]:
    (entry,) = await bench.rpc("bdev_get_bdevs", name=name)
    found: dict[str, Any] = entry["driver_specific"]["cow"]
    return found


async def make_again(bench: Bench, path: Path, **params: Any) -> None:
    await bench.rpc("bdev_cow_delete", name="C")
    await bench.rpc("bdev_cow_create", name="C", base="B", overlay=str(path), **params)


# --- what is where


@on_bench()
async def test_what_was_not_written_is_the_base_and_the_base_stays(bench: Bench) -> None:
    path = await make_cow(bench, BASE)
    io = await bench.open("C")
    io.write(3 * CLUSTER + 512, b"w" * 1024)
    expected = bytearray(BASE)
    expected[3 * CLUSTER + 512 : 3 * CLUSTER + 1536] = b"w" * 1024
    assert io.read(0, SIZE) == expected
    assert disk(bench).present() == 1
    assert (path.parent / "B").read_bytes() == BASE
    await bench.close("C")


@on_bench()
async def test_disks_on_one_base_are_apart(bench: Bench) -> None:
    path = await make_cow(bench, BASE)
    await bench.rpc("bdev_cow_create", name="D", base="B", overlay=f"{path}-2", cluster_size=8192)
    one, other = await bench.open("C"), await bench.open("D")
    one.write(0, b"1" * 512)
    other.write(512, b"2" * 512)
    assert one.read(0, 1024) == b"1" * 512 + BASE[512:1024]
    assert other.read(0, 1024) == BASE[:512] + b"2" * 512
    await bench.close("C")
    await bench.close("D")


@on_bench()
async def test_it_is_as_it_was_left(bench: Bench) -> None:
    path = await make_cow(bench, BASE)
    io = await bench.open("C")
    io.write(CLUSTER - 512, b"x" * 1024)
    io.unmap(8 * CLUSTER, 4 * CLUSTER)
    before = io.read(0, SIZE)
    uuid = disk(bench).uuid
    await bench.close("C")
    await make_again(bench, path)
    assert disk(bench).uuid == uuid
    assert disk(bench).present() == 6
    io = await bench.open("C")
    assert io.read(0, SIZE) == before
    await bench.close("C")


@pytest.mark.parametrize("op", [Op.UNMAP, Op.WRITE_ZEROES])
@on_bench()
async def test_what_is_discarded_reads_as_zeroes(bench: Bench, op: Op) -> None:
    """Clusters of the base and of the overlay alike, though the base has data there."""
    path = await make_cow(bench, BASE)
    io = await bench.open("C")
    io.write(2 * CLUSTER, b"y" * CLUSTER)
    io.start(op, CLUSTER, 20 * CLUSTER).finish()
    assert io.read(0, SIZE) == BASE[:CLUSTER] + bytes(20 * CLUSTER) + BASE[21 * CLUSTER :]
    io.flush()
    await bench.close("C")
    if op is Op.UNMAP:
        assert path.stat().st_blocks * 512 < 64 << 10, "holes take no room"
    await make_again(bench, path)
    io = await bench.open("C")
    assert io.read(CLUSTER, 20 * CLUSTER) == bytes(20 * CLUSTER)
    await bench.close("C")


@on_bench()
async def test_a_discarded_part_of_a_cluster_is_left_alone(bench: Bench) -> None:
    await make_cow(bench, BASE)
    io = await bench.open("C")
    io.unmap(512, CLUSTER - 512)
    assert disk(bench).present() == 0
    io.write_zeroes(512, 1024)
    assert io.read(0, CLUSTER) == BASE[:512] + bytes(1024) + BASE[1536:CLUSTER]
    await bench.close("C")


@on_bench()
async def test_it_may_be_larger_than_its_base(bench: Bench) -> None:
    """By no whole cluster: what the base does not have are zeroes."""
    small = BASE[: 5 * CLUSTER + 512]
    await make_cow(bench, small, num_blocks=200)
    io = await bench.open("C")
    assert io.read(0, 200 * 512) == small.ljust(200 * 512, b"\0")
    io.write(5 * CLUSTER + 2048, b"a" * 512)
    io.write(199 * 512, b"z" * 512)
    expected = bytearray(small.ljust(200 * 512, b"\0"))
    expected[5 * CLUSTER + 2048 : 5 * CLUSTER + 2560] = b"a" * 512
    expected[199 * 512 :] = b"z" * 512
    assert io.read(0, 200 * 512) == expected
    io.unmap(12 * CLUSTER, 4 * CLUSTER)
    assert disk(bench).present() == 2, "there is nothing to hide where the base has nothing"
    await bench.close("C")


# --- copying


@on_bench()
async def test_a_cluster_is_copied_once_for_all_who_write_to_it(bench: Bench) -> None:
    await make_cow(bench, BASE, cluster_size=65536)
    io = await bench.open("C")
    stats = bench.reactor.stats.slot(bench.registry.find("B").slot, "struct bdev_stats")
    before = stats.ops[Op.READ]
    requests = [io.start(Op.WRITE, i * 1024, buffers=[bytes([i]) * 512]) for i in range(64)]
    for request in requests:
        request.finish()
    assert stats.ops[Op.READ] == before + 1
    for i in range(64):
        assert io.read(i * 1024, 1024) == bytes([i]) * 512 + BASE[i * 1024 + 512 : (i + 1) * 1024]
    await bench.close("C")


@on_bench()
async def test_whole_clusters_are_written_without_reading_the_base(bench: Bench) -> None:
    await make_cow(bench, BASE)
    io = await bench.open("C")
    stats = {
        name: bench.reactor.stats.slot(bench.registry.find(name).slot, "struct bdev_stats")
        for name in ("B", "C.overlay")
    }
    before = stats["B"].ops[Op.READ]
    io.write(0, b"n" * SIZE)
    assert stats["B"].ops[Op.READ] == before
    assert stats["C.overlay"].bytes[Op.WRITE] < SIZE + 64 * 512, "the data once, and the map"
    assert stats["C.overlay"].ops[Op.FLUSH] < 64, "clusters share flushes"
    assert io.read(0, SIZE) == b"n" * SIZE
    await bench.close("C")


@on_bench()
async def test_a_request_on_copied_clusters_is_one_request_below(bench: Bench) -> None:
    await make_cow(bench, BASE)
    io = await bench.open("C")
    io.write(0, b"n" * SIZE)
    stats = bench.reactor.stats.slot(bench.registry.find("C.overlay").slot, "struct bdev_stats")
    reads, writes = stats.ops[Op.READ], stats.ops[Op.WRITE]
    io.read(512, SIZE - 512)
    io.write(512, b"m" * (SIZE - 512))
    assert (stats.ops[Op.READ] - reads, stats.ops[Op.WRITE] - writes) == (1, 1)
    await bench.close("C")


@on_bench()
async def test_copy_on_read_copies_what_is_read(bench: Bench) -> None:
    await make_cow(bench, BASE, copy_on_read=True)
    io = await bench.open("C")
    assert io.read(CLUSTER + 512, 2 * CLUSTER) == BASE[CLUSTER + 512 : 3 * CLUSTER + 512]
    assert disk(bench).missing(1) == 4, "clusters 1 to 3"
    assert io.read(0, SIZE) == BASE
    assert disk(bench).present() == SIZE // CLUSTER
    await bench.close("C")


@on_bench(2)
async def test_two_reactors_may_want_the_same_clusters(bench: Bench) -> None:
    """Each writes every other block of all clusters, together: nothing gets lost."""
    await make_cow(bench, BASE)
    ios = [await bench.open("C", reactor) for reactor in range(2)]
    requests = [
        ios[block % 2].start(Op.WRITE, block * 512, buffers=[bytes([block % 251]) * 512])
        for block in range(SIZE // 512)
    ]
    await asyncio.wait_for(asyncio.gather(*(one.completed() for one in requests)), 20)
    assert disk(bench).present() == SIZE // CLUSTER
    wanted = b"".join(bytes([block % 251]) * 512 for block in range(SIZE // 512))
    assert ios[1].read(0, SIZE) == wanted
    for reactor in range(2):
        await bench.close("C", reactor)


@on_bench(2)
async def test_a_claim_ends_with_its_reactor(bench: Bench) -> None:
    """As if the other one had died in the middle of a copy, and of writing the map."""
    await make_cow(bench, BASE)
    io = await bench.open("C")
    shared = disk(bench)._shared.struct
    claims = ffi.cast("uint16_t *", ffi.cast("char *", shared) + shared.claims)
    locks = ffi.cast("uint16_t *", ffi.cast("char *", shared) + shared.locks)
    claims[5] = locks[0] = 2
    held = [io.start(Op.WRITE, n * CLUSTER, buffers=[b"h" * 512]) for n in (5, 6)]
    for _ in range(100):
        bench.reactor.selector.select(0.0002)
    assert not any(request.done for request in held)
    await disk(bench).recovered(bench.cluster.reactors[1])
    for request in held:
        request.finish()
    assert io.read(5 * CLUSTER, 1024) == b"h" * 512 + BASE[5 * CLUSTER + 512 :][:512]
    await bench.close("C")


@on_bench()
async def test_a_reactor_may_die_that_still_has_it_open_when_it_is_gone(bench: Bench) -> None:
    await make_cow(bench, BASE)
    await bench.open("C")
    await bench.rpc("bdev_cow_delete", name="C")
    await bench.reactor.stop()
    await bench.registry.reactor_lost(bench.reactor)
    assert [bdev.claims for bdev in bench.registry] == [[]]


# --- filling


async def until_filled(bench: Bench) -> dict[str, Any]:
    """Return how the disk is once its fill has ended."""
    with contextlib.suppress(OperationError):
        await asyncio.wait_for(disk(bench).fill.wait(), 20)
    return await describe(bench)


@on_bench()
async def test_filling_copies_all_that_the_base_has(bench: Bench) -> None:
    path = await make_cow(bench, BASE, num_blocks=1000)
    await bench.rpc("bdev_cow_fill", name="C")
    state = await until_filled(bench)
    assert state["fill"] == {"running": False, "complete": True, "error": None}
    assert state["num_allocated_clusters"] == SIZE // CLUSTER
    assert path.read_bytes()[disk(bench).layout.data_offset :][:SIZE] == BASE
    assert not bench.reactor.handles, "nobody has it open any more"


@on_bench(2)
async def test_guests_write_while_it_is_filled(bench: Bench) -> None:
    await make_cow(bench, BASE)
    io = await bench.open("C", 1)
    await bench.rpc("bdev_cow_fill", name="C")
    expected = bytearray(BASE)
    for block in range(0, SIZE // 512, 3):
        expected[block * 512 : (block + 1) * 512] = b"g" * 512
        await io.start(Op.WRITE, block * 512, buffers=[b"g" * 512]).completed()
    assert (await until_filled(bench))["fill"]["complete"]
    assert io.read(0, SIZE) == expected
    await bench.close("C", 1)


@on_bench()
async def test_a_stopped_fill_goes_on_where_it_was(bench: Bench) -> None:
    await make_cow(bench, BASE)
    await bench.rpc("bdev_cow_fill", name="C", action="stop")
    await bench.rpc("bdev_cow_fill", name="C", action="start")
    await bench.rpc("bdev_cow_fill", name="C", action="stop")
    assert not (await describe(bench))["fill"]["running"]
    await bench.rpc("bdev_cow_fill", name="C", action="start")
    assert (await until_filled(bench))["fill"]["complete"]


@on_bench()
async def test_a_disk_may_be_deleted_while_it_is_filled(bench: Bench) -> None:
    await make_cow(bench, BASE)
    await bench.rpc("bdev_cow_fill", name="C")
    await asyncio.sleep(0)
    await bench.rpc("bdev_cow_delete", name="C")
    assert [bdev.name for bdev in bench.registry] == ["B"]
    assert not bench.reactor.handles


@on_bench()
async def test_what_a_fill_fails_with_is_shown(bench: Bench) -> None:
    path = await make_cow(bench, BASE)
    os.truncate(path.parent / "B", SIZE // 2)
    await bench.rpc("bdev_cow_fill", name="C")
    state = await until_filled(bench)
    assert "Input/output error" in state["fill"]["error"]
    assert not state["fill"]["complete"]


# --- configuration and life


@on_bench()
async def test_a_saved_configuration_makes_it_again(bench: Bench) -> None:
    await make_cow(bench, BASE, copy_on_read=True)
    io = await bench.open("C")
    io.write(0, b"s" * 512)
    await bench.close("C")
    calls = bench.registry.config()
    assert [call["method"] for call in calls] == ["bdev_uring_create", "bdev_cow_create"]
    for name in ("C", "B"):
        kind = "cow" if name == "C" else "uring"
        await bench.rpc(f"bdev_{kind}_delete", name=name)
    for call in calls:
        await bench.rpc(call["method"], **call["params"])
    assert bench.registry.config() == calls
    io = await bench.open("C")
    assert io.read(0, 1024) == b"s" * 512 + BASE[512:1024]
    await bench.close("C")


@on_bench()
async def test_it_goes_when_its_base_is_pulled(bench: Bench) -> None:
    await make_cow(bench, BASE)
    await bench.registry.remove("B", unplug=True)
    assert list(bench.registry) == []


@on_bench()
async def test_its_parts_are_not_deleted_under_it(bench: Bench) -> None:
    await make_cow(bench, BASE)
    for name in ("B", "C.overlay"):
        with pytest.raises(OperationError, match="claimed by cow C") as refused:
            await bench.rpc("bdev_uring_delete", name=name)
        assert refused.value.code == -errno.EBUSY


# --- what is refused


@on_bench()
async def test_a_base_that_can_be_written_is_refused(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=64)
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(OperationError, match="can be written"):
            await bench.rpc("bdev_cow_create", name="C", base="M", overlay=f"{folder}/o")
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cluster_size": 5000}, "cluster_size 5000: must be a power of two"),
        ({"cluster_size": 2048}, "cluster_size 2048: must be a power of two, 4096"),
        ({"num_blocks": 511}, "num_blocks 511: is less than the 512 of the base"),
        ({"num_blocks": 1 << 50}, "clusters are more than"),
        ({"name": "B"}, "File exists: bdev 'B'"),
        ({"base": "X"}, "No such device"),
        ({"uuid": "nonsense"}, "uuid 'nonsense'"),
        ({"overlay": "/nonexistent/file"}, "overlay /nonexistent/file: No such file"),
    ],
)
@on_bench()
async def test_bad_parameters_leave_nothing_behind(
    bench: Bench, params: dict[str, Any], message: str
) -> None:
    folder = await make_base(bench, BASE)
    wanted = {"name": "C", "base": "B", "overlay": str(folder / "o"), **params}
    with pytest.raises(OperationError, match=message):
        await bench.rpc("bdev_cow_create", **wanted)
    assert os.listdir(folder) == ["B"]
    assert [bdev.name for bdev in bench.registry] == ["B"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cluster_size": 8192}, "cluster_size 8192: overlay .* has 4096"),
        ({"num_blocks": 1024}, "num_blocks 1024: overlay .* has 512"),
        ({"uuid": "11111111-2222-3333-4444-555555555555"}, "uuid 11111111.*: overlay .* has"),
        ({"base": "B2"}, "was made on the base .* and bdev B2 is"),
    ],
)
@on_bench()
async def test_an_overlay_is_what_it_was_made_as(
    bench: Bench, params: dict[str, Any], message: str
) -> None:
    path = await make_cow(bench, BASE)
    await make_base(bench, BASE, "B2")
    await bench.rpc("bdev_cow_delete", name="C")
    with pytest.raises(OperationError, match=message):
        await bench.rpc(
            "bdev_cow_create", **{"name": "C", "base": "B", "overlay": str(path), **params}
        )
    assert path.exists()
    await bench.rpc("bdev_cow_create", name="C", base="B", overlay=str(path))


@on_bench()
async def test_a_base_of_another_size_is_refused(bench: Bench) -> None:
    path = await make_cow(bench, BASE)
    await bench.rpc("bdev_cow_delete", name="C")
    uuid = bench.registry.find("B").uuid
    await bench.rpc("bdev_uring_delete", name="B")
    base = path.parent / "B"
    os.truncate(base, SIZE // 2)
    await bench.rpc(
        "bdev_uring_create",
        name="B",
        filename=str(base),
        block_size=512,
        readonly=True,
        uuid=uuid,
    )
    with pytest.raises(OperationError, match="was made on 512 blocks of 512 bytes, and bdev B has"):
        await bench.rpc("bdev_cow_create", name="C", base="B", overlay=str(path))


@on_bench()
async def test_an_overlay_serves_one_disk(bench: Bench) -> None:
    path = await make_cow(bench, BASE)
    with pytest.raises(OperationError, match="served already") as refused:
        await bench.rpc("bdev_cow_create", name="D", base="B", overlay=str(path))
    assert refused.value.code == -errno.EBUSY


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def fake_stray_bits(path: Path, _offset: int) -> None:
    """Say, with a checksum that is right, that there are clusters after the last one."""
    with path.open("r+b") as file:
        file.seek(overlay.MAP_OFFSET)
        block = bytearray(file.read(512))
        block[-1] = 0x80
        block[:4] = zlib.crc32(block[4:]).to_bytes(4, "little")
        file.seek(overlay.MAP_OFFSET)
        file.write(block)


@pytest.mark.parametrize(
    ("damage", "at", "code", "message"),
    [
        (flip, 0, -errno.EINVAL, "is not the overlay"),
        (flip, 13, -errno.EINVAL, "has version"),
        (flip, 20, -errno.EBADMSG, "its header is damaged"),
        (flip, 300, -errno.EBADMSG, "its header is damaged"),
        (flip, overlay.MAP_OFFSET, -errno.EBADMSG, "block 0 of its map is damaged"),
        (flip, overlay.MAP_OFFSET + 4, -errno.EBADMSG, "block 0 of its map is damaged"),
        (flip, overlay.MAP_OFFSET + 100, -errno.EBADMSG, "block 0 of its map is damaged"),
        (fake_stray_bits, 0, -errno.EBADMSG, "has clusters after the last one"),
        (os.truncate, 100, -errno.EINVAL, "is not the overlay"),
        (os.truncate, 8192, -errno.EBADMSG, "it has 8192 bytes of"),
    ],
)
@on_bench()
async def test_a_damaged_overlay_is_refused(
    bench: Bench, damage: Any, at: int, code: int, message: str
) -> None:
    path = await make_cow(bench, BASE)
    await bench.rpc("bdev_cow_delete", name="C")
    damage(path, at)
    contents = path.read_bytes()
    with pytest.raises(OperationError, match=message) as refused:
        await bench.rpc("bdev_cow_create", name="C", base="B", overlay=str(path))
    assert refused.value.code == code
    assert path.read_bytes() == contents
    assert [bdev.name for bdev in bench.registry] == ["B"]


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path, 256 << 10) as folder:
        yield folder


@on_bench()
async def test_a_full_file_system_fails_writes_and_harms_nothing(
    bench: Bench, small_file_system: Path
) -> None:
    await make_base(bench, BASE)
    path = str(small_file_system / "overlay")
    await bench.rpc("bdev_cow_create", name="C", base="B", overlay=path, cluster_size=4096)
    io = await bench.open("C")
    kept: dict[int, bytes] = {}
    failures = []
    for cluster in range(SIZE // CLUSTER):
        data = bytes([cluster]) * 512
        try:
            io.write(cluster * CLUSTER + 1024, data)
            kept[cluster] = data
        except OSError as error:
            failures.append(error.errno)
    assert set(failures) == {errno.ENOSPC}
    assert len(kept) > 30

    def expected() -> bytes:
        image = bytearray(BASE)
        for cluster, data in kept.items():
            image[cluster * CLUSTER + 1024 : cluster * CLUSTER + 1536] = data
        return bytes(image)

    assert io.read(0, SIZE) == expected()
    io.unmap(0, 8 * CLUSTER)  # makes room; only what is in the overlay has any
    full = max(set(range(SIZE // CLUSTER)) - set(kept))
    io.write(full * CLUSTER + 1024, b"r" * 512)
    kept[full] = b"r" * 512
    image = bytes(8 * CLUSTER) + expected()[8 * CLUSTER :]
    assert io.read(0, SIZE) == image
    await bench.close("C")
    await bench.rpc("bdev_cow_delete", name="C")
    await bench.rpc("bdev_cow_create", name="C", base="B", overlay=path)
    assert (await bench.open("C")).read(0, SIZE) == image
    await bench.close("C")
    await bench.rpc("bdev_cow_delete", name="C")


# --- against a model


@given(data=st.binary(max_size=600))
def test_the_checksum_is_zlibs(data: bytes) -> None:
    assert lib.bitmap_checksum(data, len(data)) == zlib.crc32(data)


BLOCKS = SIZE // 512
STEPS = st.lists(
    st.tuples(
        st.sampled_from([Op.READ, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.UNMAP, "fill", "again"]),
        st.integers(0, BLOCKS - 1),
        st.one_of(st.integers(1, 20), st.integers(1, BLOCKS)),
        st.integers(0, 1),  # the reactor
        st.integers(1, 255),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    script=STEPS,
    cluster_size=st.sampled_from([4096, 16384, 131072]),
    copy_on_read=st.booleans(),
)
def test_whatever_is_done_to_it_it_is_a_row_of_bytes(
    script: list[Any], cluster_size: int, copy_on_read: bool
) -> None:
    async def main() -> None:
        async with Bench(2) as bench:
            path = await make_cow(bench, BASE, cluster_size=cluster_size, copy_on_read=copy_on_read)
            model = bytearray(BASE)
            for op, first, count, reactor, fill in script:
                length = min(count, BLOCKS - first) * 512
                if op == "again":
                    await make_again(bench, path)
                elif op == "fill":
                    await bench.rpc("bdev_cow_fill", name="C")
                else:
                    await apply(bench, model, op, first * 512, length, reactor, fill)
            io = await bench.open("C")
            back = bytearray(SIZE)
            await io.start(Op.READ, 0, buffers=[back]).completed()
            assert back == model
            await bench.close("C")
            await bench.rpc("bdev_cow_delete", name="C")

    asyncio.run(main())


async def apply(
    bench: Bench, model: bytearray, op: Op, offset: int, length: int, reactor: int, fill: int
) -> None:
    span = slice(offset, offset + length)
    buffer = bytearray(bytes([fill]) * length)
    io = await bench.open("C", reactor)
    moves = op in (Op.READ, Op.WRITE)
    await io.start(op, offset, 0 if moves else length, [buffer] if moves else []).completed()
    if op is Op.READ:
        assert buffer == model[span]
    elif op is Op.WRITE:
        model[span] = buffer
    elif op is Op.WRITE_ZEROES:
        model[span] = bytes(length)
    else:  # a discarded part of a cluster may stay: what is read afterwards is right
        await io.start(Op.READ, offset, buffers=[buffer]).completed()
        assert all(
            buffer[at : at + 512] in (bytes(512), model[offset + at : offset + at + 512])
            for at in range(0, length, 512)
        )
        model[span] = buffer
    await bench.close("C", reactor)
