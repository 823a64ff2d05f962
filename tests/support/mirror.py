"""Mirrors for tests."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from bdev.io import BdevIO, Op
from bdev.mirror import MirrorBdev
from bdev.mirror_super import DATA_OFFSET
from reactor.native import lib
from tests.support.bdevs import Bench

MIB = 1 << 20


async def make_legs(bench: Bench, count: int, size: int = 4 * MIB) -> list[Path]:
    """Create F0, F1 ... on files that stay with the bench, with room for ``size`` bytes."""
    made = tempfile.TemporaryDirectory(prefix="vr-")
    bench.temporary.append(made)
    paths = [Path(made.name) / f"leg{i}" for i in range(count)]
    for i, path in enumerate(paths):
        with path.open("wb") as file:
            file.truncate(DATA_OFFSET + size)
        await bench.rpc("bdev_uring_create", name=f"F{i}", filename=str(path), block_size=512)
    return paths


async def make_mirror(bench: Bench, count: int = 2, size: int = 4 * MIB) -> None:
    """Create R on M0, M1 ... in memory."""
    for i in range(count):
        await bench.rpc(
            "bdev_malloc_create", name=f"M{i}", block_size=512, num_blocks=(DATA_OFFSET + size) >> 9
        )
    await create(bench, *(f"M{i}" for i in range(count)))


async def create(bench: Bench, *legs: str, **params: Any) -> None:
    await bench.rpc(
        "bdev_raid_create", **{"name": "R", "raid_level": "raid1", "base_bdevs": legs, **params}
    )


def mirror(bench: Bench, name: str = "R") -> MirrorBdev:
    return bench.registry.find_as(name, MirrorBdev)


async def describe(bench: Bench) -> dict[str, Any]:
    (entry,) = await bench.rpc("bdev_raid_get_bdevs", category="all")
    found: dict[str, Any] = entry
    return found


async def write(io: BdevIO, offset: int, data: bytes, flags: int = 0) -> None:
    await asyncio.wait_for(io.start(Op.WRITE, offset, 0, [data], flags).completed(), 20)


async def read(io: BdevIO, offset: int, length: int) -> bytes:
    back = bytearray(length)
    await asyncio.wait_for(io.start(Op.READ, offset, 0, [back]).completed(), 20)
    return bytes(back)


async def until_same(bench: Bench, name: str = "R") -> None:
    """Wait until the legs do not differ any more."""
    one = mirror(bench, name)
    async with asyncio.timeout(30):
        await one.sync.wait()
        while one.count(lib.MIRROR_SUSPECT | lib.MIRROR_STALE) or one.rebuilding:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_let_go(bench: Bench, *names: str) -> None:
    """Wait until nobody claims these devices."""
    async with asyncio.timeout(30):
        while any(bench.registry.find(name).claims for name in names):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def contents(bench: Bench, leg: str, size: int) -> bytes:
    """Return the first bytes of the data of a leg."""
    data = b""
    while len(data) < size:
        part = min(size - len(data), 512 << 10)
        base = bench.registry.find(leg)
        data += await bench.registry.read(base, DATA_OFFSET + len(data), part)
    return data


async def assert_same(bench: Bench, size: int, *legs: str) -> bytes:
    """Return what all legs have."""
    found = [await contents(bench, leg, size) for leg in legs]
    assert all(one == found[0] for one in found), f"{legs} differ"
    return found[0]
