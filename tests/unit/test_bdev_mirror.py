"""Mirrors: legs are the same, fail, come back and are rebuilt; and what does not go together."""

from __future__ import annotations

import asyncio
import errno
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdev.io import Op
from bdev.mirror_super import DATA_OFFSET, LOG_OFFSET
from bdev.stacked import MAX_DEPTH, depth
from reactor.errors import OperationError
from reactor.native import ffi, lib
from tests.support.bdevs import Bench, on_bench
from tests.support.mirror import (
    MIB,
    assert_same,
    contents,
    create,
    describe,
    make_legs,
    make_mirror,
    mirror,
    read,
    until_let_go,
    until_same,
    write,
)

SIZE = 4 * MIB


def stats(bench: Bench, name: str, reactor: int = 0) -> Any:
    slot = bench.registry.find(name).slot
    return bench.cluster.reactors[reactor].stats.slot(slot, "struct bdev_stats")


async def make_faulty(bench: Bench, count: int = 2) -> None:
    """Create R on EE_M0, EE_M1 ..., legs in memory that can be made to fail."""
    for i in range(count):
        blocks = (DATA_OFFSET + SIZE) >> 9
        await bench.rpc("bdev_malloc_create", name=f"M{i}", block_size=512, num_blocks=blocks)
        await bench.rpc("bdev_error_create", base_name=f"M{i}")
    await create(bench, *(f"EE_M{i}" for i in range(count)))


async def fail(bench: Bench, leg: int, io_type: str = "all") -> None:
    await bench.rpc(
        "bdev_error_inject_error",
        name=f"EE_M{leg}",
        io_type=io_type,
        error_type="failure",
        rate=100.0,
    )


# --- legs are the same


@on_bench()
async def test_every_leg_has_what_is_written(bench: Bench) -> None:
    await make_mirror(bench, 3)
    io = await bench.open("R")
    await write(io, 512, b"w" * 2048)
    await io.start(Op.WRITE_ZEROES, 1024, 512).completed()
    expected = bytes(512) + b"w" * 512 + bytes(512) + b"w" * 1024
    assert await read(io, 0, 2560) == expected
    assert (await assert_same(bench, SIZE, "M0", "M1", "M2"))[:2560] == expected
    await bench.close("R")


@on_bench()
async def test_legs_are_the_same_after_a_discard(bench: Bench) -> None:
    """Each of them could return anything for a range that was unmapped: they get zeroes."""
    await make_mirror(bench)
    io = await bench.open("R")
    await write(io, 0, random.Random(1).randbytes(SIZE))
    await io.start(Op.UNMAP, 4096, 3 * MIB).completed()
    assert (await assert_same(bench, SIZE, "M0", "M1"))[4096 : 4096 + 3 * MIB] == bytes(3 * MIB)
    await bench.close("R")


