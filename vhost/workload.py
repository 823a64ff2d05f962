"""Workloads on virtio-blk and virtio-scsi devices: options, threads of load, and results."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from reactor.errors import check
from reactor.native import CData, ffi, lib
from scsi.decode import status_name
from vhost.frontend_link import FrontendError
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.results import Direction, Mismatch, Results
from vhost.virtio_scsi import response_name

READ, WRITE = 0, 1
MODES = ("read", "write", "randread", "randwrite", "rw", "randrw")


@dataclass(frozen=True, slots=True)
class Workload:
    """What to do. Sizes are in bytes, times in seconds; ``offset`` and ``size`` give the range.

    With several queues each has an equal part of the range, its own ``depth``, and its share of
    ``rate`` and ``requests``. ``rate`` (requests a second) makes an open loop: requests are due at
    fixed times, and their latency counts from there. 0 means no limit.
    """

    size: int
    mode: str = "randread"
    block_size: int = 4096
    depth: int = 1
    runtime: float = 5.0
    offset: int = 0
    read_percent: int = 50
    segment_size: int = 0
    verify: bool = False
    interrupt: bool = False
    indirect: bool = False
    rate: float = 0
    requests: int = 0
    seed: int = 0
    stall: float = 30.0
    """Give up when a device has not answered for so long."""
    lun: bytes = b""
    """The address of a logical unit of a virtio-scsi device; empty for a virtio-blk device."""
    logical_block: int = 0
    """Of that unit, bytes."""

    @property
    def reads(self) -> int:
        """Percentage of reads."""
        if self.mode.endswith("rw"):
            return self.read_percent
        return 100 if self.mode.endswith("read") else 0

    @property
    def descriptors(self) -> int:
        """Descriptors of the ring that a request takes."""
        return 1 if self.indirect else self._buffers + 2

    @property
    def _segment_size(self) -> int:
        return min(self.segment_size or self.block_size, self.block_size)

    @property
    def _buffers(self) -> int:
        return -(-self.block_size // self._segment_size)

    def queue_size(self) -> int:
        """Return the smallest ring that will do, 128 entries or more."""
        return max(128, 1 << (self.depth * self.descriptors - 1).bit_length())

    def memory(self, queues: int, queue_size: int) -> int:
        """Return the bytes of guest memory that running on ``queues`` queues takes, with rings."""
        slot = 256 + 16 * (self._buffers + 4) + self.block_size
        return queues * (32 * queue_size + self.depth * slot + (64 << 10)) + (1 << 20)

    def part(self, index: int, queues: int) -> Workload:
        """Return what one of several queues does."""
        blocks = self.size // self.block_size
        first, last = blocks * index // queues, blocks * (index + 1) // queues
        return replace(
            self,
            offset=self.offset + first * self.block_size,
            size=(last - first) * self.block_size,
            rate=self.rate / queues,
            requests=-(-self.requests // queues),
            seed=(self.seed + index) & 0xFFFFFFFF,
        )


def needs_long_cdb(work: Workload) -> bool:
    """Say whether READ (10) cannot name all blocks, or not as many."""
    last = (work.offset + work.size) // work.logical_block
    return last > 1 << 32 or work.block_size // work.logical_block >= 1 << 16


def describe_status(status: int, *, scsi: bool) -> str:
    """Return what load_results.error_status means."""
    if status == 256:
        return "nothing"
    if not scsi:
        return {1: "IOERR", 2: "UNSUPP"}.get(status, str(status))
    if status & lib.LOAD_RESPONSE:
        return response_name(status & ~lib.LOAD_RESPONSE)
    return status_name(status)


class _Load:
    """One queue's load generator, and its buffers in guest memory."""

    def __init__(self, queue: DriverQueue, memory: FrontendMemory, work: Workload) -> None:
        self._queue = queue
        self._memory = memory
        self._work = work
        self._kicks = queue.kicks
        self._areas: list[tuple[int, int]] = []
        rate = lib.reactor_tick_rate()
        options: Any = ffi.new("struct load_options *")
        options.offset, options.size = work.offset, work.size
        options.block_size, options.depth = work.block_size, work.depth
        options.segment_size = work._segment_size
        options.read_percent = work.reads
        options.random = work.mode.startswith("rand")
        options.verify, options.interrupt = work.verify, work.interrupt
        options.indirect = work.indirect
        if work.lun:
            options.scsi, options.lun = True, work.lun
            options.logical_block = work.logical_block
            options.long_cdb = needs_long_cdb(work)
        options.requests = work.requests
        options.interval_ticks = int(rate / work.rate) if work.rate else 0
        options.stall_ticks = int(work.stall * rate)
        options.seed = work.seed
        options.slots_addr = self._area(lib.load_slot_bytes(options) * work.depth, 128)
        options.slots = memory.pointer(options.slots_addr)
        options.data_addr = self._area(work.block_size * work.depth, 4096)
        options.data = memory.pointer(options.data_addr)
        self.native = lib.load_create(queue.native, options)
        if self.native == ffi.NULL:
            error = ffi.errno
            self.close()
            raise FrontendError(
                f"queue {queue.index} of {queue.size} entries: {os.strerror(error)} for depth "
                f"{work.depth}, {work.descriptors} descriptors a request, blocks of "
                f"{work.block_size} in {work.size} bytes"
            )

    def _area(self, size: int, alignment: int) -> int:
        address = self._memory.allocate(size, alignment)
        self._areas.append((address, size))
        return address

    def close(self) -> None:
        """Give buffers and descriptors back; nothing is in flight."""
        lib.load_destroy(self.native)
        for area in self._areas:
            self._memory.free(*area)
        self._areas.clear()

    def ops(self) -> int:
        """Return how many requests were completed so far."""
        results = lib.load_results(self.native)
        return int(results.ops[READ] + results.ops[WRITE])

    def results(self) -> Results:
        """Return what was done, in seconds and bytes."""
        raw = lib.load_results(self.native)
        rate = lib.reactor_tick_rate()
        seconds = (raw.ended - raw.started) / rate
        found = Results(
            read=self._direction(raw, READ, seconds, rate),
            write=self._direction(raw, WRITE, seconds, rate),
            seconds=seconds,
            errors=raw.errors,
            verified=raw.verified,
            unwritten=raw.unwritten,
            mismatches=raw.mismatches,
            kicks=self._queue.kicks - self._kicks,
        )
        for i in range(min(raw.mismatches, lib.LOAD_MISMATCHES)):
            entry = raw.mismatch[i]
            expected, got = (
                int(word).to_bytes(8, "little") for word in (entry.expected, entry.got)
            )
            found.mismatch.append(Mismatch(entry.offset, expected, got))
        if raw.errors:
            kind = "write" if raw.error_type == WRITE else "read"
            status = describe_status(raw.error_status, scsi=bool(self._work.lun))
            found.first_error = f"{kind} at byte {raw.error_offset}: the device says {status}"
        return found

    def _direction(self, raw: CData, kind: int, seconds: float, rate: int) -> Direction:
        counts = ffi.unpack(raw.histogram[kind], lib.LOAD_BUCKETS)
        ops = int(raw.ops[kind])
        return Direction(
            ops=ops,
            bytes=ops * self._work.block_size,
            seconds=seconds,
            latency_sum=raw.latency_sum[kind] / rate,
            latency_min=raw.latency_min[kind] / rate if ops else math.inf,
            latency_max=raw.latency_max[kind] / rate,
            # The upper edge of each bucket: no latency is said to be less than it was.
            histogram={
                lib.load_bucket_floor(bucket + 1) / rate: count
                for bucket, count in enumerate(counts)
                if count
            },
        )


