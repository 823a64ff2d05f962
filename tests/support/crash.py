"""All processes killed at once, many times: ``python -m tests.support.crash KIND FOLDER``.

A *server* is a process with a registry, two reactors and a disk on files. It checks that every
sector is what it may be, then writes until it is killed, at any moment. What was submitted and what
was answered stands in memory that the parent keeps, by sector and generation. Several disks take
turns, so that the kernel has time to let go of the files of the one that was killed: a server waits
for that.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bdev.io import BdevIO, Op
from bdev.mirror_super import DATA_OFFSET
from tests.support.bdevs import Bench
from tests.support.mirror import assert_same, mirror, until_same

SECTOR = 512
DISKS = 4
DEPTH = 6  # requests at a time
LIFE = 0.05  # seconds that a server may live after its check
PATIENCE = 30.0  # seconds for anything
AWAY = 0.01  # seconds that a leg is taken out
FRESH = 12  # rounds until a copy-on-write disk begins again: by then little is left to be copied
ZEROES = 7  # every so manyth generation is written as zeroes


class Memory:
    """What outlives a server: by sector, the last generation submitted, and the last answered."""

    def __init__(self, sectors: int) -> None:
        self._map = mmap.mmap(-1, 4096 + 8 * sectors)
        self.sectors = sectors
        self.checked = ctypes.c_uint32.from_buffer(self._map, 0)
        self.answered = ctypes.c_uint64.from_buffer(self._map, 8)
        array = ctypes.c_uint32 * sectors
        self.low: Any = array.from_buffer(self._map, 4096)
        self.high: Any = array.from_buffer(self._map, 4096 + 4 * sectors)

    def reset(self) -> None:
        ctypes.memset(self.low, 0, 8 * self.sectors)


def pattern(sector: int, generation: int) -> bytes:
    return struct.pack("<II", sector, generation) * (SECTOR // 8)


class CowDisk:
    """Clusters of 4 KiB on a base whose sectors have generation 0."""

    size = 1 << 20

    def __init__(self, folder: Path) -> None:
        self.base, self.overlay = folder / "base", folder / "overlay"
        sectors = range(self.size // SECTOR)
        self.base.write_bytes(b"".join(pattern(sector, 0) for sector in sectors))

    def initial(self, sector: int) -> bytes:
        return pattern(sector, 0)

    def begin(self, round_: int, memory: Memory) -> None:
        if round_ % FRESH == 0:
            self.overlay.unlink(missing_ok=True)
            memory.reset()

    async def open(self, bench: Bench) -> None:
        await bench.rpc(
            "bdev_uring_create",
            name="B",
            filename=str(self.base),
            block_size=SECTOR,
            readonly=True,
        )
        await bench.rpc(
            "bdev_cow_create",
            name="D",
            base="B",
            overlay=str(self.overlay),
            cluster_size=4096,
        )

    async def check(self, bench: Bench) -> None:
        pass

    async def disturb(self, bench: Bench, chance: random.Random) -> None:
        """Fill it, now and then."""
        if chance.random() < 0.2:
            await bench.rpc("bdev_cow_fill", name="D")


class MirrorDisk:
    """Two legs, of which one is now and then rebuilt."""

    size = 4 << 20

    def __init__(self, folder: Path) -> None:
        self.legs = [folder / f"leg{i}" for i in range(2)]
        for leg in self.legs:
            with leg.open("wb") as file:
                file.truncate(DATA_OFFSET + self.size)

    def initial(self, sector: int) -> bytes:
        del sector
        return bytes(SECTOR)

    def begin(self, round_: int, memory: Memory) -> None:
        pass

    async def open(self, bench: Bench) -> None:
        for i, leg in enumerate(self.legs):
            await bench.rpc("bdev_uring_create", name=f"F{i}", filename=str(leg), block_size=SECTOR)
        await bench.rpc("bdev_raid_create", name="D", raid_level="raid1", base_bdevs=["F0", "F1"])

    async def check(self, bench: Bench) -> None:
        """Once they are made the same, legs are; and then writes begin with a log that is clean."""
        await until_same(bench, "D")
        await assert_same(bench, self.size, "F0", "F1")
        await mirror(bench, "D").settle()

    async def disturb(self, bench: Bench, chance: random.Random) -> None:
        """Take a leg out for a while or for good, or not; and clean the log all the time."""
        what = chance.choice(("stay", "leave", "leave and return"))
        while what != "stay":
            await until_same(bench, "D")
            leg = f"F{chance.randrange(2)}"
            await bench.rpc("bdev_raid_remove_base_bdev", name=leg)
            if what == "leave":
                break
            await asyncio.sleep(chance.random() * AWAY)
            await bench.rpc("bdev_raid_add_base_bdev", raid_bdev="D", base_bdev=leg)
        while True:
            await mirror(bench, "D").settle()


Disk = CowDisk | MirrorDisk
KINDS: dict[str, Callable[[Path], Disk]] = {"cow": CowDisk, "mirror": MirrorDisk}


# --- the server ----------------------------------------------------------------------------------


def generation_of(disk: Disk, memory: Memory, sector: int, data: bytes) -> int:
    """Return the newest generation that ``data`` may be of; AssertionError if there is none."""
    low, high = memory.low[sector], memory.high[sector]
    for generation in range(high, low - 1, -1):
        if generation == 0:
            expected = disk.initial(sector)
        elif generation % ZEROES == 0:
            expected = bytes(SECTOR)
        else:
            expected = pattern(sector, generation)
        if data == expected:
            return generation
    raise AssertionError(f"sector {sector}: {data[:16].hex()} is not of {low} to {high}")


async def check_sectors(disk: Disk, memory: Memory, ios: list[BdevIO]) -> None:
    """Every sector is as old as its last answer at least; what is read now stays."""
    whole = bytearray(disk.size)
    step = 1 << 18
    reads = [
        ios[at // step % 2].start(Op.READ, at, 0, [memoryview(whole)[at : at + step]])
        for at in range(0, disk.size, step)
    ]
    for request in reads:
        await asyncio.wait_for(request.completed(), PATIENCE)
    for sector in range(memory.sectors):
        data = bytes(whole[sector * SECTOR : (sector + 1) * SECTOR])
        generation = generation_of(disk, memory, sector, data)
        memory.low[sector] = memory.high[sector] = generation


async def write_some(disk: Disk, memory: Memory, ios: list[BdevIO], lane: int, seed: int) -> None:
    """Write to sectors that no other lane writes to, for ever."""
    chance = random.Random(seed)
    share = memory.sectors // DEPTH
    while True:
        count = chance.choice((1, 1, 2, 8, 24))
        first = lane * share + chance.randrange(share - count)
        zeroes = chance.random() < 0.2
        sectors = range(first, first + count)
        for sector in sectors:
            following = memory.high[sector] + 1
            if zeroes:
                following += -following % ZEROES
            elif following % ZEROES == 0:
                following += 1
            memory.high[sector] = following
        io = chance.choice(ios)
        if zeroes:
            request = io.start(Op.WRITE_ZEROES, first * SECTOR, count * SECTOR)
        else:
            data = b"".join(pattern(sector, memory.high[sector]) for sector in sectors)
            request = io.start(Op.WRITE, first * SECTOR, 0, [data])
        await asyncio.wait_for(request.completed(), PATIENCE)
        for sector in sectors:
            memory.low[sector] = memory.high[sector]
        memory.answered.value += 1


async def serve(disk: Disk, memory: Memory, seed: int) -> None:
    """Be a server, until killed."""
    chance = random.Random(seed)
    bench = await Bench(2).__aenter__()
    await disk.open(bench)
    ios = [await bench.open("D", reactor) for reactor in range(2)]
    await check_sectors(disk, memory, ios)
    if chance.random() < 0.5:
        await disk.check(bench)
        await check_sectors(disk, memory, ios)
    memory.checked.value = 1
    lanes = [write_some(disk, memory, ios, lane, seed + lane) for lane in range(DEPTH)]
    await asyncio.gather(disk.disturb(bench, chance), *lanes)


# --- its parent ----------------------------------------------------------------------------------


def start(disk: Disk, memory: Memory, seed: int) -> int:
    """Start a server, and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        asyncio.run(serve(disk, memory, seed))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def wait_checked(pid: int, memory: Memory) -> None:
    """Return when the server has checked its disk; AssertionError if it ends instead."""
    deadline = time.monotonic() + PATIENCE
    while not memory.checked.value:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise AssertionError("the server ended before it was killed")
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("the server did not check its disk in time")
        time.sleep(0.001)


