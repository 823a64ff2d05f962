"""The rings of one session: when each is served, and the messages that describe them.

A ring is served while its size and addresses are known, there is memory, it is started
(SET_VRING_KICK) and it is enabled. Every message that changes one of these goes the same way: stop
the ring if it runs, change the record, start the ring if it is ready. Stopping waits until no
request is in flight, so nothing is ever changed under a reactor's feet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from reactor.errors import OperationError
from reactor.operations import FileDescriptors
from vhost.connection import Reply
from vhost.descriptors import check_eventfd, forget_log, log_of, make_inflight, open_inflight
from vhost.inband import InBand
from vhost.interfaces import QueueHost
from vhost.journal import Journal
from vhost.messages import (
    MAX_QUEUE_SIZE,
    MAX_QUEUES,
    Feature,
    Inflight,
    ProtocolError,
    ProtocolFeature,
    VringAddr,
    VringFd,
    VringState,
)
from vhost.record import QueueRecord, SessionRecord, Told, close_fds, ring_parts
from vhost.shared_memory import check_dirty_log, check_log_end


class Rings:
    """All rings of a session, with a method for each message about them."""

    def __init__(
        self, record: SessionRecord, host: QueueHost, inband: InBand, journal: Journal
    ) -> None:
        self._record = record
        self._journal = journal
        self._host = host
        self.on_untranslated: Callable[[QueueRecord], None] = lambda _queue: None
        self.on_broken: Callable[[int, str], None] = lambda _index, _why: None
        self._inband = inband

    @asynccontextmanager
    async def changing(
        self, queues: Iterable[QueueRecord], starts: Iterable[QueueRecord] | None = None
    ) -> AsyncIterator[None]:
        """Keep queues from running while the body changes what they depend on.

        It may be the last that ``starts`` were waiting for: by default the same queues.
        """
        for queue in queues:
            await self.stop(queue)
        yield
        for queue in queues if starts is None else starts:
            await self.start_if_ready(queue)

    async def stop(self, queue: QueueRecord, *, suspend: bool = False) -> None:
        """Stop a ring if it runs, once nothing of it is in flight.

        ``suspend``: requests that have not been begun stay in the front-end's log, and are served
        when the ring starts again.
        """
        if queue.running:
            queue.base = await self._host.stop(queue, suspend=suspend)
            queue.running, queue.broken, queue.ring = False, "", None
            queue.recover |= suspend
            await self._journal.save()

    async def start_if_ready(self, queue: QueueRecord) -> None:
        """Serve a ring unless something is missing; ProtocolError if it cannot be served."""
        if queue.running or not self._record.is_ready(queue):
            return
        ring = self._record.ring(queue)
        if ring is None:
            self.on_untranslated(queue)
            return
        self._check_ring(queue, ring)
        self._choose_log(queue)
        queue.ring = ring
        self._inband.prepare(queue)
        queue.running = True
        await self._journal.save(applied=True)
        try:
            await self._host.start(queue)
        except BaseException:
            queue.running = False
            raise
        queue.recover = False

    async def start_all(self) -> None:
        """Serve every ring that is ready."""
        for queue in list(self._record.queues.values()):
            await self.start_if_ready(queue)

    async def resume(self) -> None:
        """Serve the rings again that a control process that died had served.

        What keeps one from being served breaks it.
        """
        for queue in self._record.queues.values():
            if queue.running:
                try:
                    await self._host.start(queue)
                except (OperationError, OSError) as error:
                    self.on_broken(queue.index, f"no reactor can serve it: {error}")
                    queue.running = False
                queue.recover = False

    def _check_ring(self, queue: QueueRecord, ring: VringAddr) -> None:
        """Raise ProtocolError unless a ring is in memory and its size is one of its format."""
        name, packed = f"queue {queue.index}", self._record.packed
        if not packed and queue.size & (queue.size - 1):
            raise ProtocolError(name, "size", queue.size, "a power of two, of a split ring")
        if not packed and queue.base > 0xFFFF:
            raise ProtocolError(name, "base", queue.base, "at most 65535, of a split ring")
        regions = self._record.table().regions
        parts = ring_parts(ring, queue.size, packed=packed)
        for part, (address, length) in parts.items():
            if not any(region.holds(address, length) for region in regions):
                where = f"{address:#x} + {length:#x}"
                raise ProtocolError(name, f"{part} ring", where, "within one region of memory")
        if self._record.logging is not None:
            check_dirty_log(self._record.logging, regions, name)
            if ring.flags & VringAddr.F_LOG:
                check_log_end(self._record.logging, ring.log + parts["used"][1], name)

    def _choose_log(self, queue: QueueRecord) -> None:
        """Give a queue its in-flight log, with what another process began or with nothing."""
        area = self._record.inflight
        if area is None or queue.index >= area.queues:
            if self._record.own_inflight is None:
                self._record.own_inflight = make_inflight(MAX_QUEUES, MAX_QUEUE_SIZE, packed=True)
            area = self._record.own_inflight
        if queue.size > area.queue_size:
            allowed = f"at most {area.queue_size}, the size in SET_INFLIGHT_FD"
            raise ProtocolError(f"queue {queue.index}", "size", queue.size, allowed)
        queue.log = log_of(area, queue.index)
        queue.recover = queue.recover and area.shared
        if not queue.recover:
            forget_log(queue.log)

    # --- messages

    async def _set_vring_num(self, payload: VringState) -> None:
        queue = self._record.queue(payload.index)
        async with self.changing([queue]):
            queue.size = payload.num

    async def _set_vring_base(self, payload: VringState) -> None:
        queue = self._record.queue(payload.index)
        async with self.changing([queue]):
            queue.base = payload.num

    async def _set_vring_addr(self, payload: VringAddr) -> None:
        if payload.flags & VringAddr.F_LOG and not self._record.features & Feature.LOG_ALL:
            raise ProtocolError("SET_VRING_ADDR", "flags", payload.flags, "no log was negotiated")
        queue = self._record.queue(payload.index)
        async with self.changing([queue] if queue.addr != payload else [], [queue]):
            queue.addr = payload

    async def _get_vring_base(self, payload: VringState) -> VringState:
        queue, area = self._record.queue(payload.index), self._record.inflight
        may_suspend = self._record.protocol_features & ProtocolFeature.GET_VRING_BASE_INFLIGHT
        in_area = area is not None and queue.index < area.queues
        await self.stop(queue, suspend=bool(may_suspend and in_area))
        queue.drop_kick()
        return VringState(queue.index, queue.base)

    async def _set_vring_enable(self, payload: VringState) -> None:
        queue = self._record.queue(payload.index)
        async with self.changing([] if payload.num else [queue], [queue]):
            queue.enabled = bool(payload.num)

    async def _set_vring_kick(self, payload: VringFd, fds: FileDescriptors) -> None:
        check_vring_fd(fds, "SET_VRING_KICK")
        queue = self._told(payload)
        async with self.changing([queue]):
            queue.drop_kick()
            queue.kick, queue.started = fds.take(0) if fds else -1, True
            queue.told |= Told.KICK

    async def _set_vring_call(self, payload: VringFd, fds: FileDescriptors) -> None:
        check_vring_fd(fds, "SET_VRING_CALL")
        queue = self._told(payload)
        self._inband.unwatch(queue.call)
        former, queue.call = queue.call, fds.take(0) if fds else -1
        queue.told |= Told.CALL
        try:
            # Without a drain: front-ends change it whenever the guest masks an interrupt.
            if queue.running:
                await self._host.set_call(queue)
        finally:
            close_fds((former,))

    async def _set_vring_err(self, payload: VringFd, fds: FileDescriptors) -> None:
        check_vring_fd(fds, "SET_VRING_ERR")
        queue = self._told(payload)
        async with self.changing([queue]):
            self._inband.unwatch(queue.error)
            close_fds((queue.error,))
            queue.error = fds.take(0) if fds else -1
            queue.told |= Told.ERROR

    def _told(self, payload: VringFd) -> QueueRecord:
        """Return the queue of a message that announces one of its descriptors."""
        self._record.uses_fds = True
        return self._record.queue(payload.index)

    async def _vring_kick(self, payload: VringState) -> None:
        queue = self._record.queue(payload.index)
        self._inband.kick(queue)
        await self.start_if_ready(queue)

    async def _get_inflight_fd(self, payload: Inflight) -> Reply:
        area = make_inflight(payload.num_queues, payload.queue_size, packed=self._record.packed)
        size = area.queues * area.stride
        return Reply(replace(payload, mmap_size=size, mmap_offset=0), [area.fd])

    async def _set_inflight_fd(self, payload: Inflight, fds: FileDescriptors) -> None:
        area = open_inflight(payload, fds[0], "SET_INFLIGHT_FD", packed=self._record.packed)
        async with self.changing(self._record.queues.values()):
            if self._record.inflight is not None:
                close_fds((self._record.inflight.fd,))
            self._record.inflight = area
            fds.take(0)
            for index in range(area.queues):
                self._record.queue(index).recover = True


def check_vring_fd(fds: FileDescriptors, message: str) -> None:
    """Raise ProtocolError unless the descriptor, if there is one, is an eventfd."""
    for fd in fds:
        check_eventfd(fd, message)