class Runner:
    """Runs a workload on queues: ``start``, look at ``ops`` now and then, ``finish``.

    So many ``threads`` share the queues, pinned to ``cpus`` in turn if any are given.
    """

    def __init__(
        self,
        work: Workload,
        queues: Sequence[DriverQueue],
        memory: FrontendMemory,
        *,
        threads: int = 1,
        cpus: Sequence[int] = (),
    ) -> None:
        self._work = work
        self._cpus = cpus
        self._loads: list[_Load] = []
        self._failures: list[int] = []
        # An interrupted Thread.join() takes the thread for ended (CPython 3.11): events tell.
        self._running: list[threading.Event] = []
        try:
            for place, queue in enumerate(queues):
                self._loads.append(_Load(queue, memory, work.part(place, len(queues))))
        except BaseException:
            self.close()
            raise
        self._shares = min(threads, len(queues))

    def start(self) -> None:
        """Begin."""
        lib.reactor_tick_rate()  # measured at the first call: not while we measure
        for place in range(self._shares):
            ended = threading.Event()
            self._running.append(ended)
            loads = self._loads[place :: self._shares]
            threading.Thread(target=self._run, args=(place, loads, ended)).start()

    def _run(self, place: int, loads: Sequence[_Load], ended: threading.Event) -> None:
        try:
            if self._cpus:
                os.sched_setaffinity(0, {self._cpus[place % len(self._cpus)]})
            native = ffi.new("struct load *[]", [load.native for load in loads])
            deadline = lib.reactor_ticks() + int(self._work.runtime * lib.reactor_tick_rate())
            self._failures.append(lib.load_run(native, len(loads), deadline))
        except OSError as error:  # a CPU that is not there
            self._failures.append(-(error.errno or errno.EIO))
        finally:
            ended.set()

    @property
    def running(self) -> bool:
        """Whether anything is left to wait for."""
        return any(not ended.is_set() for ended in self._running)

    def ops(self) -> int:
        """Return how many requests were completed so far."""
        return sum(load.ops() for load in self._loads)

    def stop(self, *, drain: bool = True) -> None:
        """End early; finish() has the results. Without ``drain``, do not wait for answers."""
        for load in self._loads:
            lib.load_stop(load.native, drain)

    def wait(self, timeout: float) -> None:
        """Wait for the end, at most ``timeout`` seconds."""
        end = time.monotonic() + timeout
        for ended in self._running:
            ended.wait(max(0.0, end - time.monotonic()))

    def finish(self) -> Results:
        """Wait for the end and return the results of all queues together.

        Raises FrontendError when the device stopped answering or broke the rules of the ring.
        """
        for ended in self._running:
            ended.wait()
        for failure in self._failures:
            if failure == -errno.ETIMEDOUT:
                raise FrontendError(
                    f"the device has not answered for {self._work.stall:g} s, after "
                    f"{self.ops()} requests"
                )
            check(failure, "load_run")
        total = Results()
        for load in self._loads:
            total.add(load.results())
        return total

    def close(self) -> None:
        """End at once if need be, and give everything back."""
        self.stop(drain=False)
        for ended in self._running:
            ended.wait()
        for load in self._loads:
            load.close()
        self._loads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(
    runner: Runner,
    *,
    progress: Callable[[int], None] | None = None,
    alive: Callable[[], bool] | None = None,
) -> Results:
    """Run to the end, or to a KeyboardInterrupt (a second one does not wait for answers).

    ``progress`` is called a few times a second with the number of requests completed so far;
    ``alive`` then tells whether the back-end is still there. Closes the runner in any case. Raises
    FrontendError.
    """
    with runner:
        runner.start()
        interrupted = False
        while runner.running:
            try:
                runner.wait(0.2)
                if progress is not None:
                    progress(runner.ops())
                if alive is not None and not alive():
                    raise FrontendError("the back-end closed the connection")
            except KeyboardInterrupt:
                runner.stop(drain=not interrupted)
                interrupted = True
        return runner.finish()
