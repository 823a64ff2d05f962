"""I/O virtual addresses: what the front-end's IOMMU has told, and asking for what it has not.

With VIRTIO_F_ACCESS_PLATFORM all addresses of a driver, of its rings and in them, are IOVAs, which
the front-end translates (vhost-user, "IOMMU support"). What it has told is kept in the record and
by the reactors that serve the session. A request with an address that they do not know waits in its
ring until the front-end has been asked (IOTLB_MSG of type MISS); so does a ring that cannot start.
An address that the front-end does not translate breaks the queue, as any other bad address does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from reactor.errors import OperationError
from vhost.interfaces import QueueHost
from vhost.iotlb import MAX_ENTRIES, Translation
from vhost.messages import (
    BackendRequest,
    IotlbMessage,
    Payload,
    ProtocolError,
    ProtocolFeature,
)
from vhost.record import QueueRecord, SessionRecord, ring_access, ring_parts
from vhost.shared_memory import Changing

# Seconds until an address counts as one that is not translated: after the front-end has said that
# it has dealt with the question, whose answer may still be unread, or (without REPLY_ACK) after it
# was asked.
ANSWER_LIMIT = 1.0
SILENCE_LIMIT = 10.0


class Requests(Protocol):
    """The part of vhost.backend_channel that is needed."""

    @property
    def is_open(self) -> bool:
        """Whether there is a way to the front-end."""
        ...

    def tell(self, request: BackendRequest, payload: Payload | None = None) -> None:
        """Send a request for which no reply is asked."""
        ...

    async def ask(self, request: BackendRequest, payload: Payload) -> int:
        """Send a request and return what the front-end says of it: 0 for success.

        OSError if it says nothing.
        """
        ...


@dataclass(slots=True)
class Want:
    """What a queue waits for: a part of its ring, or (``part`` is empty) the next request's."""

    queue: QueueRecord
    part: str
    iova: int
    size: int
    access: int
    asked: int = 0


