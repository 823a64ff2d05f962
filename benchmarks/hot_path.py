"""The program that ``instructions`` runs under callgrind: one thread is driver and device by turns.

The device is what reactors run: the poll loop, a virtqueue, a bdev, of the installed extension. The
instructions of each turn of the poll loop are counted, those of everything else are not. Requests
go in batches; two numbers of batches are counted, so that the difference has no set-up in it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks import _bare_build
from benchmarks.hot_device import BLK, SCSI, Device
from reactor.native import CData, ffi, lib
from tests.support.bdevs import Bench
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.messages import Feature

DEPTH = 32  # requests in a batch
BATCHES = (4, 12)
DISK_SIZE = 1 << 20  # bytes
FEATURES = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX
TURNS = 100  # in which a batch must be done
KERNEL = 0.002  # seconds in which the kernel has read what is in its cache

Make = Callable[[Bench], Awaitable[str]]


async def null(bench: Bench) -> str:
    """Make a null disk."""
    await bench.rpc("bdev_null_create", name="N", block_size=512, num_blocks=DISK_SIZE // 512)
    return "N"


async def malloc(bench: Bench) -> str:
    """Make a malloc disk."""
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=DISK_SIZE // 512)
    return "M"


def random_file(path: str) -> None:
    """Make the file of a disk."""
    with open(path, "wb") as made:
        made.write(os.urandom(DISK_SIZE))


async def file(bench: Bench) -> str:
    """Make a disk of a file in memory, served by io_uring."""
    folder = tempfile.TemporaryDirectory(prefix="hot-path-", dir="/dev/shm")
    bench.temporary.append(folder)
    path = os.path.join(folder.name, "disk")
    random_file(path)
    await bench.rpc("bdev_uring_create", name="F", filename=path, block_size=512)
    return "F"


@dataclass(frozen=True, slots=True)
class Path:
    """One way of a request through the target; ``size`` in bytes."""

    device: Device
    what: str
    make: Make
    size: int
    packed: bool
    write: bool = False

    @property
    def name(self) -> str:
        """What the baseline calls it."""
        return f"{self.device.name} {self.what}, {'packed' if self.packed else 'split'}"


PATHS = [
    Path(device, what, make, size, packed, write)
    for device in (BLK, SCSI)
    for packed in (False, True)
    for what, make, size, write in (
        ("null read 512 B", null, 512, False),
        ("malloc read 4 KiB", malloc, 4096, False),
        ("malloc write 4 KiB", malloc, 4096, True),
        ("file read 4 KiB", file, 4096, False),
    )
]


async def passthru(bench: Bench) -> str:
    """Put a passthru device on a null disk."""
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name=await null(bench))
    return "P"


async def limited(bench: Bench) -> str:
    """Put a limit on a null disk that is never reached."""
    await bench.rpc("bdev_set_qos_limit", name=await null(bench), rw_ios_per_sec=1 << 40)
    return "N"


# Requests that are made in C, without a queue: what a layer costs is the difference to the first.
LAYERS: dict[str, Make] = {
    "bdev null": null,
    "bdev passthru on null": passthru,
    "bdev null with a limit": limited,
}


class Driver:
    """The driver's side of one queue: the same batch of requests again and again."""

    def __init__(self, path: Path) -> None:
        self.memory = FrontendMemory(4 << 20)
        self.queue = DriverQueue(self.memory, 0, 128, event_idx=True, packed=path.packed)
        self._chains = [self._chain(path, i) for i in range(DEPTH)]

    def _chain(self, path: Path, number: int) -> CData:
        offset = number * path.size
        buffers, self._status = path.device.chain(self.memory, offset, path.size, path.write)
        return ffi.new("struct front_buffer[]", buffers)

    def submit(self) -> None:
        """Publish a batch."""
        for chain in self._chains:
            assert lib.front_queue_add(self.queue.native, chain, 3, ffi.NULL, 0) >= 0
        self.queue.publish()

    def reap(self) -> int:
        """Take what came back; RuntimeError if the last request has failed."""
        count = len(self.queue.reap())
        if count and self.memory.read(self._status, 1) != b"\0":
            raise RuntimeError("a request failed")
        return count

    def close(self) -> None:
        """Give the memory back."""
        self.queue.close()
        self.memory.close()