@on_bench()
async def test_reads_are_shared_by_the_legs(bench: Bench) -> None:
    await make_mirror(bench)
    io = await bench.open("R")
    before = [stats(bench, leg).ops[Op.READ] for leg in ("M0", "M1")]
    for _ in range(20):
        await read(io, 0, 4096)
    after = [stats(bench, leg).ops[Op.READ] for leg in ("M0", "M1")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [10, 10]
    await bench.close("R")


@on_bench()
async def test_a_flush_reaches_every_leg(bench: Bench) -> None:
    await make_mirror(bench)
    io = await bench.open("R")
    await io.start(Op.FLUSH).completed()
    assert [stats(bench, leg).ops[Op.FLUSH] for leg in ("M0", "M1")] == [1, 1]
    await bench.close("R")


@on_bench()
async def test_legs_that_held_other_data_become_the_first(bench: Bench) -> None:
    paths = await make_legs(bench, 2)
    data = [random.Random(seed).randbytes(SIZE) for seed in (1, 2)]
    for path, one in zip(paths, data, strict=True):
        path.write_bytes(bytes(DATA_OFFSET) + one)
    await create(bench, "F0", "F1")
    io = await bench.open("R")
    for at in range(0, SIZE, MIB // 2):
        assert await read(io, at, 512) == data[0][at : at + 512], "while they differ, too"
    await until_same(bench)
    assert await assert_same(bench, SIZE, "F0", "F1") == data[0]
    await bench.close("R")


# --- the log


def log_of(path: Path, block: int = 0) -> bytes:
    with path.open("rb") as file:
        file.seek(LOG_OFFSET + block * 512)
        data = file.read(512)
    assert int.from_bytes(data[:4], "little") == zlib.crc32(data[4:])
    return data[8:]


@on_bench()
async def test_a_bit_is_on_every_leg_before_data_are_on_any(bench: Bench) -> None:
    """What the first write of a region does to a leg: the log, durably, then the data."""
    paths = await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    await mirror(bench).settle()
    assert [log_of(path) for path in paths] == [bytes(504)] * 2
    await bench.rpc("bdev_raid_delete", name="R")
    for leg in ("F0", "F1"):
        await bench.rpc("bdev_error_create", base_name=leg)
    await create(bench, "EE_F0", "EE_F1")
    io = await bench.open("R")
    for leg in ("EE_F0", "EE_F1"):
        await bench.rpc(
            "bdev_error_inject_error", name=leg, io_type="write", error_type="pending", num=1
        )
    request = io.start(Op.WRITE, 2 * MIB, buffers=[b"d" * 512])
    for _ in range(200):
        await asyncio.sleep(0)
    assert [log_of(path)[0] for path in paths] == [0, 0], "what is held back is the log"
    assert all(path.read_bytes()[DATA_OFFSET + 2 * MIB] == 0 for path in paths)
    for leg in ("EE_F0", "EE_F1"):
        await bench.rpc("bdev_error_resume_pending", name=leg)
    await asyncio.wait_for(request.completed(), 20)
    assert [log_of(path)[0] for path in paths] == [4, 4]
    second = io.start(Op.WRITE, 2 * MIB + 4096, buffers=[b"d" * 512])
    before = stats(bench, "F0").ops[Op.WRITE]
    await second.completed()
    assert stats(bench, "F0").ops[Op.WRITE] == before + 1, "the bit is there already"
    await bench.close("R")


@on_bench()
async def test_bits_are_cleared_when_nothing_is_written_any_more(bench: Bench) -> None:
    paths = await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    io = await bench.open("R")
    await write(io, 0, b"x" * 512)
    await write(io, 3 * MIB, b"x" * 512)
    assert (await describe(bench))["write_intent"]["dirty"] >= 2
    flushes = stats(bench, "F1").ops[Op.FLUSH]
    await mirror(bench).settle()
    assert (await describe(bench))["write_intent"]["dirty"] == 0
    assert [log_of(path) for path in paths] == [bytes(504)] * 2
    assert stats(bench, "F1").ops[Op.FLUSH] > flushes, "only what is durable is clean"
    await write(io, 0, b"y" * 512)
    assert [log_of(path)[0] for path in paths] == [1, 1]
    await bench.close("R")


@on_bench()
async def test_work_on_the_log_waits_for_other_work_on_it(bench: Bench) -> None:
    await make_mirror(bench)
    io = await bench.open("R")
    await write(io, 0, b"x" * 512)
    await asyncio.gather(
        *(mirror(bench).settle() for _ in range(3)),
        *(mirror(bench).job(kind) for kind in (lib.MIRROR_WRITE_ALL, lib.MIRROR_FLUSH)),
    )
    assert (await describe(bench))["write_intent"]["dirty"] == 0
    await bench.close("R")


@on_bench()
async def test_a_region_in_use_is_not_cleared(bench: Bench) -> None:
    await make_faulty(bench)
    io = await bench.open("R")
    await write(io, 0, b"x" * 512)
    await bench.rpc(
        "bdev_error_inject_error", name="EE_M1", io_type="write", error_type="pending", num=1
    )
    request = io.start(Op.WRITE, 4096, buffers=[b"y" * 512])
    await mirror(bench).settle()
    assert (await describe(bench))["write_intent"]["dirty"] == 1
    await bench.rpc("bdev_error_resume_pending", name="EE_M1")
    await request.completed()
    await bench.close("R")


@on_bench()
async def test_after_a_crash_legs_are_made_the_same_where_they_may_differ(bench: Bench) -> None:
    """The last write got to one leg only, and a byte changed where nothing was written."""
    paths = await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    await mirror(bench).settle()
    io = await bench.open("R")
    await write(io, MIB, b"n" * 4096)
    images = [path.read_bytes() for path in paths]  # as all processes died here
    await bench.close("R")
    await bench.rpc("bdev_raid_delete", name="R")
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    with paths[1].open("r+b") as file:
        file.seek(DATA_OFFSET + MIB + 512)
        file.write(b"o" * 512)
        file.seek(DATA_OFFSET + 3 * MIB)
        file.write(b"!")
    await create(bench, "F0", "F1")
    assert (await describe(bench))["write_intent"]["suspect"] <= 1
    io = await bench.open("R")
    for _ in range(8):
        assert await read(io, MIB, 4096) == b"n" * 4096
    await until_same(bench)
    other = await contents(bench, "F1", SIZE)
    assert other[MIB : MIB + 4096] == b"n" * 4096
    assert other[3 * MIB : 3 * MIB + 1] == b"!", "only what is in the log is looked at"
    await bench.close("R")


@on_bench(2)
async def test_what_a_dead_reactor_was_writing_is_made_the_same(bench: Bench) -> None:
    """As if the other one had died between writing one leg and the other."""
    await make_mirror(bench)
    io = await bench.open("R")
    await write(io, 2 * MIB, b"a" * 1024)
    await bench.registry.write(bench.registry.find("M1"), DATA_OFFSET + 2 * MIB, b"b" * 512)
    shared = mirror(bench)._shared
    counts = ffi.cast("uint32_t *", ffi.cast("char *", shared) + shared.counts_at + 64)
    counts[2] = 1
    locks = ffi.cast("uint16_t *", ffi.cast("char *", shared) + shared.locks_at)
    locks[0] = shared.super_lock = shared.syncer = 2
    await mirror(bench).recovered(bench.cluster.reactors[1])
    for _ in range(4):
        assert await read(io, 2 * MIB, 1024) == b"a" * 1024
    await until_same(bench)
    assert (await assert_same(bench, SIZE, "M0", "M1"))[2 * MIB :][:1024] == b"a" * 1024
    await write(io, 3 * MIB, b"c" * 512)
    await bench.close("R")


# --- legs that fail, go and come


@pytest.mark.parametrize("leg", [0, 1])
@pytest.mark.parametrize("io_type", ["read", "write", "flush", "all"])
@on_bench()
async def test_a_leg_that_fails_is_dropped_and_nobody_notices(
    bench: Bench, leg: int, io_type: str
) -> None:
    await make_faulty(bench)
    io = await bench.open("R")
    await write(io, 0, b"0" * 4096)
    await fail(bench, leg, io_type)
    await asyncio.gather(*(write(io, i * 8192, bytes([i]) * 4096) for i in range(20)))
    for i in range(20):
        assert await read(io, i * 8192, 4096) == bytes([i]) * 4096
    await io.start(Op.FLUSH).completed()
    await until_let_go(bench, f"EE_M{leg}")
    state = await describe(bench)
    assert state["num_base_bdevs_operational"] == 1
    assert state["base_bdevs_list"][leg]["is_configured"] is False
    await bench.rpc("bdev_error_delete", name=f"EE_M{leg}")
    assert await read(io, 0, 4096) == bytes(4096)
    await bench.close("R")


@on_bench()
async def test_a_write_is_answered_when_it_is_on_record_who_lacks_it(bench: Bench) -> None:
    """Else the leg that failed could be taken for current after a crash."""
    paths = await make_legs(bench, 2)
    for leg in ("F0", "F1"):
        await bench.rpc("bdev_error_create", base_name=leg)
    await create(bench, "EE_F0", "EE_F1")
    await until_same(bench)
    io = await bench.open("R")
    await write(io, 0, b"0" * 512)
    await bench.rpc(
        "bdev_error_inject_error",
        name="EE_F0",
        io_type="write",
        error_type="failure",
        rate=100.0,
    )
    await write(io, 0, b"1" * 512)
    images = [path.read_bytes() for path in paths]
    await bench.close("R")
    await until_let_go(bench, "EE_F0")
    await bench.rpc("bdev_raid_delete", name="R")
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    for leg in ("F0", "F1"):
        await bench.rpc("bdev_error_delete", name=f"EE_{leg}")
    await create(bench, "F0", "F1")
    io = await bench.open("R")
    assert await read(io, 0, 512) == b"1" * 512
    await until_same(bench)
    assert (await assert_same(bench, SIZE, "F0", "F1"))[:512] == b"1" * 512
    await bench.close("R")


@on_bench()
async def test_the_last_leg_is_not_dropped_but_its_errors_are_told(bench: Bench) -> None:
    await make_faulty(bench)
    io = await bench.open("R")
    await fail(bench, 1)
    await write(io, 0, b"x" * 512)
    await fail(bench, 0)
    for op in (Op.READ, Op.WRITE):
        with pytest.raises(OSError):
            await io.start(op, 0, 0, [bytearray(512)]).completed()
    await bench.rpc("bdev_error_inject_error", name="EE_M0", io_type="clear")
    assert await read(io, 0, 512) == b"x" * 512
    await write(io, 0, b"y" * 512)
    await bench.close("R")


@on_bench()
async def test_a_leg_may_be_removed_and_another_one_added(bench: Bench) -> None:
    await make_mirror(bench)
    io = await bench.open("R")
    await write(io, 0, random.Random(3).randbytes(SIZE))
    await bench.rpc("bdev_raid_remove_base_bdev", name="M0")
    assert bench.registry.find("M0").claims == []
    await write(io, MIB, b"later" * 1024)
    blocks = (DATA_OFFSET + SIZE) >> 9
    await bench.rpc("bdev_malloc_create", name="N", block_size=512, num_blocks=blocks + 100)
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="N")
    await until_same(bench)
    state = await describe(bench)
    assert [base["name"] for base in state["base_bdevs_list"]] == ["N", "M1"]
    assert state["num_base_bdevs_operational"] == 2
    assert (await assert_same(bench, SIZE, "N", "M1"))[MIB : MIB + 5120] == b"later" * 1024
    await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
    assert await read(io, MIB, 5120) == b"later" * 1024
    await bench.close("R")


@on_bench()
async def test_a_leg_that_comes_back_gets_what_it_missed(bench: Bench) -> None:
    await make_mirror(bench)
    io = await bench.open("R")
    await write(io, 0, b"1" * SIZE)
    await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
    await write(io, MIB, b"2" * MIB)
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="M1")
    await until_same(bench)
    expected = b"1" * MIB + b"2" * MIB + b"1" * 2 * MIB
    assert await assert_same(bench, SIZE, "M0", "M1") == expected
    await bench.close("R")


