"""Bare limits of this machine: the ring and memory without a target around them."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import _bare_build
from benchmarks.load import guest_memory
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.results import Results
from vhost.workload import Runner, Workload, run

STORE = 64 << 20


def ring(
    work: Workload, *, driver_cpu: int, device_cpu: int, store: bool, huge: bool = False
) -> Results:
    """Run a workload against a device that is a minimal loop, with or without data to copy.

    ``huge``: the guest's memory is of huge pages.
    """
    memory = guest_memory(work.memory(1, work.queue_size()), huge=huge)
    try:
        with (
            DriverQueue(memory, 0, work.queue_size()) as queue,
            _device(queue, memory, device_cpu, store=store),
        ):
            return run(Runner(work, [queue], memory, cpus=[driver_cpu]))
    finally:
        memory.close()


@contextmanager
def sleeper(cpu: int) -> Iterator[tuple[DriverQueue, FrontendMemory]]:
    """Yield a queue, and its memory, of a device that moves no data and sleeps until a kick."""
    memory = guest_memory(1 << 20)
    try:
        with DriverQueue(memory, 0, 128) as queue, _device(queue, memory, cpu, sleeps=True):
            yield queue, memory
    finally:
        memory.close()


@contextmanager
def _device(
    queue: DriverQueue,
    memory: FrontendMemory,
    cpu: int,
    *,
    store: bool = False,
    sleeps: bool = False,
) -> Iterator[None]:
    bare = _bare_build.load()
    disk = mmap.mmap(-1, STORE)
    disk.write(os.urandom(1 << 20) * (STORE >> 20))
    memory.write(queue.used, int(not sleeps).to_bytes(2, "little"))  # VIRTQ_USED_F_NO_NOTIFY
    device = bare.ffi.new("struct bare_device *")
    for name in ("desc", "avail", "used"):
        setattr(device, name, bare.ffi.cast("void *", memory.user(getattr(queue, name))))
    device.size = queue.size
    device.guest = memory.regions[0].guest
    device.memory = bare.ffi.cast("uint8_t *", memory.regions[0].user)
    device.kick = queue.kick_fd if sleeps else -1
    if store:
        device.store = bare.ffi.from_buffer("uint8_t[]", disk)

    def serve() -> None:
        os.sched_setaffinity(0, {cpu})
        bare.lib.bare_serve(device)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        device.stop = True
        queue.kick()
        thread.join()


def memcpy(
    block: int, depth: int, *, write: bool, cpu: int, seconds: float, huge: bool = False
) -> float:
    """Return how many random blocks a second one core copies out of 64 MiB, or into (``write``).

    ``huge``: which are of transparent huge pages, where the system gives any for the asking.
    """
    bare = _bare_build.load()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, STORE, private) as store, mmap.mmap(-1, block * depth) as buffers:
        store.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        store.write(os.urandom(1 << 20) * (STORE >> 20))
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cpu})
        try:
            source = bare.ffi.from_buffer("uint8_t[]", store)
            target = bare.ffi.from_buffer("uint8_t[]", buffers)
            rate = float(bare.lib.bare_memcpy(source, STORE, target, block, depth, write, seconds))
            bare.ffi.release(source)
            bare.ffi.release(target)
            return rate
        finally:
            os.sched_setaffinity(0, before)
