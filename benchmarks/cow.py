"""``python -m benchmarks cow``: a filled copy-on-write disk beside a file of its size.

Both lie in one folder, are reached by io_uring from a poll loop in this process, and take turns.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from benchmarks.bdev import Make, Stack, open_stack
from benchmarks.series import IOPS, Case
from benchmarks.suite import OURS, Benchmark, Session
from reactor.native import lib
from tests.support.bdevs import Bench

RAW = "the file itself"
FILL_LIMIT = 60.0  # seconds


def written_file(path: Path, size: int) -> str:
    """Make a file without holes, and return its path."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(range(256)) * 4096)
        file.flush()
        os.fsync(file.fileno())
    return str(path)


def raw(folder: Path, size: int) -> Make:
    """Make a disk in a file."""

    async def make(bench: Bench) -> str:
        path = written_file(folder / "raw", size)
        await bench.rpc("bdev_uring_create", name="F", filename=path, block_size=512)
        return "F"

    return make


def filled(folder: Path, size: int) -> Make:
    """Make a copy-on-write disk that has all of its base in its overlay."""

    async def make(bench: Bench) -> str:
        path = written_file(folder / "base", size)
        await bench.rpc("bdev_uring_create", name="B", filename=path, block_size=512, readonly=True)
        overlay = str(folder / "overlay")
        await bench.rpc("bdev_cow_create", name="C", base="B", overlay=overlay, fill=True)
        async with asyncio.timeout(FILL_LIMIT):
            while True:
                (bdev,) = await bench.rpc("bdev_get_bdevs", name="C")
                cow = bdev["driver_specific"]["cow"]
                if cow["num_allocated_clusters"] == cow["num_clusters"]:
                    return "C"
                await asyncio.sleep(0.01)

    return make


async def open_disk(name: str, make: Make) -> Stack:
    """Make one of the two, which this version has."""
    stack = await open_stack(name, make)
    assert stack is not None, f"{name} could not be made"
    return stack


async def measure(session: Session, folder: Path) -> None:
    """Measure requests of 4 KiB, one after another, by each in turn."""
    size = session.options.choose(1, 64, 1024) << 20
    requests = session.options.choose(64, 4096, 65536)
    disks: list[Stack] = []
    try:
        for name, make in ((OURS, filled(folder, size)), (RAW, raw(folder, size))):
            disks.append(await open_disk(name, make))
        for _ in session.track(range(session.options.rounds), "cow"):
            for mode, op in (("read", lib.BDEV_READ), ("write", lib.BDEV_WRITE)):
                for depth in (1, 32):
                    case: Case = {"block": 4096, "mode": mode, "depth": depth}
                    if not session.options.wanted(case):
                        continue
                    for disk in disks:
                        took = disk.measure(op, 4096, depth, requests // depth)
                        session.add(case, disk.name, IOPS, 1e9 / took)
    finally:
        for disk in disks:
            await disk.bench.__aexit__()


def run(session: Session) -> None:
    """Measure in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="cow-", dir=session.options.folder) as folder:
        asyncio.run(measure(session, Path(folder)))


benchmark = Benchmark("cow", "A filled cow disk, 4 KiB", run, base=RAW)