@on_bench(2)
async def test_guests_write_while_a_leg_is_rebuilt(bench: Bench) -> None:
    """From both reactors, to blocks all over the disk: nothing gets lost on the new leg."""
    await make_mirror(bench)
    ios = [await bench.open("R", reactor) for reactor in range(2)]
    model = bytearray(random.Random(4).randbytes(SIZE))
    await write(ios[0], 0, bytes(model))
    await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="M1")
    chance = random.Random(6)
    seen = set()
    for turn in range(400):
        at = chance.randrange(SIZE // 4096) * 4096
        data = bytes([turn % 251]) * 4096
        model[at : at + 4096] = data
        await write(ios[turn % 2], at, data)
        state = await describe(bench)
        seen.add(state.get("process", {}).get("target"))
    assert "M1" in seen
    await until_same(bench)
    assert await assert_same(bench, SIZE, "M0", "M1") == model
    for reactor in range(2):
        await bench.close("R", reactor)


@on_bench()
async def test_a_leg_that_is_pulled_is_dropped_and_the_last_takes_the_mirror_along(
    bench: Bench,
) -> None:
    await make_mirror(bench)
    io = await bench.open("R")
    await write(io, 0, b"p" * 512)
    await bench.registry.remove("M0", unplug=True)
    assert await read(io, 0, 512) == b"p" * 512
    await write(io, 0, b"q" * 512)
    await bench.close("R")
    await bench.registry.remove("M1", unplug=True)
    assert list(bench.registry) == []


@on_bench()
async def test_a_reactor_may_die_that_still_has_it_open_when_it_is_gone(bench: Bench) -> None:
    await make_mirror(bench)
    await write(await bench.open("R"), 0, b"p" * 512)
    await bench.rpc("bdev_raid_delete", name="R")
    await bench.reactor.stop()
    await bench.registry.reactor_lost(bench.reactor)
    assert [bdev.claims for bdev in bench.registry] == [[], []]


@on_bench()
async def test_a_leg_is_added_while_others_have_news(bench: Bench) -> None:
    """Every first write to a region makes the control process look at the legs."""
    await make_mirror(bench)
    io = await bench.open("R")
    for turn in range(10):
        await mirror(bench).settle()
        await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
        writes = [
            asyncio.create_task(write(io, region * MIB, bytes([turn]) * 512)) for region in range(4)
        ]
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="M1")
        await asyncio.gather(*writes)
        await until_same(bench)
        assert (await describe(bench))["num_base_bdevs_operational"] == 2
        await assert_same(bench, SIZE, "M0", "M1")
    await bench.close("R")


