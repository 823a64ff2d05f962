"""Where one session's queues are served, and what moves them: a QueueHost (vhost.interfaces).

A queue is attached to a reactor and detached from it again, and that is all there is: starting and
stopping, replacing a reactor that died, and moving a queue to another one. A reactor that
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
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from reactor.errors import OperationError
from vhost.descriptors import log_is_used
from vhost.interfaces import ServedDevice
from vhost.iotlb import Translation
from vhost.record import QueueRecord, SessionRecord
from vhost.served_queue import ServedQueue, ring_args
from vhost.session_memory import SessionMemory

if TYPE_CHECKING:
    from vhost.host import ReactorHost

T = TypeVar("T")
ReactorAction = Callable[[Any, Callable[[str, dict[str, Any]], Awaitable[Any]]], Awaitable[None]]

log = logging.getLogger(__name__)


class SessionQueues:
    """The queues of one session: a QueueHost.

    ``on_broken(index, why)`` is called when a queue is served no more though nobody stopped it,
    ``on_miss(index, iova, size, access)`` when its next request waits for a translation,
    ``on_postcopy_lost()`` when the reactor that begin_postcopy() has made died. The lock keeps the
    session's own changes and the restoring of a reactor apart.
    """

    def __init__(
        self, host: ReactorHost, record: SessionRecord, device: ServedDevice, limits: int
    ) -> None:
        self.on_broken: Callable[[int, str], None] = lambda _index, _why: None
        self.on_miss: Callable[[int, int, int, int], None] = lambda *_: None
        self.on_postcopy_lost: Callable[[], None] = lambda: None
        self._limits = limits
        self._lent: Any = None  # the reactor that serves the queues during post-copy
        self._host = host
        self._record = record
        self._device = device
        self._queues: dict[int, ServedQueue] = {}
        self._memory = SessionMemory(host, record, device)
        self._lock = asyncio.Lock()

    @property
    def queues(self) -> Collection[ServedQueue]:
        """Those that are served, with their places."""
        return self._queues.values()

    @property
    def _places(self) -> Collection[int]:
        """Where queues may be served now."""
        return self._device.cpus if self._lent is None else [self._lent.cpu]

    @property
    def registered(self) -> int:
        """Bytes of memory that are registered with every reactor that serves a queue."""
        return min(self._memory.mapped.values(), default=0)

    def in_flight(self) -> int:
        """Return how many requests the reactors are working on."""
        return sum(
            self._host.reactor(one.cpu).stats.slot(one.slot, "struct queue_stats").in_flight
            for one in self._queues.values()
        )

    async def start(self, queue: QueueRecord) -> None:
        """See QueueHost; a reactor that dies meanwhile is waited for."""
        cpu, slot = self._host.placement.place(self._places), self._host.slots.allocate()
        self._host.clear_statistics(slot)
        served = ServedQueue(queue, cpu, slot)
        self._queues[queue.index] = served
        try:
            await self._until_done(served.cpu, lambda: self._attach(served))
        except BaseException:
            async with self._lock:
                await self._forget(served)
            raise

    async def stop(self, queue: QueueRecord, *, suspend: bool = False) -> int:
        """See QueueHost; when the queue's reactor has died, the next one finishes what it began."""
        served = self._queues[queue.index]
        base = await self._until_done(served.cpu, lambda: self._detach(served, suspend=suspend))
        async with self._lock:
            await self._forget(served)
        return base

    async def set_call(self, queue: QueueRecord) -> None:
        """See QueueHost; a reactor that replaces one that died reads it from the record."""
        served = self._queues[queue.index]
        args = {"session": self._record.id, "queue": queue.index}
        fds = [queue.call] if queue.call >= 0 else []
        async with self._lock:
            if served.attached:
                with suppress(ConnectionResetError):
                    await self._host.call(served.cpu, "vhost_queue_set_call", args, fds)

    async def _until_done(self, cpu: int, action: Callable[[], Awaitable[T]]) -> T:
        """Run ``action`` under the lock; again with the next reactor when this one dies."""
        while True:
            seen = self._host.restored(cpu)
            with suppress(ConnectionResetError):
                async with self._lock:
                    return await action()
            if self._lent is not None and cpu == self._lent.cpu:
                raise OperationError(-errno.EPIPE, f"{self._lent.name} is gone")
            await self._host.wait_restored(cpu, seen)

    async def set_memory(self) -> None:
        """See QueueHost."""
        async with self._lock:
            lent = set() if self._lent is None else {self._lent.cpu}
            for cpu in lent | self._memory.mapped.keys():
                # A reactor that died has nothing mapped; the next one gets the new table.
                with suppress(ConnectionResetError):
                    await self._map(cpu)
            await self._memory.release({entry.fd for entry in self._record.memory})

    async def update_iotlb(
        self,
        forgotten: Sequence[tuple[int, int]],
        learnt: Sequence[Translation],
        *,
        settle: bool = False,
    ) -> None:
        """See QueueHost; a reactor that replaces one that died is told all that the record has."""
        args = {
            "session": self._record.id,
            "forget": [list(each) for each in forgotten],
            "learn": [entry.as_list() for entry in learnt],
            "settle": settle,
        }
        async with self._lock:
            for cpu in list(self._memory.mapped):
                with suppress(ConnectionResetError):
                    await self._host.call(cpu, "vhost_iotlb_update", args)

    async def begin_postcopy(self) -> int:
        """See QueueHost."""
        cluster = self._host.cluster
        reactor = await cluster.lend(self._host.placement.best(self._device.cpus), "postcopy")
        try:
            _, fds = await cluster.call_for_fds(reactor, "vhost_postcopy_open", 1)
        except BaseException:
            await cluster.take_back(reactor, kill=True)
            raise
        self._lent = reactor
        log.info("session %d: post-copy begins, on %s", self._record.id, reactor.name)
        with fds:
            return fds.take(0)

    def addresses(self) -> Mapping[int, int]:
        """See QueueHost."""
        return self._memory.addresses

    async def end_postcopy(self) -> None:
        """See QueueHost."""
        lent = self._lent
        if lent is None:
            return
        moving = list(self._queues.values())
        for served in moving:
            await self._leave(served, self._host.placement.best(self._device.cpus))
        self._lent, self._memory.addresses = None, {}
        for served in moving:
            await self._enter(served)
        async with self._lock:
            with suppress(ConnectionResetError):
                await self._host.call(lent.cpu, "vhost_session_drop", {"session": self._record.id})
            self._memory.mapped.pop(lent.cpu, None)
        await self._host.cluster.take_back(lent)
        log.info("session %d: post-copy has ended", self._record.id)

    async def abandon_postcopy(self) -> None:
        """See QueueHost."""
        if self._lent is not None and self._lent.child is not None:
            await self._lent.child.kill()

    async def resume(self, queue: QueueRecord) -> None:
        """See QueueHost."""
        await self._tell_waiting(queue, "vhost_queue_resume")

    async def fault(self, queue: QueueRecord) -> None:
        """See QueueHost."""
        await self._tell_waiting(queue, "vhost_queue_fault")

    async def _tell_waiting(self, queue: QueueRecord, op: str) -> None:
        """Tell a queue's reactor something; one that replaces it finds out by itself."""
        async with self._lock:
            served = self._queues.get(queue.index)
            if served is not None and served.attached:
                args = {"session": self._record.id, "queue": queue.index}
                with suppress(ConnectionResetError):
                    await self._host.call(served.cpu, op, args)

    async def drop(self) -> None:
        """See QueueHost."""
        lent, self._lent = self._lent, None
        if lent is not None:
            await self._host.cluster.take_back(lent, kill=True)
        async with self._lock:
            for cpu in list(self._memory.mapped):
                try:
                    await self._host.call(cpu, "vhost_session_drop", {"session": self._record.id})
                except ConnectionResetError:
                    pass
                except (OperationError, OSError) as error:
                    log.error("session %d on CPU %d: %s", self._record.id, cpu, error)
            self._memory.mapped.clear()
            for served in list(self._queues.values()):
                served.attached = False
                await self._forget(served)
            await self._memory.release()
            self._host.forget(self._record.id)

    async def set_coalescing(self) -> None:
        """Have the queues that are served do as the record says now."""
        settings = asdict(self._record.coalescing)
        async with self._lock:
            for served in list(self._queues.values()):  # one may start meanwhile
                if served.attached:
                    args = {"session": self._record.id, "queue": served.record.index, **settings}
                    # A reactor that died is told when it is replaced.
                    with suppress(ConnectionResetError):
                        await self._host.call(served.cpu, "vhost_queue_set_coalescing", args)

    async def set_limits(self, fd: int) -> None:
        """Have all queues, of now and later, keep to a struct qos_limits; -1: to none.

        Again when it has changed.
        """
        async with self._lock:
            self._limits = fd
            for served in list(self._queues.values()):
                if served.attached:
                    args = {"session": self._record.id, "queue": served.record.index}
                    fds = [fd] if fd >= 0 else []
                    # A reactor that died is told when it is replaced.
                    with suppress(ConnectionResetError):
                        await self._host.call(served.cpu, "vhost_queue_set_limits", args, fds)

    async def lose_device(self) -> None:
        """Serve the queues without their device: requests fail from now on."""
        async with self._lock:
            for served in list(self._queues.values()):
                args = {"session": self._record.id, "queue": served.record.index, "bdev": None}
                with suppress(ConnectionResetError):
                    await self._host.call(served.cpu, "vhost_queue_set_bdev", args)
                await self._close_device(served)

    @property
    def idle(self) -> bool:
        """Whether no queue is served, or about to be, until the event loop runs again."""
        busy = any(one.attached or one.handle is not None for one in self._queues.values())
        return not busy and not self._lock.locked()

    async def leave(self) -> None:
        """Serve the queues no more, until ``enter``; others may start meanwhile: see ``idle``."""
        for served in list(self._queues.values()):
            await self._leave(served, served.cpu)
        async with self._lock:
            pass  # whoever changes something has done so

    async def enter(self) -> None:
        """Go on with queues that were left, from the device as it is now.

        One that its reactor refuses is broken, as after the death of a reactor.
        """
        for served in list(self._queues.values()):
            try:
                await self._enter(served)
            except (OperationError, OSError) as error:
                self.on_broken(served.record.index, f"it cannot be served any more: {error}")
        if self._device.registered_buffers != bool(self.registered):
            await self.set_memory()

    async def move(self, cpus: Collection[int]) -> None:
        """Serve the queues on ``cpus``; those that are there already stay.

        When a reactor cannot serve one, all go back and its error is raised.
        OperationError(-EBUSY) during post-copy: elsewhere there would be zeroes for missing pages.
        """
        if self._lent is not None:
            text = f"session {self._record.id}: a post-copy migration is under way"
            raise OperationError(-errno.EBUSY, text)
        moving = [one for one in self._queues.values() if one.cpu not in cpus]
        former = [served.cpu for served in moving]
        load = Counter({cpu: self._host.placement.load(cpu) for cpu in cpus})
        targets: list[int] = []
        for _ in moving:
            targets.append(min(cpus, key=lambda cpu: (load[cpu], cpu)))
            load[targets[-1]] += 1
        try:
            await self._place(moving, targets)
        except (OperationError, OSError):
            await self._place(moving, former)
            raise
        async with self._lock:
            for cpu in list(self._memory.mapped):
                with suppress(ConnectionResetError):
                    if not any(served.cpu == cpu for served in self._queues.values()):
                        await self._map(cpu)

    async def _place(self, queues: Sequence[ServedQueue], cpus: Sequence[int]) -> None:
        """Serve queues elsewhere; none is begun before all have been left."""
        for served, cpu in zip(queues, cpus, strict=True):
            await self._leave(served, cpu)
        for served in queues:
            await self._enter(served)

    async def _leave(self, served: ServedQueue, cpu: int) -> None:
        """Serve a queue no more, to go on at ``cpu``: nothing of it is in flight then."""

        async def leave() -> None:
            if self._queues.get(served.record.index) is not served:
                return  # the front-end has stopped it meanwhile
            served.record.base = await self._detach(served)
            await self._close_device(served)
            self._host.placement.move(served.cpu, cpu)
            served.cpu = cpu

        await self._until_done(served.cpu, leave)

    async def _enter(self, served: ServedQueue) -> None:
        """Go on with a queue that was left."""

        async def enter() -> None:
            if self._queues.get(served.record.index) is served:
                await self._attach(served)

        await self._until_done(served.cpu, enter)

    async def at_reactors(self, action: ReactorAction) -> None:
        """Run ``action(reactor, call)`` for each reactor that serves queues of the session.

        ``call`` runs an operation there. A reactor that dies meanwhile is told all when it is back.
        """
        async with self._lock:
            for cpu in list(self._memory.mapped):
                with suppress(ConnectionResetError):
                    reactor = self._host.reactor(cpu)
                    await action(reactor, partial(self._host.call, cpu))

    async def ask_reactors(
        self, op: str, args: Mapping[str, Any], *, but: int | None = None
    ) -> list[Any]:
        """Run an operation in each reactor that serves queues, but for the process ``but``.

        One that dies meanwhile is asked again when it serves them again. Unlike ``at_reactors``
        it does not wait for changes of the session, which may wait for what is asked.
        """

        async def ask(cpu: int) -> Any:
            while True:
                seen = self._host.restored(cpu)
                if self._host.reactor(cpu).pid == but:
                    return None
                with suppress(ConnectionResetError):
                    return await self._host.call(cpu, op, args)
                await self._host.wait_restored(cpu, seen)

        cpus = {served.cpu for served in self._queues.values()}
        answers = await asyncio.gather(*(ask(cpu) for cpu in cpus))
        return [answer for answer in answers if answer is not None]

    def place(self, queue: int) -> int | None:
        """Return the CPU where a queue is served, None if it is not served now."""
        served = self._queues.get(queue)
        return served.cpu if served is not None and served.attached else None

    def lost(self, cpu: int) -> None:
        """Take note that a reactor has died, and everything in it."""
        self._memory.mapped.pop(cpu, None)
        for served in self._queues.values():
            if served.cpu == cpu:
                served.attached, served.handle = False, None
        if self._lent is not None and cpu == self._lent.cpu:
            self.on_postcopy_lost()

    async def restore(self, cpu: int) -> None:
        """Attach again what a reactor that died had. Never raises."""
        async with self._lock:
            queues = [queue for queue in self._queues.values() if queue.cpu == cpu]
            # The first has the memory mapped, which the others find there, all at once.
            for group in (queues[:1], queues[1:]):
                await asyncio.gather(*(self._restore(served) for served in group))

    async def _restore(self, served: ServedQueue) -> None:
        try:
            await self._attach(served)
        except ConnectionResetError:
            pass  # it died again, and there will be another
        except (OperationError, OSError) as error:
            self.on_broken(served.record.index, f"no new reactor can serve it: {error}")

    async def _attach(self, served: ServedQueue) -> None:
        """Have the queue's reactor serve it; its log says whether something was in flight."""
        if served.attached:
            return
        assert served.record.log is not None
        if served.cpu not in self._memory.mapped:
            await self._map(served.cpu)
        if served.handle is None:
            served.handle = await self._device.open(self._host.reactor(served.cpu))
        recover = log_is_used(served.record.log)
        ring, fds = ring_args(self._record.features, served.record, recover=recover)
        args = {
            "session": self._record.id,
            "queue": served.record.index,
            "ring": ring,
            "coalescing": asdict(self._record.coalescing),
            **self._device.queue_args(
                self._record.features, self._record.written, served.slot, served.handle
            ),
        }
        if self._limits >= 0:
            args["limits"] = len(fds)
            fds.append(self._limits)
        await self._host.call(served.cpu, "vhost_queue_start", args, fds)
        served.attached = True

    async def _detach(self, served: ServedQueue, *, suspend: bool = False) -> int:
        """Stop a queue and return its base: the last one known if no reactor could take it over."""
        if served.attached:
            args: dict[str, Any] = {"session": self._record.id, "queue": served.record.index}
            if suspend:
                args["suspend"] = True
            answer = await self._host.call(served.cpu, "vhost_queue_stop", args)
            served.attached = False
            return int(answer["base"])
        if not self._host.reactor(served.cpu).alive:
            raise ConnectionResetError(errno.ECONNRESET, f"the reactor on CPU {served.cpu} is gone")
        return served.record.base

    async def _map(self, cpu: int) -> None:
        """Have a reactor map the session's memory as it is now, or none where it serves nothing."""
        lent = self._lent is not None and cpu == self._lent.cpu
        wanted = lent or any(served.cpu == cpu for served in self._queues.values())
        if wanted and self._record.memory:
            await self._memory.map(cpu, lent=lent)
        else:
            await self._memory.unmap(cpu)

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
