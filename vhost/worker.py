"""The reactor's side of vhost: guest memory and queues, as the control process asks for them.

vhost.session_queues is the other side. Everything here can be made again from what the control
process knows.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from bdev import worker as bdevs
from bdev.memory import RegisteredMemory
from reactor.errors import OperationError, check
from reactor.loop import ReactorLoop
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, Operations, operation
from scsi.worker import UnitWorker
from vhost import initiator_worker as initiator_worker  # a kind of bdev, registered by its import
from vhost.scsi_worker import ScsiArgs, ScsiWorker
from vhost.worker_memory import (
    LogArgs,
    RegionArgs,
    TranslationArgs,
    learn_translations,
    map_memory,
    memory_regions,
    open_iotlb,
    open_log,
    release_memory,
    settle_iotlb,
)
from vhost.worker_queue import BlkArgs, CoalescingArgs, RingArgs, blk_setup, ring_setup

# Sources of notices; those of bdevs are far above (bdev.registry).
_sources = itertools.count(1)

log = logging.getLogger(__name__)


class Events(Protocol):
    """The part of reactor.events.Node that is needed."""

    def send(self, target: str, op: str, args: dict[str, Any] | None = None) -> None:
        """Have another process run an operation, without an answer."""

    async def call(
        self,
        target: str,
        op: str,
        args: dict[str, Any] | None = None,
        *,
        timeout: float | None = 10.0,
    ) -> Any:
        """Have another process run an operation, and return its result."""


class ReactorContext(Protocol):
    """The part of reactor.process.ReactorContext that is needed."""

    @property
    def operations(self) -> Operations:
        """The table that other processes reach."""
        ...

    @property
    def loop(self) -> ReactorLoop:
        """The loop that runs the pollers."""
        ...

    @property
    def node(self) -> Events:
        """The way to other processes."""
        ...

    def send_fds(self, tag: int, fds: Sequence[int]) -> None:
        """Send duplicates of descriptors to the control process."""

    def on_stop(self, fn: Callable[[], Awaitable[None]]) -> None:
        """Run ``fn`` before the reactor ends."""


class Queue:
    """A queue that is served here, until ``stop`` has returned."""

    def __init__(self, loop: ReactorLoop, native: CData, source: int) -> None:
        self.native = native
        self.on_broken: Callable[[int, str], None] = lambda _code, _text: None
        self.on_asked: Callable[[int], None] = lambda _slot: None
        self.on_waiting: Callable[[int, int, int], None] = lambda *_: None
        self._loop = loop
        self._source = source
        self._drained: asyncio.Future[None] = loop.create_future()
        loop.on_notice(source, self._notice)

    def _notice(self, kind: int, code: int, text: str) -> None:
        if kind == lib.NOTICE_BROKEN:
            self.on_broken(code, text)
        elif kind == lib.NOTICE_ASK:
            self.on_asked(code)
        elif kind == lib.NOTICE_LOG:
            log.info("%s", text)
        elif kind == lib.NOTICE_WAITING:
            miss: Any = ffi.new("struct iotlb_miss *")
            if lib.queue_waits(self.native, miss):
                self.on_waiting(miss.iova, miss.size, miss.access)
        elif not self._drained.done():
            self._drained.set_result(None)

    async def stop(self, *, suspend: bool = False) -> int:
        """Wait until nothing is in flight, free the queue, return the next avail entry.

        ``suspend`` leaves what has not been begun in the log.
        """
        if suspend:
            lib.queue_suspend(self.native)
        else:
            lib.queue_stop(self.native)
        await self._drained
        base: int = lib.queue_base(self.native)
        lib.queue_free(self.native)
        self._loop.on_notice(self._source, None)
        return base


class WorkerSession:
    """What this reactor knows of one connection."""

    def __init__(self) -> None:
        self.memory: CData = ffi.NULL
        self.registered: RegisteredMemory | None = None
        self.queues: dict[int, Queue] = {}
        self.stopping: dict[int, asyncio.Task[int]] = {}


class VhostWorker:
    """The operations of a reactor process."""

    def __init__(self, reactor: ReactorContext, scsi: ScsiWorker) -> None:
        self._loop = reactor.loop
        self._node = reactor.node
        self._scsi = scsi
        self._reactor = reactor
        self._faults = -1
        self._sessions: dict[int, WorkerSession] = {}

    @operation
    async def vhost_memory_set(
        self,
        session: int,
        regions: list[RegionArgs],
        register: bool,
        fds: FileDescriptors,
        log: LogArgs | None = None,
        iotlb: list[TranslationArgs] | None = None,
        postcopy: list[bool] | None = None,
    ) -> dict[str, Any]:
        """Map the regions in place of those before; answers when those are mapped no more.

        ``register`` has file disks reach them as registered buffers; the answer says how many bytes
        are. With an ``iotlb`` chains name addresses that it translates. With ``postcopy``,
        accesses to pages that are missing wait (see ``vhost_postcopy_open``); it says of each
        region whether it stays where it was mapped before. The answer has their addresses.
        """
        expected = len(regions) + (0 if log is None else 1 + log.event)
        if expected != len(fds):
            text = f"{len(fds)} descriptors, but {expected} were announced"
            raise OperationError(-errno.EINVAL, text)
        memory = map_memory(regions, list(fds)[: len(regions)])
        if log is not None:
            open_log(memory, log, list(fds)[len(regions) :])
        if iotlb is not None:
            open_iotlb(memory, iotlb)
        state = self._sessions.setdefault(session, WorkerSession())
        if postcopy is not None:
            self._watch_pages(memory, state.memory, postcopy)
        try:
            for queue in state.queues.values():
                check(lib.queue_set_memory(queue.native, memory), "a ring outside of memory")
        except OSError:
            # Some queues use it already: it is freed with the last of them.
            lib.guest_memory_put(memory)
            raise
        former, state.memory = state.memory, memory
        # One after the other, so that the limit of locked memory need not hold both.
        await release_memory(former, state.registered)
        state.registered = RegisteredMemory(self._loop.native)
        if register:
            await state.registered.add(memory_regions(memory))
        addresses = [int(ffi.cast("uintptr_t", place)) for place, _ in memory_regions(memory)]
        return {"registered": state.registered.size, "addresses": addresses}

    @operation
    def vhost_postcopy_open(self, tag: int) -> None:
        """Send a userfaultfd of this process; memory is registered with it from then on."""
        if self._faults < 0:
            self._faults = check(lib.postcopy_open(), "userfaultfd")
        self._reactor.send_fds(tag, [self._faults])

    def _watch_pages(self, memory: CData, former: CData, kept: list[bool]) -> None:
        try:
            for index in (index for index, stays in enumerate(kept) if stays):
                check(lib.postcopy_keep(memory, index, former), f"region {index}")
            check(lib.postcopy_watch(memory, self._faults), "guest memory with a userfaultfd")
        except OSError:
            lib.guest_memory_put(memory)
            raise

    @operation
    async def vhost_memory_drop(self, session: int) -> None:
        """Map no memory; there may be no queue."""
        state = self._sessions.get(session)
        if state is None:
            return
        if state.queues or state.stopping:
            raise OperationError(-errno.EBUSY, f"session {session} still has queues")
        del self._sessions[session]
        self._scsi.drop(session)
        await release_memory(state.memory, state.registered)

    @operation
    async def vhost_queue_start(
        self,
        session: int,
        queue: int,
        ring: RingArgs,
        coalescing: CoalescingArgs,
        fds: FileDescriptors,
        bdev: int | None = None,
        blk: BlkArgs | None = None,
        scsi: ScsiArgs | None = None,
        limits: int = -1,
    ) -> None:
        """Serve a queue: of virtio-blk from a bdev that is open here, or none; of virtio-scsi.

        ``limits`` is the place of what bounds it among the descriptors, -1 for nothing.
        """
        state = self._sessions.get(session)
        if state is None or state.memory == ffi.NULL:
            raise OperationError(-errno.EINVAL, f"session {session} has no memory here")
        if queue in state.queues or queue in state.stopping:
            text = f"queue {queue} of session {session} is served already"
            raise OperationError(-errno.EEXIST, text)
        start = self._starter(session, queue, state.memory, bdev, blk, scsi)
        source = next(_sources)
        reasons: list[str] = []
        self._loop.on_notice(source, lambda _kind, _code, text: reasons.append(text))
        native = start(ring_setup(source, ring, fds))
        if native == ffi.NULL:
            code = ffi.errno
            self._scsi_unused(session, state)
            await asyncio.sleep(0)  # a turn of the loop brings the notice that says why
            self._loop.on_notice(source, None)
            why = reasons[0] if reasons else f"a queue of {ring.size} entries"
            raise OSError(code, f"{os.strerror(code)}: {why}")
        lib.queue_set_coalescing(native, coalescing.delay_base_us, coalescing.iops_threshold)
        served = Queue(self._loop, native, source)
        served.on_broken = lambda code, text: self._tell_broken(session, queue, code, text)
        served.on_asked = lambda slot: self._scsi.forward(session, native, slot)
        served.on_waiting = lambda iova, size, access: self._tell(
            "vhost_iotlb_miss", session, queue, iova=iova, size=size, access=access
        )
        state.queues[queue] = served
        if limits >= 0:
            try:
                self._limit(served, fds[limits])
            except OSError:
                await self._stop(session, state, queue)
                raise

    def _starter(
        self,
        session: int,
        queue: int,
        memory: CData,
        bdev: int | None,
        blk: BlkArgs | None,
        scsi: ScsiArgs | None,
    ) -> Callable[[CData], CData]:
        """Return what makes a queue of a struct vq_setup; OperationError if nothing can."""
        native = self._loop.native
        if blk is not None:
            handle, setup = find_bdev(bdev), blk_setup(blk)
            return lambda ring: lib.blk_queue_start(native, memory, handle, ring, setup)
        if scsi is not None:
            device, slot = self._scsi.device(session, scsi.luns), scsi.slot
            if scsi.missed and queue == lib.SCSI_EVENT_QUEUE:
                lib.scsi_device_missed(device)
            return lambda ring: lib.scsi_queue_start(native, memory, device, queue, ring, slot)
        raise OperationError(-errno.EINVAL, "neither blk nor scsi says what queue it is")

    @operation
    async def vhost_queue_stop(
        self, session: int, queue: int, suspend: bool = False
    ) -> dict[str, int]:
        """Serve a queue no more; answers when nothing of it is in flight.

        ``suspend``: what has not been begun is left in its log.
        """
        state = self._sessions.get(session)
        if state is None or (queue not in state.queues and queue not in state.stopping):
            text = f"queue {queue} of session {session} is not served here"
            raise OperationError(-errno.ENOENT, text)
        return {"base": await self._stop(session, state, queue, suspend=suspend)}

    @operation
    def vhost_queue_set_coalescing(
        self, session: int, queue: int, delay_base_us: int, iops_threshold: int
    ) -> None:
        """Hold a queue's signals back from now on, or (a delay of 0) no more."""
        served = self._find(session, queue)
        if served is not None:
            rc = lib.queue_set_coalescing(served.native, delay_base_us, iops_threshold)
            check(rc, f"coalescing {delay_base_us} us over {iops_threshold} IOPS")

    @operation
    def vhost_queue_set_limits(self, session: int, queue: int, fds: FileDescriptors) -> None:
        """Limit a queue from now on, or have another look at limits; without a descriptor, none."""
        served = self._find(session, queue)
        if served is not None:
            self._limit(served, fds[0] if fds else -1)

    def _limit(self, served: Queue, fd: int) -> None:
        check(lib.queue_set_limits(served.native, fd), "limits of a queue")

    @operation
    def vhost_queue_set_call(self, session: int, queue: int, fds: FileDescriptors) -> None:
        """Signal the driver through another eventfd; without a descriptor, not at all."""
        served = self._find(session, queue)
        if served is not None:
            check(lib.queue_set_call(served.native, fds[0] if fds else -1), "a call eventfd")

    @operation
    async def vhost_iotlb_update(
        self,
        session: int,
        forget: list[tuple[int, int]],
        learn: list[TranslationArgs],
        settle: bool,
    ) -> None:
        """Forget the translations in ranges, then learn others.

        With ``settle``, answers when nothing in flight uses those any more.
        """
        state = self._sessions.get(session)
        if state is None or state.memory == ffi.NULL:
            return
        memory = state.memory
        for first, last in forget:
            lib.iotlb_remove(memory, first, last)
        if settle:
            await settle_iotlb(memory)
        learn_translations(memory, learn)

    @operation
    def vhost_queue_resume(self, session: int, queue: int) -> None:
        """Have a queue try again to take the request that waits for a translation."""
        served = self._find(session, queue)
        if served is not None:
            lib.queue_resume(served.native)

    @operation
    def vhost_queue_fault(self, session: int, queue: int) -> None:
        """Break a queue whose next request waits for a translation that there is not."""
        served = self._find(session, queue)
        if served is not None and lib.queue_waits(served.native, ffi.new("struct iotlb_miss *")):
            lib.queue_fault(served.native)

    def _find(self, session: int, queue: int) -> Queue | None:
        state = self._sessions.get(session)
        return None if state is None else state.queues.get(queue)

    @operation
    def vhost_queue_set_bdev(self, session: int, queue: int, bdev: int | None) -> None:
        """Serve a queue from another bdev; from none, requests fail."""
        served = self._find(session, queue)
        if served is not None:
            lib.blk_queue_set_bdev(served.native, find_bdev(bdev))

    @operation
    async def vhost_session_drop(self, session: int) -> None:
        """Stop all queues of a connection and unmap its memory."""
        state = self._sessions.get(session)
        if state is None:
            return
        served = [*state.queues, *state.stopping]
        await asyncio.gather(*(self._stop(session, state, queue) for queue in served))
        await self.vhost_memory_drop(session)

    async def drain(self) -> None:
        """Stop everything, before the process ends or begins anew."""
        await asyncio.gather(*(self.vhost_session_drop(session) for session in self._sessions))

    async def _stop(
        self, session: int, state: WorkerSession, index: int, *, suspend: bool = False
    ) -> int:
        """Stop a queue; whoever asks while it is being stopped waits for the same end."""
        task = state.stopping.get(index)
        if task is None:
            task = self._loop.create_task(state.queues.pop(index).stop(suspend=suspend))
            state.stopping[index] = task
            task.add_done_callback(lambda _: state.stopping.pop(index))
        base = await asyncio.shield(task)
        self._scsi_unused(session, state)
        return base

    def _scsi_unused(self, session: int, state: WorkerSession) -> None:
        """Free a session's virtio-scsi device, if it has one, with its last queue."""
        if not state.queues and not state.stopping:
            self._scsi.drop(session)

    def _tell_broken(self, session: int, queue: int, code: int, text: str) -> None:
        self._tell("vhost_queue_broken", session, queue, code=code, text=text)

    def _tell(self, op: str, session: int, queue: int, **args: Any) -> None:
        try:
            self._node.send("control", op, {"session": session, "queue": queue, **args})
        except OSError as error:
            log.warning(
                "session %d queue %d: %s %s (not reported: %s)", session, queue, op, args, error
            )


def find_bdev(bdev: int | None) -> CData:
    """Return a bdev's handle, NULL for none; OperationError(-ENODEV) if it is not open here."""
    if bdev is None:
        return ffi.NULL
    try:
        return bdevs.handles[bdev]
    except KeyError:
        raise OperationError(-errno.ENODEV, f"bdev {bdev} is not open in this reactor") from None


def setup(reactor: ReactorContext) -> None:
    """Add the operations to a reactor process."""
    check(lib.mapping_guard(), "sigaction(SIGBUS)")
    units = UnitWorker(reactor.loop)
    scsi = ScsiWorker(reactor.loop, reactor.node, units)
    worker = VhostWorker(reactor, scsi)
    reactor.operations.add(worker, scsi, units)
    reactor.on_stop(units.drain)
    reactor.on_stop(worker.drain)  # before the units that it uses