@on_bench()
async def test_a_leg_is_let_go_when_its_last_request_is_over(bench: Bench) -> None:
    """Not before, and then it can be used again."""
    await make_faulty(bench)
    io = await bench.open("R")
    await bench.rpc(
        "bdev_error_inject_error", name="EE_M1", io_type="read", error_type="pending", num=1
    )
    requests = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(2)]
    removal = asyncio.create_task(bench.rpc("bdev_raid_remove_base_bdev", name="EE_M1"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not removal.done()
    with pytest.raises(OperationError, match="requests to it, as a leg, are not over"):
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="EE_M1")
    await bench.rpc("bdev_error_resume_pending", name="EE_M1")
    for request in requests:
        await asyncio.wait_for(request.completed(), 20)
    await asyncio.wait_for(removal, 20)
    assert bench.registry.find("EE_M1").claims == []
    await bench.close("R")
    await bench.rpc("bdev_raid_delete", name="R")
    await bench.rpc("bdev_error_delete", name="EE_M1")


@on_bench()
async def test_a_rebuild_whose_target_fails_leaves_the_mirror_as_it_was(bench: Bench) -> None:
    await make_faulty(bench)
    await bench.rpc("bdev_raid_remove_base_bdev", name="EE_M1")
    io = await bench.open("R")
    await bench.rpc(
        "bdev_error_inject_error", name="EE_M1", io_type="write", error_type="failure", num=1
    )
    with pytest.raises(OperationError, match="failed while it was added"):
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="EE_M1")
    await until_let_go(bench, "EE_M1")
    await write(io, 0, b"z" * 512)
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="EE_M1")
    await until_same(bench)
    await bench.close("R")


