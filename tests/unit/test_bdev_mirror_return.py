"""Legs of a mirror that come back get what they have missed: no less, and as a rule no more."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from bdev.io import BdevIO
from bdev.mirror_super import LOG_OFFSET
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench
from tests.support.mirror import (
    MIB,
    assert_same,
    create,
    describe,
    make_legs,
    mirror,
    read,
    until_let_go,
    until_same,
    write,
)

SIZE = 8 * MIB
META = 64 << 10  # bytes that superblocks and logs may take


async def start(bench: Bench, count: int = 2) -> tuple[list[Path], BdevIO]:
    """Create R on files F0, F1 ..., full of data, and with no bit set."""
    paths = await make_legs(bench, count, SIZE)
    await create(bench, *(f"F{i}" for i in range(count)))
    await until_same(bench)
    io = await bench.open("R")
    await write(io, 0, random.Random(1).randbytes(SIZE))
    await mirror(bench).settle()
    assert mirror(bench).count(lib.MIRROR_DIRTY) == 0
    return paths, io


async def remove(bench: Bench, leg: str) -> None:
    await bench.rpc("bdev_raid_remove_base_bdev", name=leg)


async def add(bench: Bench, leg: str, **params: Any) -> int:
    """Have a leg come back; returns how many bytes are written to it until it is the same."""
    await bench.rpc("bdev_reset_iostat", name=leg, mode="all")
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev=leg, **params)
    await until_same(bench)
    return await written(bench, leg)


async def written(bench: Bench, leg: str) -> int:
    (entry,) = (await bench.rpc("bdev_get_iostat", name=leg))["bdevs"]
    return int(entry["bytes_written"])


async def make_again(bench: Bench, *legs: str) -> BdevIO:
    """Delete R, and make it of these legs."""
    await bench.rpc("bdev_raid_delete", name="R")
    await bench.rpc("bdev_reset_iostat", mode="all")
    await create(bench, *legs)
    return await bench.open("R")


@on_bench()
async def test_a_leg_that_comes_back_gets_the_regions_that_it_missed(bench: Bench) -> None:
    _, io = await start(bench)
    await remove(bench, "F1")
    await write(io, 3 * MIB + 512, b"missed" * 256)
    await write(io, 6 * MIB, b"too!" * 128)
    assert 2 * MIB <= await add(bench, "F1") <= 2 * MIB + META
    await assert_same(bench, SIZE, "F0", "F1")
    await bench.close("R")


@on_bench()
async def test_bits_stay_while_a_leg_is_missing_and_go_when_it_is_back(bench: Bench) -> None:
    _, io = await start(bench)
    await remove(bench, "F1")
    await write(io, 0, bytes(512))
    for _ in range(2):
        await mirror(bench).settle()
    assert (await describe(bench))["write_intent"]["dirty"] == 1
    await add(bench, "F1")
    await mirror(bench).settle()
    assert (await describe(bench))["write_intent"]["dirty"] == 0
    await bench.close("R")


@on_bench()
async def test_all_of_it_is_copied_if_that_is_asked_for(bench: Bench) -> None:
    """As after somebody else has written to the leg, which nobody here can know."""
    paths, _ = await start(bench)
    await remove(bench, "F1")
    with paths[1].open("rb+") as file:
        file.seek(5 * MIB)
        file.write(b"somebody else's")
    assert await add(bench, "F1", full=True) >= SIZE
    await assert_same(bench, SIZE, "F0", "F1")
    await bench.close("R")


@on_bench()
async def test_another_leg_in_its_place_gets_everything(bench: Bench) -> None:
    await start(bench)
    await remove(bench, "F1")
    await bench.rpc("bdev_malloc_create", name="N", block_size=512, num_blocks=(SIZE + MIB) >> 9)
    assert await add(bench, "N") >= SIZE
    await remove(bench, "N")
    assert await add(bench, "F1") >= SIZE, "since then the place was another's"
    await assert_same(bench, SIZE, "F0", "F1")
    await bench.close("R")


@on_bench()
async def test_a_leg_that_failed_gets_what_it_missed(bench: Bench) -> None:
    await make_legs(bench, 2, SIZE)
    await bench.rpc("bdev_error_create", base_name="F1")
    await create(bench, "F0", "EE_F1")
    await until_same(bench)
    io = await bench.open("R")
    await mirror(bench).settle()
    await bench.rpc(
        "bdev_error_inject_error", name="EE_F1", io_type="write", error_type="failure", rate=100.0
    )
    await write(io, 2 * MIB, b"lost on one" * 512)
    await until_let_go(bench, "EE_F1")
    await bench.rpc("bdev_error_inject_error", name="EE_F1", io_type="clear")
    assert await add(bench, "EE_F1") <= MIB + META
    await assert_same(bench, SIZE, "F0", "EE_F1")
    await bench.close("R")


@on_bench()
async def test_a_return_that_is_cut_off_is_begun_anew(bench: Bench) -> None:
    _, io = await start(bench)
    await remove(bench, "F1")
    await write(io, 0, random.Random(2).randbytes(SIZE))
    await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="R", base_bdev="F1")
    await remove(bench, "F1")
    await write(io, MIB, b"mean" * 128)
    await mirror(bench).settle()
    await add(bench, "F1")
    await assert_same(bench, SIZE, "F0", "F1")
    await bench.close("R")


@on_bench()
async def test_legs_come_back_one_after_the_other(bench: Bench) -> None:
    _, io = await start(bench, 3)
    await remove(bench, "F1")
    await write(io, MIB, b"one!" * 128)
    await remove(bench, "F2")
    await write(io, 4 * MIB, b"two!" * 128)
    assert await add(bench, "F2") <= 2 * MIB + META
    assert await add(bench, "F1") <= 2 * MIB + META
    await mirror(bench).settle()
    assert mirror(bench).count(lib.MIRROR_DIRTY) == 0
    await assert_same(bench, SIZE, "F0", "F1", "F2")
    await bench.close("R")


# --- when the mirror is made again


@on_bench()
async def test_a_leg_that_is_there_again_gets_what_it_missed(bench: Bench) -> None:
    await start(bench)
    await bench.close("R")
    io = await make_again(bench, "F0")
    await write(io, 3 * MIB, b"solo" * 1280)
    await mirror(bench).settle()
    await bench.close("R")
    io = await make_again(bench, "F1", "F0")
    assert await read(io, 3 * MIB, 5120) == b"solo" * 1280
    await until_same(bench)
    assert MIB <= await written(bench, "F1") <= MIB + META
    await assert_same(bench, SIZE, "F0", "F1")
    await bench.close("R")


@on_bench()
async def test_what_a_crash_cut_off_is_missed_as_well(bench: Bench) -> None:
    """A leg may have what the others have not, since nobody was answered: their bits say where."""
    paths, io = await start(bench)
    await write(io, 5 * MIB, b"one!" * 1024)
    images = [path.read_bytes() for path in paths]  # as after a crash: the bit is set
    await bench.close("R")
    await bench.rpc("bdev_raid_delete", name="R")
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    with paths[1].open("rb+") as file:
        file.seek(MIB + 5 * MIB)
        file.write(b"two!" * 1024)
    await create(bench, "F0")
    assert await add(bench, "F1") <= MIB + META
    await assert_same(bench, SIZE, "F0", "F1")


@on_bench()
async def test_a_leg_that_was_written_to_alone_gets_everything(bench: Bench) -> None:
    """What it wrote is in no log but its own."""
    _, io = await start(bench)
    await remove(bench, "F1")
    await write(io, 0, b"ours" * 128)
    await bench.close("R")
    io = await make_again(bench, "F1")
    await write(io, 4 * MIB, b"them" * 128)
    await bench.close("R")
    io = await make_again(bench, "F0")
    assert await add(bench, "F1") >= SIZE
    assert await read(io, 0, 512) == b"ours" * 128
    await assert_same(bench, SIZE, "F0", "F1")
    await bench.close("R")


@pytest.mark.parametrize("together", [False, True])
@on_bench()
async def test_without_a_sound_log_everything_is_copied(bench: Bench, together: bool) -> None:
    paths, io = await start(bench)
    await remove(bench, "F1")
    await write(io, 4 * MIB, b"missed" * 512)
    await bench.close("R")
    await bench.rpc("bdev_raid_delete", name="R")
    with paths[0].open("rb+") as file:
        file.seek(LOG_OFFSET + 100)
        file.write(b"\xff")
    await create(bench, *(["F0", "F1"] if together else ["F0"]))
    if not together:
        assert await add(bench, "F1") >= SIZE
    await until_same(bench)
    await assert_same(bench, SIZE, "F0", "F1")
