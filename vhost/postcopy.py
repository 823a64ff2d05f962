"""The messages of a post-copy migration, at its destination (vhost-user, "Migration").

A guest begins to run here before its memory has come. What the device accesses and is not there
yet has to be fetched, and whoever accesses it waits. So that nobody else waits too, the queues of
such a session are served by a process of their own until the migration ends (Cluster.lend). Its
userfaultfd, which tells of those accesses, goes to the front-end, as do the addresses at which it
has mapped memory; other reactors, and this process, leave the memory alone: an access of theirs
would make a page of zeroes where one is still to come.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache

from reactor.native import lib
from vhost.connection import Connection, Message, Reply
from vhost.interfaces import QueueHost
from vhost.messages import (
    U64,
    MemoryTable,
    NoPayload,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Request,
    SingleRegion,
    decode,
)
from vhost.record import Migration, SessionRecord
from vhost.rings import Rings

LOOK = 0.2  # seconds between looks whether the front-end is still there

# What a front-end confirms by the same message with a number in place of regions.
_CONFIRMED = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG)


@cache
def features() -> ProtocolFeature:
    """Return PAGEFAULT if this machine lets us wait for pages, wherever they are accessed."""
    fd: int = lib.postcopy_open()
    if fd < 0:
        return ProtocolFeature(0)
    os.close(fd)
    return ProtocolFeature.PAGEFAULT


class PostCopy:
    """A session's part in a post-copy migration, with a method for each message about it."""

    def __init__(
        self,
        record: SessionRecord,
        host: QueueHost,
        rings: Rings,
        connection: Connection,
        warn: Callable[[str], None],
    ) -> None:
        self._record = record
        self._host = host
        self._rings = rings
        self._connection = connection
        self._warn = warn
        self._watch: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Look after the front-end no more."""
        if self._watch is not None:
            self._watch.cancel()

    def lost(self) -> None:
        """Take note that the process of this session has died.

        Another one would see zeroes where pages are still to come, and nobody could fill them.
        """
        self._warn("its reactor has died during post-copy: the connection cannot go on")
        self._connection.close()

    # --- memory

    def addresses(self, request: int, payload: Payload | None) -> Payload | None:
        """Return what a message about memory is answered with: where we have mapped it."""
        if self._record.migration is not Migration.LISTENING:
            return None
        places = self._host.addresses()
        match payload:
            case MemoryTable() if request == Request.SET_MEM_TABLE:
                found = [replace(each, user=places[each.guest]) for each in payload.regions]
                return MemoryTable(tuple(found))
            case SingleRegion() if request == Request.ADD_MEM_REG:
                region = payload.region
                return SingleRegion(replace(region, user=places[region.guest]))
        return None

    async def confirm(self, message: Message) -> bool:
        """Take a message if it is the front-end's "ready" for faults in memory that it was told of.

        The memory may be accessed from then on. Raises ProtocolError if it is not ready.
        """
        if not self._record.unconfirmed or message.header.request not in _CONFIRMED:
            return False
        if len(message.payload) != U64.WIRE.size:
            return False
        if decode(U64, message.payload, message.name).value:
            raise ProtocolError(message.name, "result", message.payload.hex(), "0")
        self._record.unconfirmed = False
        for queue in self._record.queues.values():
            await self._rings.start_if_ready(queue)
        return True

    # --- messages

    async def _postcopy_advise(self) -> Reply:
        self._check("POSTCOPY_ADVISE", Migration.NONE)
        fd = await self._host.begin_postcopy()
        self._record.migration = Migration.ADVISED
        self._watch = asyncio.create_task(self._look_after())
        return Reply(NoPayload(), [fd])

    async def _postcopy_listen(self) -> None:
        self._check("POSTCOPY_LISTEN", Migration.ADVISED)
        self._record.migration = Migration.LISTENING
        # Memory from before has to be sent again: the front-end has not been told where it is.
        self._record.unconfirmed = True

    async def _postcopy_end(self) -> U64:
        if self._record.migration is Migration.NONE:
            raise ProtocolError("POSTCOPY_END", "state", "none", "only after POSTCOPY_ADVISE")
        self._record.migration, self._record.unconfirmed = Migration.NONE, False
        self.close()
        await self._host.end_postcopy()
        return U64(0)

    def _check(self, message: str, expected: Migration) -> None:
        state = self._record.migration
        if state is not expected:
            raise ProtocolError(message, "state", state.name.lower(), f"{expected.name.lower()}")
        if any(queue.running for queue in self._record.queues.values()):
            raise ProtocolError(message, "state", "a queue runs", "before any queue runs")

    async def _look_after(self) -> None:
        """End the process when the front-end is gone: what waits in it would wait for ever.

        Nobody reads the connection while a message is carried out, and that may be what waits.
        """
        look = select.poll()
        look.register(self._connection.fileno(), select.POLLRDHUP)
        with suppress(OSError):
            while not look.poll(0):  # noqa: ASYNC110 - also true while messages wait
                await asyncio.sleep(LOOK)
            await self._host.abandon_postcopy()