# --- made again


@on_bench()
async def test_a_saved_configuration_makes_it_again(bench: Bench) -> None:
    await make_legs(bench, 2)
    await create(bench, "F1", "F0")
    await until_same(bench)
    io = await bench.open("R")
    await write(io, 0, b"s" * 512)
    await bench.close("R")
    call = bench.registry.config()[-1]
    uuid = mirror(bench).uuid
    await bench.rpc("bdev_raid_delete", name="R")
    await bench.rpc(call["method"], **call["params"])
    assert (await describe(bench))["write_intent"]["suspect"] == 0, "it was left in order"
    assert mirror(bench).uuid == uuid
    assert bench.registry.config()[-1] == call
    io = await bench.open("R")
    assert await read(io, 0, 512) == b"s" * 512
    await bench.close("R")


@on_bench()
async def test_a_leg_that_missed_something_is_rebuilt_when_it_is_there_again(bench: Bench) -> None:
    await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    await bench.rpc("bdev_raid_delete", name="R")
    await create(bench, "F1")
    io = await bench.open("R")
    await write(io, 0, b"a" * 512)
    await bench.close("R")
    await bench.rpc("bdev_raid_delete", name="R")
    await create(bench, "F0", "F1")
    io = await bench.open("R")
    assert await read(io, 0, 512) == b"a" * 512
    await until_same(bench)
    assert (await assert_same(bench, SIZE, "F0", "F1"))[:512] == b"a" * 512
    await bench.close("R")


