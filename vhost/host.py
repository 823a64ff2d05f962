"""Where queues are served: the control process's view of the reactors' vhost.worker.

A queue is attached to a reactor and detached from it again, and that is all there is: starting and
stopping, replacing a reactor that died, and later moving a queue to another one. A reactor that
died costs no queue its state: rings and guest memory are the front-end's, what was in flight stands
in the queue's log, and all the rest in the session's record, from which the next one is told.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from bdev.guest_dma import GuestDma, Lease
from reactor.errors import OperationError
from vhost.descriptors import forget_log, log_is_used
from vhost.interfaces import Cluster, ServedDevice, Slots
from vhost.placement import Placement
from vhost.record import MappedRegion, QueueRecord, SessionRecord

RESTORE_LIMIT = 30.0  # seconds that somebody waits for a reactor that died to be replaced
_MAX_CALLS = 64  # of ours that one reactor has to carry out at the same time

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ServedQueue:
    """A queue and where it is."""

    record: QueueRecord
    cpu: int
    slot: int  # of the statistics
    handle: int | None = None  # what the device's open() returned
    attached: bool = False  # its reactor serves it


class ReactorHost:
    """All reactors, and the sessions whose queues they serve."""

    def __init__(
        self,
        cluster: Cluster,
        slots: Slots,
        placement: Placement | None = None,
        guest_dma: GuestDma | None = None,
    ) -> None:
        self.slots = slots
        self.guest_dma = guest_dma
        self.placement = placement or Placement()
        self._cluster = cluster
        self._sessions: dict[int, SessionQueues] = {}
        self._restored: Counter[int] = Counter()  # by CPU: how often a reactor there was told all
        self._news = asyncio.Condition()
        self._room: dict[int, asyncio.Semaphore] = {}
        cluster.on_lost(self._lost)
        cluster.on_started(self._restore)

    def open(self, record: SessionRecord, device: ServedDevice) -> SessionQueues:
        """Return the host of a new session, which knows it until it is dropped."""
        session = SessionQueues(self, record, device)
        self._sessions[record.id] = session
        return session

    def find(self, session: int) -> SessionQueues | None:
        """Return the host of a session that is open."""
        return self._sessions.get(session)

    def forget(self, session: int) -> None:
        """Forget a session, which is served nowhere any more."""
        self._sessions.pop(session, None)

    def reactor(self, cpu: int) -> Any:
        """Return the reactor on ``cpu``; OperationError(-ENODEV) if there is none."""
        for reactor in self._cluster.reactors:
            if reactor.cpu == cpu:
                return reactor
        raise OperationError(-errno.ENODEV, f"there is no reactor on CPU {cpu}")

    async def call(
        self, cpu: int, op: str, args: Mapping[str, Any], fds: Sequence[int] = ()
    ) -> Any:
        """Run an operation in a reactor, for however long it takes.

        Raises ConnectionResetError when the reactor dies or is dead, OperationError if it refuses.
        """
        room = self._room.setdefault(cpu, asyncio.Semaphore(_MAX_CALLS))
        async with room:
            return await self._cluster.call(self.reactor(cpu), op, dict(args), fds, timeout=None)

    def restored(self, cpu: int) -> int:
        """Return how often a reactor on ``cpu`` was told what it has to serve."""
        return self._restored[cpu]

    async def wait_restored(self, cpu: int, seen: int) -> None:
        """Wait until ``restored`` is no longer ``seen``; OperationError(-ETIMEDOUT)."""
        try:
            async with asyncio.timeout(RESTORE_LIMIT), self._news:
                await self._news.wait_for(lambda: self._restored[cpu] != seen)
        except TimeoutError:
            text = f"the reactor on CPU {cpu} was not replaced within {RESTORE_LIMIT:g} s"
            raise OperationError(-errno.ETIMEDOUT, text) from None

    async def _lost(self, reactor: Any) -> None:
        for session in self._sessions.values():
            session.lost(reactor.cpu)

    async def _restore(self, reactor: Any) -> None:
        """Tell a reactor that has just started what it has to serve."""
        cpu: int = reactor.cpu
        sessions = list(self._sessions.values())
        await asyncio.gather(*(session.restore(cpu) for session in sessions))
        async with self._news:
            self._restored[cpu] += 1
            self._news.notify_all()


class SessionQueues:
    """The queues of one session: a QueueHost.

    ``on_broken(index, why)`` is called when a queue is served no more though nobody stopped it. The
    lock keeps the session's own changes and the restoring of a reactor apart.
    """

    def __init__(self, host: ReactorHost, record: SessionRecord, device: ServedDevice) -> None:
        self.on_broken: Callable[[int, str], None] = lambda _index, _why: None
        self._host = host
        self._record = record
        self._device = device
        self._queues: dict[int, ServedQueue] = {}
        self._leases: dict[int, Lease | None] = {}  # by descriptor, of guest memory
        self._mapped: set[int] = set()  # CPUs whose reactors have the session's memory mapped
        self._lock = asyncio.Lock()

    @property
    def queues(self) -> Collection[ServedQueue]:
        """Those that are served, with their places."""
        return self._queues.values()

    def in_flight(self) -> int:
        """Return how many requests the reactors are working on."""
        return sum(
            self._host.reactor(one.cpu).stats.slot(one.slot, "struct queue_stats").in_flight
            for one in self._queues.values()
        )

    async def start(self, queue: QueueRecord, *, recover: bool) -> None:
        """See QueueHost; a reactor that dies meanwhile is waited for."""
        assert queue.log is not None
        if not recover:
            forget_log(queue.log)
        cpu, slot = self._host.placement.place(self._device.cpus), self._host.slots.allocate()
        self._host.reactor(cpu).stats.clear_slot(slot)
        served = ServedQueue(queue, cpu, slot)
        self._queues[queue.index] = served
        try:
            await self._until_done(served.cpu, lambda: self._attach(served))
        except BaseException:
            async with self._lock:
                await self._forget(served)
            raise

    async def stop(self, queue: QueueRecord) -> int:
        """See QueueHost; when the queue's reactor has died, the next one finishes what it began."""
        served = self._queues[queue.index]
        base = await self._until_done(served.cpu, lambda: self._detach(served))
        async with self._lock:
            await self._forget(served)
        return base

    async def _until_done(self, cpu: int, action: Callable[[], Awaitable[T]]) -> T:
        """Run ``action`` under the lock; again with the next reactor when this one dies."""
        while True:
            seen = self._host.restored(cpu)
            with suppress(ConnectionResetError):
                async with self._lock:
                    return await action()
            await self._host.wait_restored(cpu, seen)

    async def set_memory(self) -> None:
        """See QueueHost."""
        async with self._lock:
            for cpu in list(self._mapped):
                # A reactor that died has nothing mapped; the next one gets the new table.
                with suppress(ConnectionResetError):
                    await self._map(cpu)
            await self._release({entry.fd for entry in self._record.memory})

    async def drop(self) -> None:
        """See QueueHost."""
        async with self._lock:
            for cpu in self._mapped:
                try:
                    await self._host.call(cpu, "vhost_session_drop", {"session": self._record.id})
                except ConnectionResetError:
                    pass
                except (OperationError, OSError) as error:
                    log.error("session %d on CPU %d: %s", self._record.id, cpu, error)
            self._mapped.clear()
            for served in list(self._queues.values()):
                served.attached = False
                await self._forget(served)
            await self._release()
            self._host.forget(self._record.id)

    async def lose_device(self) -> None:
        """Serve the queues without their device: requests fail from now on."""
        async with self._lock:
            for served in self._queues.values():
                args = {"session": self._record.id, "queue": served.record.index, "bdev": None}
                with suppress(ConnectionResetError):
                    await self._host.call(served.cpu, "vhost_queue_set_bdev", args)
                await self._close_device(served)

    def lost(self, cpu: int) -> None:
        """Take note that a reactor has died, and everything in it."""
        self._mapped.discard(cpu)
        for served in self._queues.values():
            if served.cpu == cpu:
                served.attached, served.handle = False, None

    async def restore(self, cpu: int) -> None:
        """Attach again what a reactor that died had. Never raises."""
        async with self._lock:
            for served in [queue for queue in self._queues.values() if queue.cpu == cpu]:
                try:
                    await self._attach(served)
                except ConnectionResetError:
                    return  # it died again, and there will be another
                except (OperationError, OSError) as error:
                    self.on_broken(served.record.index, f"no new reactor can serve it: {error}")

    async def _attach(self, served: ServedQueue) -> None:
        """Have the queue's reactor serve it; its log says whether something was in flight."""
        if served.attached:
            return
        assert served.record.log is not None
        if served.cpu not in self._mapped:
            await self._map(served.cpu)
        if served.handle is None:
            served.handle = await self._device.open(self._host.reactor(served.cpu))
        recover = log_is_used(served.record.log)
        ring, fds = ring_args(self._record.features, served.record, recover=recover)
        args = {
            "session": self._record.id,
            "queue": served.record.index,
            "ring": ring,
            **self._device.queue_args(self._record.features, served.slot, served.handle),
        }
        await self._host.call(served.cpu, "vhost_queue_start", args, fds)
        served.attached = True

    async def _detach(self, served: ServedQueue) -> int:
        """Stop a queue and return its base: the last one known if no reactor could take it over."""
        if served.attached:
            args = {"session": self._record.id, "queue": served.record.index}
            answer = await self._host.call(served.cpu, "vhost_queue_stop", args)
            served.attached = False
            return int(answer["base"])
        if not self._host.reactor(served.cpu).alive:
            raise ConnectionResetError(errno.ECONNRESET, f"the reactor on CPU {served.cpu} is gone")
        return served.record.base

    async def _map(self, cpu: int) -> None:
        """Have a reactor map the session's memory as it is now, or none where it serves nothing."""
        wanted = any(served.cpu == cpu for served in self._queues.values())
        if not wanted or not self._record.memory:
            await self._host.call(cpu, "vhost_memory_drop", {"session": self._record.id})
            self._mapped.discard(cpu)
            return
        regions = [
            [
                entry.region.guest,
                entry.region.size,
                entry.region.user,
                entry.region.offset,
                await self._device_address(entry),
            ]
            for entry in self._record.memory
        ]
        fds = [entry.fd for entry in self._record.memory]
        args = {"session": self._record.id, "regions": regions}
        self._mapped.add(cpu)
        await self._host.call(cpu, "vhost_memory_set", args, fds)

    async def _device_address(self, entry: MappedRegion) -> int:
        """Return where devices see a region of guest memory, 0 if nowhere."""
        if self._host.guest_dma is None:
            return 0
        if entry.fd not in self._leases:
            region = entry.region
            lease = await self._host.guest_dma.lease(entry.fd, region.offset, region.size)
            self._leases[entry.fd] = lease
        lease = self._leases[entry.fd]
        return 0 if lease is None else lease.iova

    async def _release(self, kept: Collection[int] = ()) -> None:
        """Give back the device addresses of memory that no reactor uses any more."""
        for fd in [fd for fd in self._leases if fd not in kept]:
            lease = self._leases.pop(fd)
            if lease is not None and self._host.guest_dma is not None:
                await self._host.guest_dma.release(lease)

    async def _forget(self, served: ServedQueue) -> None:
        """Give back what a queue had that is served no more."""
        await self._close_device(served)
        del self._queues[served.record.index]
        self._host.placement.release(served.cpu)
        self._host.slots.free(served.slot)

    async def _close_device(self, served: ServedQueue) -> None:
        handle, served.handle = served.handle, None
        if handle is None:
            return
        try:
            await self._device.close(self._host.reactor(served.cpu), handle)
        except ConnectionResetError:
            pass  # the handle has gone with its reactor
        except (OperationError, OSError) as error:
            log.error("queue %d on CPU %d: %s", served.record.index, served.cpu, error)


def ring_args(
    features: int, queue: QueueRecord, *, recover: bool
) -> tuple[dict[str, Any], list[int]]:
    """Return vhost.worker.RingArgs for a queue, and the descriptors that go with it."""
    assert queue.addr is not None
    assert queue.log is not None
    fds: list[int] = []

    def place(fd: int) -> int:
        if fd < 0:
            return -1
        fds.append(fd)
        return len(fds) - 1

    ring = {
        "size": queue.size,
        "base": queue.base,
        "features": features,
        "desc": queue.addr.desc,
        "avail": queue.addr.avail,
        "used": queue.addr.used,
        "kick": place(queue.kick),
        "call": place(queue.call),
        "error": place(queue.error),
        "log": place(queue.log.fd),
        "log_offset": queue.log.offset,
        "log_size": queue.log.size,
        "recover": recover,
    }
    return ring, fds