class Translator:
    """The IOTLB of a session, with a method for the message about it."""

    def __init__(
        self,
        record: SessionRecord,
        host: QueueHost,
        changing: Changing,
        requests: Requests,
        warn: Callable[[str], None],
    ) -> None:
        self._record = record
        self._host = host
        self._changing = changing
        self._requests = requests
        self._warn = warn
        self._wants: dict[tuple[int, str], Want] = {}
        self._news = asyncio.Event()  # something was translated
        self._asking: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Ask for nothing any more."""
        self._wants.clear()
        if self._asking is not None:
            self._asking.cancel()

    def need(self, index: int, iova: int, size: int, access: int) -> None:
        """Take note that the next request of a queue waits for a translation."""
        queue = self._record.queues.get(index)
        if queue is not None:
            self._want(Want(queue, "", iova, size, access))

    def need_ring(self, queue: QueueRecord) -> None:
        """Take note that a queue cannot start before its ring is translated."""
        assert queue.addr is not None
        packed = self._record.packed
        for part, (iova, size) in ring_parts(queue.addr, queue.size, packed=packed).items():
            access = ring_access(part, packed=packed)
            if self._record.iotlb.missing(iova, size, access) is not None:
                self._want(Want(queue, part, iova, size, access))

    # --- what the front-end tells

    async def _iotlb_msg(self, payload: IotlbMessage) -> None:
        if not self._record.translated:
            text = "only after ACCESS_PLATFORM is negotiated"
            raise ProtocolError("IOTLB_MSG", "type", payload.kind, text, fatal=False)
        if payload.kind == IotlbMessage.INVALIDATE:
            await self._invalidate(payload.iova, payload.last)
        else:
            entry = Translation(payload.iova, payload.size, payload.user, payload.access)
            await self._update(entry)

    async def _update(self, entry: Translation) -> None:
        record = self._record
        if not any(region.holds(entry.user, entry.size) for region in record.table().regions):
            where = f"{entry.user:#x} + {entry.size:#x}"
            text = "within one region of memory"
            raise ProtocolError("IOTLB_MSG", "uaddr", where, text, fatal=False)
        moved = [queue for queue in record.queues.values() if self._moves(queue, entry)]
        async with self._changing(moved, record.queues.values()):
            forgotten = record.iotlb.add(entry)
            self._news.set()
            ranges = [(each.iova, each.last) for each in forgotten]
            await self._host.update_iotlb(ranges, [entry])
        await self._resume()

    async def _invalidate(self, first: int, last: int) -> None:
        """Forget translations; nothing uses them any more when this returns.

        A ring that loses its own stops and waits for a new one.
        """
        record = self._record
        hit = [queue for queue in record.queues.values() if self._touches(queue, first, last)]
        async with self._changing(hit, hit):
            if record.iotlb.remove(first, last):
                await self._host.update_iotlb([(first, last)], [], settle=True)

    def _touches(self, queue: QueueRecord, first: int, last: int) -> bool:
        """Tell whether a queue that runs has a part of its ring in a range."""
        if not queue.running or queue.addr is None:
            return False
        parts = ring_parts(queue.addr, queue.size, packed=self._record.packed).values()
        return any(iova <= last and first < iova + size for iova, size in parts)

    def _moves(self, queue: QueueRecord, entry: Translation) -> bool:
        """Tell whether a translation puts a part of a ring that runs elsewhere."""
        if not queue.running or queue.addr is None or queue.ring is None:
            return False
        packed, distance = self._record.packed, entry.user - entry.iova
        before = ring_parts(queue.addr, queue.size, packed=packed)
        now = ring_parts(queue.ring, queue.size, packed=packed)
        return any(
            iova <= entry.last and entry.iova < iova + size and now[part][0] - iova != distance
            for part, (iova, size) in before.items()
        )

    # --- asking

    def _want(self, want: Want) -> None:
        self._wants[want.queue.index, want.part] = want
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_for_all())

    async def _ask_for_all(self) -> None:
        """Ask for one address after the other, until nobody waits for any."""
        with suppress(OSError, OperationError):  # the reactors are gone, and the session with them
            while await self._resume():
                want, iova = next(iter(self._missing()))
                want.asked += 1
                known = want.asked <= MAX_ENTRIES and await self._obtain(iova, want.access)
                if not known and self._wants.get((want.queue.index, want.part)) is want:
                    await self._deny(want, iova)

    def _missing(self) -> list[tuple[Want, int]]:
        """Return what is waited for, each with its first address that is not known."""
        found = []
        for want in self._wants.values():
            iova = self._record.iotlb.missing(want.iova, want.size, want.access)
            if iova is not None:
                found.append((want, iova))
        return found

    async def _resume(self) -> bool:
        """Have requests go on that need not wait any more; tell whether others still do."""
        for key, want in list(self._wants.items()):
            if want.part:
                needed = not want.queue.running and self._record.is_ready(want.queue)
            else:
                needed = want.queue.running
            iova = self._record.iotlb.missing(want.iova, want.size, want.access)
            if needed and iova is not None:
                continue
            if self._wants.get(key) is want:
                del self._wants[key]
            if needed and not want.part:
                await self._host.resume(want.queue)
        return bool(self._missing())

    async def _obtain(self, iova: int, access: int) -> bool:
        """Ask the front-end for an address; tell whether it has translated it."""
        if not self._requests.is_open:
            self._warn(f"IOVA {iova:#x} cannot be asked for: the front-end gave no channel")
            return False
        miss = IotlbMessage(iova, 0, 0, access, IotlbMessage.MISS)
        try:
            if self._record.protocol_features & ProtocolFeature.REPLY_ACK:
                limit = ANSWER_LIMIT
                if await self._requests.ask(BackendRequest.IOTLB_MSG, miss):
                    return self._knows(iova, access)
            else:
                limit = SILENCE_LIMIT
                self._requests.tell(BackendRequest.IOTLB_MSG, miss)
        except OSError as error:
            self._warn(f"IOVA {iova:#x} cannot be asked for: {error}")
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while not self._knows(iova, access):
                    self._news.clear()
                    await self._news.wait()
        return self._knows(iova, access)

    def _knows(self, iova: int, access: int) -> bool:
        return self._record.iotlb.missing(iova, 1, access) is None

    async def _deny(self, want: Want, iova: int) -> None:
        """Deal with an address that the front-end does not translate."""
        del self._wants[want.queue.index, want.part]
        if self._requests.is_open:
            fail = IotlbMessage(iova, 0, 0, want.access, IotlbMessage.ACCESS_FAIL)
            self._requests.tell(BackendRequest.IOTLB_MSG, fail)
        if want.part:
            text = f"its {want.part} ring at IOVA {iova:#x} is not translated"
            self._warn(f"queue {want.queue.index} cannot start: {text}")
        else:
            await self._host.fault(want.queue)