@on_bench()
async def test_it_is_made_again_without_a_leg_that_is_not_there(bench: Bench) -> None:
    """As by a saved configuration, after a disk has failed."""
    await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    io = await bench.open("R")
    await write(io, 0, b"a" * 512)
    await bench.close("R")
    call = bench.registry.config()[-1]
    await bench.rpc("bdev_raid_delete", name="R")
    await bench.rpc("bdev_uring_delete", name="F0")
    await bench.rpc(call["method"], **call["params"])
    assert (await describe(bench))["num_base_bdevs_operational"] == 1
    io = await bench.open("R")
    assert await read(io, 0, 512) == b"a" * 512
    await bench.close("R")


@on_bench()
async def test_legs_that_went_apart_are_refused(bench: Bench) -> None:
    await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    await bench.rpc("bdev_raid_delete", name="R")
    for leg in ("F0", "F1"):
        await create(bench, leg)
        await bench.rpc("bdev_raid_delete", name="R")
    with pytest.raises(OperationError, match="were each written to without the other"):
        await create(bench, "F0", "F1")
    await create(bench, "F1")
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="F0")
    await until_same(bench)


# --- what is refused


@pytest.mark.parametrize(
    ("legs", "params", "message"),
    [
        (["A"], {}, "a new mirror has 2 to 16"),
        (["A", "A"], {}, "one is there twice"),
        (["A", "K"], {}, "bdev K has blocks of 4096 bytes"),
        (["A", "T"], {}, "bdev T: has 524288 bytes, and superblock and log"),
        (["A", "X"], {}, "No such device"),
        (["A", "B"], {"strip_size_kb": 4}, "strip_size_kb 4: not supported"),
        (["A", "B"], {"name": "A"}, "File exists"),
        (["A", "B"], {"raid_level": "raid5f"}, "raid_level raid5f"),
        (["A", "P"], {}, "bdev Q is claimed|is claimed already"),
    ],
)
@on_bench()
async def test_legs_that_do_not_go_together(
    bench: Bench, legs: list[str], params: dict[str, Any], message: str
) -> None:
    for name, size, blocks in (("A", 512, 8192), ("B", 512, 8192), ("K", 4096, 1024)):
        await bench.rpc("bdev_malloc_create", name=name, block_size=size, num_blocks=blocks)
    await bench.rpc("bdev_malloc_create", name="T", block_size=512, num_blocks=1024)
    await bench.rpc("bdev_malloc_create", name="P", block_size=512, num_blocks=8192)
    await bench.rpc("bdev_passthru_create", name="Q", base_bdev_name="P")
    with pytest.raises(OperationError, match=message):
        await create(bench, *legs, **params)
    assert [bdev.name for bdev in bench.registry] == ["A", "B", "K", "T", "P", "Q"]
    assert not bench.registry.find("A").claims
    assert await bench.registry.read(bench.registry.find("A"), 0, 4096) == bytes(4096)