def kill(pid: int, memory: Memory, chance: random.Random) -> None:
    """Kill a server while it writes, or while it still puts its disk in order."""
    if chance.random() < 0.8:
        wait_checked(pid, memory)
        time.sleep(chance.random() * LIFE)
    else:
        time.sleep(chance.random() * LIFE)
    if os.waitpid(pid, os.WNOHANG)[0]:
        raise AssertionError("the server ended before it was killed")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def targets(kind: str, folder: Path) -> Iterator[tuple[Disk, Memory]]:
    for index in range(DISKS):
        place = folder / str(index)
        place.mkdir()
        disk = KINDS[kind](place)
        yield disk, Memory(disk.size // SECTOR)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1e9, help="end sooner, after so long")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    made = list(targets(options.kind, options.folder))
    end = time.monotonic() + options.seconds
    kills = 0
    while kills < options.kills and time.monotonic() < end:
        disk, memory = made[kills % DISKS]
        disk.begin(kills // DISKS, memory)
        memory.checked.value = 0
        kill(start(disk, memory, chance.getrandbits(32)), memory, chance)
        kills += 1
    for disk, memory in made:
        memory.checked.value = 0
        pid = start(disk, memory, 1)
        wait_checked(pid, memory)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(f"kills={kills} answered={sum(memory.answered.value for _, memory in made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
