"""Reactors that are killed at random moments under a verified load."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bdev.mirror import MirrorBdev
from bdev.mirror_super import DATA_OFFSET
from reactor import cluster as cluster_module
from reactor.cluster import Reactor
from reactor.native import lib
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend import BlkFrontend
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.messages import ProtocolFeature
from vhost.results import Results
from vhost.workload import Runner, Workload, run

SIZE = (
    16 << 20
)  # bytes of the disk: small, so that blocks are read back soon after they were written
STALL = 100.0  # seconds without an answer after which the load gives up
MID_LOAD = 0.6  # of the kills hit a reactor that serves, the others one that has just started
MAX_OPS = 3000  # requests between two kills
MAX_START = (
    0.04  # seconds from the start of a process to a kill: anywhere in its becoming a reactor
)


@dataclass(frozen=True)
class Disk:
    """What is served, and whose log tells what was in flight."""

    kind: str
    packed: bool
    own_log: bool

    def __str__(self) -> str:
        ring, log = "packed" if self.packed else "split", "own" if self.own_log else "front-end's"
        return f"{self.kind}, {ring}, {log} log"


DISKS = (
    [
        Disk(kind, packed, own_log)
        for kind in ("malloc", "file")
        for packed in (False, True)
        for own_log in (False, True)
    ]
    + [
        Disk(kind, packed=False, own_log=False)
        for kind in ("aio", "threads", "cow", "mirror", "stack")
    ]
    + [Disk(kind, packed=True, own_log=True) for kind in ("python", "delay")]
)


@pytest.fixture(params=DISKS, ids=str)
def disk(request: pytest.FixtureRequest) -> Disk:
    """Every kind of disk, with every kind of queue."""
    found: Disk = request.param
    return found


async def create_malloc(target: Stack, folder: Path) -> None:
    del folder
    await target.call("bdev_malloc_create", name="d", num_blocks=SIZE >> 9, block_size=512)


async def create_file(
    target: Stack, folder: Path, name: str = "d", size: int = SIZE, engine: str = "io_uring"
) -> None:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    where = {"filename": str(path), "block_size": 512, "engine": engine}
    await target.call("bdev_uring_create", name=name, **where)


async def create_cow(target: Stack, folder: Path) -> None:
    """Of small clusters, so that there are some left to be copied for long."""
    path = folder / "base"
    path.write_bytes(bytes(SIZE))
    await target.call(
        "bdev_uring_create", name="base", filename=str(path), block_size=512, readonly=True
    )
    overlay = str(folder / "overlay")
    await target.call("bdev_cow_create", name="d", base="base", overlay=overlay, cluster_size=4096)


async def create_mirror(target: Stack, folder: Path) -> None:
    for name in ("leg0", "leg1"):
        await create_file(target, folder, name, SIZE + DATA_OFFSET)
    await target.call("bdev_raid_create", name="d", raid_level="raid1", base_bdevs=["leg0", "leg1"])


async def create_stack(target: Stack, folder: Path) -> None:
    """Passthru on crypto on two striped files."""
    for name in ("half0", "half1"):
        await create_file(target, folder, name, SIZE // 2)
    halves = {"base_bdevs": ["half0", "half1"], "strip_size_kb": 16}
    await target.call("bdev_raid_create", name="r", raid_level="raid0", **halves)
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(bytes(range(64)).hex())
    await target.call("accel_crypto_key_create", name="k", key_file=str(key))
    await target.call("bdev_crypto_create", base_bdev_name="r", name="c", key_name="k")
    zeroes = bytes(SIZE // 64)  # what was never written is no zeroes once it is decrypted
    crypto = target.registry.find("c")
    for offset in range(0, SIZE, len(zeroes)):
        await target.registry.write(crypto, offset, zeroes)
    await target.call("bdev_passthru_create", name="d", base_bdev_name="c")


async def create_python(target: Stack, folder: Path) -> None:
    """Its process is none of those that are killed: what they asked it for goes on."""
    del folder
    target.cluster.modules = (*target.cluster.modules, "tests.support.devices")
    args = {"blocks": SIZE >> 9}
    await target.call("bdev_python_create", name="d", device="memory", args=args)


async def create_delay(target: Stack, folder: Path) -> None:
    """So that there are always requests which wait."""
    await create_file(target, folder, "slow")
    times = {f"{which}_{op}_latency": 100 for which in ("avg", "p99") for op in ("read", "write")}
    await target.call("bdev_delay_create", name="d", base_bdev_name="slow", **times)


async def check_legs(target: Stack, folder: Path) -> None:
    """Whatever died, the legs are the same in the end."""
    mirror = target.registry.find_as("d", MirrorBdev)
    await target.until(lambda: not mirror.count(lib.MIRROR_SUSPECT))
    legs = [(folder / name).read_bytes()[DATA_OFFSET:] for name in ("leg0", "leg1")]
    assert legs[0] == legs[1]


CREATE: dict[str, Callable[[Stack, Path], Awaitable[None]]] = {
    "malloc": create_malloc,
    "file": create_file,
    "aio": partial(create_file, engine="aio"),
    "threads": partial(create_file, engine="threads"),
    "cow": create_cow,
    "mirror": create_mirror,
    "stack": create_stack,
    "python": create_python,
    "delay": create_delay,
}


@asynccontextmanager
async def serving(disk: Disk, folder: Path) -> AsyncIterator[Stack]:
    """Serve a disk as controller "b0" on two reactors."""
    async with stack(CPUS[:2]) as target:
        await CREATE[disk.kind](target, folder)
        await target.call("vhost_create_blk_controller", ctrlr="b0", dev_name="d", packed_ring=True)
        yield target


async def connect(target: Stack, disk: Disk) -> BlkFrontend:
    """Return a front-end with four queues, two on each reactor."""
    wanted: Any = WANTED_PROTOCOL
    if disk.own_log:
        wanted &= ~ProtocolFeature.INFLIGHT_SHMFD
    return await target.connect("b0", queues=4, packed=disk.packed, protocol_features=wanted)


async def progress(target: Stack, runner: Runner, count: int) -> None:
    """Wait until so many more requests have been answered."""
    wanted = runner.ops() + count
    await target.until(lambda: runner.ops() >= wanted)


async def kill_once(target: Stack, runner: Runner, chance: random.Random) -> None:
    """Kill a reactor, in the middle of its work or at some moment of its start."""
    reactor: Reactor = chance.choice(target.cluster.reactors)
    if chance.random() < MID_LOAD:
        await progress(target, runner, chance.randrange(MAX_OPS))
    else:
        await target.until(lambda: reactor.pid is not None)
        await asyncio.sleep(chance.random() * MAX_START)
    if reactor.pid is not None:
        os.kill(reactor.pid, signal.SIGKILL)


async def kill_under_load(
    disk: Disk, folder: Path, kills: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill so many reactors while data are written and verified: nothing fails, nothing is lost."""
    monkeypatch.setattr(cluster_module, "CRASH_LOOP", kills + 1)  # which this is meant to be
    chance = random.Random(seed)
    async with serving(disk, folder) as target:
        front = await connect(target, disk)
        work = Workload(
            front.size, "randrw", depth=8, verify=True, runtime=1e6, seed=seed, stall=STALL
        )
        runner = Runner(work, front.queues, front.memory)
        load = asyncio.create_task(asyncio.to_thread(run, runner))
        try:
            for _ in range(kills):
                await kill_once(target, runner, chance)
            await progress(target, runner, MAX_OPS)
        finally:
            runner.stop()
            results: Results = await load
            broken = [q for s in target.sessions() for q in s["queues"] if q["broken"]]
            await target.close(front)
        if disk.kind == "mirror":
            await check_legs(target, folder)
        deaths = sum(reactor.restarts for reactor in target.cluster.reactors)
    assert not broken
    assert results.errors == 0, results.first_error
    assert results.mismatches == 0, results.mismatch
    assert results.verified > 0
    assert deaths >= kills / 2  # two kills may hit the same process