@on_bench()
async def test_legs_of_different_mirrors_are_refused(bench: Bench) -> None:
    await make_legs(bench, 5)
    for name, pair in (("R", ("F0", "F1")), ("S", ("F2", "F3"))):
        await create(bench, *pair, name=name)
        await bench.rpc("bdev_raid_delete", name=name)
    with pytest.raises(OperationError, match="they are not one"):
        await create(bench, "F0", "F2")
    with pytest.raises(OperationError, match="bdev F4: has no superblock"):
        await create(bench, "F0", "F4")
    with pytest.raises(OperationError, match="the legs belong to the mirror"):
        await create(bench, "F0", "F1", uuid="11111111-2222-3333-4444-555555555555")
    await create(bench, "F0")
    with pytest.raises(OperationError, match="bdev F2: belongs to the mirror"):
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="F2")
    assert bench.registry.find("F2").claims == []
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="F4")
    with pytest.raises(OperationError, match="has all of its 2 legs"):
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="F1")
    await until_same(bench)
    await bench.rpc("bdev_raid_delete", name="R", clear_sb=True)
    assert await bench.registry.read(bench.registry.find("F4"), 0, 512) == bytes(512)


@on_bench()
async def test_a_replacement_that_is_too_small_is_refused(bench: Bench) -> None:
    await make_mirror(bench)
    await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
    await bench.rpc("bdev_malloc_create", name="S", block_size=512, num_blocks=4096)
    with pytest.raises(OperationError, match="has room for 2048 blocks of 512 bytes, and raid R"):
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="S")
    for name, message in (("M0", "is the last leg"), ("S", "is not a leg")):
        with pytest.raises(OperationError, match=message):
            await bench.rpc("bdev_raid_remove_base_bdev", name=name)


@on_bench()
async def test_a_mirror_is_not_its_own_leg(bench: Bench) -> None:
    """A leg that is added later is the one way to make a circle."""
    await make_mirror(bench)
    await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
    await bench.rpc("bdev_malloc_create", name="X", block_size=512, num_blocks=8192)
    await bench.rpc(
        "bdev_raid_create", name="K", raid_level="concat", strip_size_kb=0, base_bdevs=["R", "X"]
    )
    with pytest.raises(OperationError, match="K: stands on R, which cannot stand on itself") as no:
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="K")
    assert no.value.code == -errno.ELOOP
    assert bench.registry.find("K").claims == []
    io = await bench.open("K")
    await write(io, 0, b"x" * 512)
    assert await read(io, 0, 512) == b"x" * 512
    await bench.close("K")


@on_bench()
async def test_a_leg_that_makes_the_stack_too_high_is_refused(bench: Bench) -> None:
    await make_mirror(bench)
    await bench.rpc("bdev_raid_remove_base_bdev", name="M1")
    await passthrus(bench, "R", 8)
    high = await passthrus(bench, "M1", 6)
    assert 1 + 8 + depth(bench.registry.find(high)) == MAX_DEPTH
    higher = await passthrus(bench, high, 1)
    with pytest.raises(OperationError, match=f"{higher}: under R would be more than 16") as refused:
        await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev=higher)
    assert refused.value.code == -errno.ELOOP
    await bench.rpc("bdev_passthru_delete", name=higher)
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev=high)
    await until_same(bench)