@contextmanager
def serving(kind: Device, driver: Driver, reactor: CData, bdev: CData) -> Iterator[None]:
    """Serve the driver's queue from a bdev."""
    queue, memory = driver.queue, driver.memory
    (region,) = memory.regions
    regions = [(region.guest, region.size, region.user, region.offset, memory.fds[0])]
    table = lib.guest_memory_create(ffi.new("struct guest_region[]", regions), 1)
    log_size = lib.vq_inflight_size(queue.size)
    log = os.memfd_create("log")
    os.ftruncate(log, log_size)
    setup = {
        "id": 1,
        "size": queue.size,
        "base": queue.base,
        "features": FEATURES | (Feature.RING_PACKED if queue.packed else 0),
        **{name: memory.user(getattr(queue, name)) for name in ("desc", "avail", "used")},
        "kick_fd": queue.kick_fd,
        "call_fd": queue.call_fd,
        "error_fd": queue.error_fd,
        "inflight_fd": log,
        "inflight_size": log_size,
    }
    with kind.queue(reactor, table, bdev, ffi.new("struct vq_setup *", setup)):
        yield
    lib.guest_memory_put(table)
    os.close(log)


def run_batches(counting: Any, driver: Driver, reactor: CData, path: Path, batches: int) -> None:
    """Carry out so many batches; only the poll loop's turns are counted."""
    poll = ffi.addressof(lib, "reactor_poll")  # type: ignore[arg-type]  # a function's address
    poll, native = address(counting, poll), address(counting, reactor)
    for _ in range(batches):
        driver.submit()
        done = 0
        for _turn in range(TURNS):
            if counting.lib.counted_poll(poll, native, 1) < 0:
                raise RuntimeError("the poll loop failed")
            done += driver.reap()
            if done == DEPTH:
                break
            time.sleep(KERNEL)  # so that what the kernel does is over by the next turn
        else:
            raise RuntimeError(f"{path.name}: {done} of {DEPTH} requests came back")


def address(counting: Any, pointer: CData) -> Any:
    """Return what the extension points at, for the counting module."""
    return counting.ffi.cast("void *", int(ffi.cast("uintptr_t", pointer)))


async def measure_layer(counting: Any, name: str, make: Make) -> None:
    """Count both numbers of batches of reads of one device."""
    measure = ffi.addressof(lib, "bdev_measure")  # type: ignore[arg-type]  # a function's address
    async with Bench() as bench:
        io = await bench.open(await make(bench))
        for batches in (2, *BATCHES):
            setup = ffi.new("struct bdev_measure *", (lib.BDEV_READ, DEPTH, 512, batches))
            counting.lib.counting_start()
            if counting.lib.counted_measure(
                *(address(counting, pointer) for pointer in (measure, io.handle, setup))
            ):
                raise RuntimeError(f"{name}: a request failed")
            counting.lib.counting_dump(f"{name}|{batches}".encode())


async def measure(counting: Any, path: Path) -> None:
    """Count both numbers of batches on one way."""
    async with Bench() as bench:
        io = await bench.open(await path.make(bench))
        reactor = bench.cluster.reactors[0].native
        driver = Driver(path)
        with serving(path.device, driver, reactor, io.handle):
            run_batches(counting, driver, reactor, path, 2)
            for batches in BATCHES:
                counting.lib.counting_start()
                run_batches(counting, driver, reactor, path, batches)
                counting.lib.counting_dump(f"{path.name}|{batches}".encode())
        driver.close()


def main() -> None:
    """Count all ways, or those whose names contain an argument."""
    counting = _bare_build.load("counting")
    wanted = sys.argv[1:] or [""]
    for path in PATHS:
        if any(part in path.name for part in wanted):
            asyncio.run(measure(counting, path))
    for name, make in LAYERS.items():
        if any(part in name for part in wanted):
            asyncio.run(measure_layer(counting, name, make))


if __name__ == "__main__":
    main()