async def passthrus(bench: Bench, base: str, count: int) -> str:
    """Put so many devices on one another, and return the last."""
    for layer in range(count):
        name = f"{base}-{layer}"
        await bench.rpc("bdev_passthru_create", name=name, base_bdev_name=base)
        base = name
    return base


@on_bench()
async def test_a_leg_is_not_deleted_under_its_mirror(bench: Bench) -> None:
    await make_mirror(bench)
    with pytest.raises(OperationError, match="claimed by mirror R") as refused:
        await bench.rpc("bdev_malloc_delete", name="M0")
    assert refused.value.code == -errno.EBUSY
    with pytest.raises(OperationError, match="claimed already"):
        await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="M0")


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@on_bench()
async def test_a_damaged_superblock_is_refused(bench: Bench) -> None:
    paths = await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    await bench.rpc("bdev_raid_delete", name="R")
    damage(paths[1], 40)
    with pytest.raises(OperationError, match="bdev F1: its superblock is damaged") as refused:
        await create(bench, "F0", "F1")
    assert refused.value.code == -errno.EBADMSG
    await create(bench, "F0")
    assert (await describe(bench))["num_base_bdevs_operational"] == 1


@on_bench()
async def test_a_log_that_is_damaged_on_all_legs_is_refused(bench: Bench) -> None:
    """On one leg it is made up for by the others: what is in one is in all."""
    paths = await make_legs(bench, 2)
    await create(bench, "F0", "F1")
    await until_same(bench)
    await bench.rpc("bdev_raid_delete", name="R")
    damage(paths[0], LOG_OFFSET + 100)
    await create(bench, "F0", "F1")
    await bench.rpc("bdev_raid_delete", name="R")
    for path in paths:
        damage(path, LOG_OFFSET + 100)
    with pytest.raises(OperationError, match="its log is damaged on all legs") as refused:
        await create(bench, "F0", "F1")
    assert refused.value.code == -errno.EBADMSG
    assert [bdev.name for bdev in bench.registry] == ["F0", "F1"]
    await create(bench, "F0")
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="F1")
    await until_same(bench)


# --- against a model

STEPS = st.lists(
    st.tuples(
        st.sampled_from([Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.UNMAP, "remove", "add", "clean"]),
        st.integers(0, SIZE // 512 - 1),
        st.one_of(st.integers(1, 20), st.integers(1, SIZE // 512)),
        st.integers(0, 1),  # the reactor, and the leg
        st.integers(1, 255),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(script=STEPS)
def test_whatever_is_done_to_it_it_is_a_row_of_bytes(script: list[Any]) -> None:
    async def main() -> None:
        async with Bench(2) as bench:
            await make_mirror(bench)
            ios = [await bench.open("R", reactor) for reactor in range(2)]
            model = bytearray(SIZE)
            gone: set[str] = set()
            for op, first, count, which, fill in script:
                length = min(count, SIZE // 512 - first) * 512
                if op == "clean":
                    await mirror(bench).settle()
                elif op == "remove" and not gone:
                    await until_same(bench)
                    await bench.rpc("bdev_raid_remove_base_bdev", name=f"M{which}")
                    gone.add(f"M{which}")
                elif op == "add" and gone:
                    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev=gone.pop())
                elif isinstance(op, Op):
                    data = bytes([fill]) * length if op is Op.WRITE else bytes(length)
                    model[first * 512 : first * 512 + length] = data
                    buffers = [data] if op is Op.WRITE else []
                    request = ios[which].start(op, first * 512, length * (not buffers), buffers)
                    await asyncio.wait_for(request.completed(), 20)
            assert await read(ios[0], 0, SIZE) == model
            await until_same(bench)
            legs = {"M0", "M1"} - gone
            assert await assert_same(bench, SIZE, *legs) == model
            for reactor in range(2):
                await bench.close("R", reactor)

    asyncio.run(main())
