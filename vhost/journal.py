"""What outlives the control process of a connection: its record, and what was done of a message.

A message stays in the socket until its answer is sent (Connection, "peeks"), and answering it,
taking it out, and storing what the session is now are one request to the keeper. So when the
control process dies, the next one finds each message either answered and taken note of, or not yet
dealt with; then it deals with it anew, and front-ends see no difference, because:

* What a message changes in the record is stored before a queue is served by it (``save`` with
  ``applied``): then the message is not carried out again, only finished.
* That a queue has stopped, and where, is stored before anything else is done with it. Until then it
  is one that runs, and its in-flight log says where it is.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from reactor.operations import FileDescriptors
from reactor.vault import KeeperLostError, NoVault, Vault
from vhost.connection import TIME_LIMIT, Connection, Message
from vhost.descriptors import log_of
from vhost.iotlb import Iotlb, Translation
from vhost.record import SessionRecord

KEY = "session/"  # with the session's id: where it is in the vault
FORMAT = 1  # of what is stored


class Journal(Protocol):
    """What a session asks of it."""

    async def save(self, *, applied: bool = False) -> None:
        """Store the record; ``applied``: with all that the message in hand changes in it."""

    async def finish(self, message: Message, reply: bytes, fds: Sequence[int] = ()) -> None:
        """Send the answer, if there is one, and be done with the message. Raises OSError."""

    def drop(self) -> None:
        """Store nothing any more: the session has ended."""


class NoJournal:
    """For a session that ends with this process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def save(self, *, applied: bool = False) -> None:
        """See Journal."""

    async def finish(self, message: Message, reply: bytes, fds: Sequence[int] = ()) -> None:
        """See Journal."""
        self._connection.consume(message)
        if reply:
            await self._connection.send_bytes(reply, fds)

    def drop(self) -> None:
        """See Journal."""


class VaultJournal:
    """A session's entry in the vault: the connection, and then the record's descriptors."""

    def __init__(self, vault: Vault, connection: Connection, record: SessionRecord) -> None:
        self._vault = vault
        self._connection = connection
        self._record = record
        self._applied = False
        self._key = f"{KEY}{record.id}"
        vault.put(self._key, self._source)

    async def save(self, *, applied: bool = False) -> None:
        """See Journal."""
        self._applied = applied
        await self._vault.put(self._key, self._source)

    async def finish(self, message: Message, reply: bytes, fds: Sequence[int] = ()) -> None:
        """See Journal; waits for a front-end that does not read, as long as for anything."""
        self._applied = False
        async with asyncio.timeout(TIME_LIMIT):
            while True:
                if self._connection.closed:
                    raise ConnectionResetError("the connection was closed")
                try:
                    error = await self._vault.finish(
                        self._key, self._source, message.size, reply, fds
                    )
                except KeeperLostError:
                    await self.save()
                    if not self._connection.looked_at:
                        return  # it had done it
                    continue
                if error == 0:
                    return
                if error != errno.EAGAIN:
                    raise OSError(error, os.strerror(error))
                await self._connection.writable()

    def drop(self) -> None:
        """See Journal."""
        self._vault.drop(self._key)

    def _source(self) -> tuple[bytes, list[int]]:
        data, fds = pack(self._record, applied=self._applied)
        return data, [self._connection.fileno(), *fds]


class Kept(msgspec.Struct):
    """What is stored of a session; each descriptor is the number that it had when it was stored."""

    record: SessionRecord
    applied: bool
    format: int = FORMAT


def make_journal(vault: NoVault, connection: Connection, record: SessionRecord) -> Journal:
    """Return the journal of a session, which begins with what its record is now."""
    if isinstance(vault, Vault):
        return VaultJournal(vault, connection, record)
    return NoJournal(connection)


def pack(record: SessionRecord, *, applied: bool) -> tuple[bytes, list[int]]:
    """Return a record as bytes, and the descriptors in it."""
    data = msgspec.msgpack.encode(Kept(record, applied), enc_hook=_encode)
    fds = [getattr(owner, name) for owner, name in _descriptors(record)]
    return data, [fd for fd in fds if fd >= 0]


def unpack(data: bytes, fds: FileDescriptors) -> tuple[SessionRecord, bool]:
    """Return a record, which takes the descriptors over, and whether its message was applied.

    Raises ValueError if this is not what ``pack`` returns.
    """
    kept = msgspec.msgpack.decode(data, type=Kept, dec_hook=_decode)
    record = kept.record
    places = [(owner, name) for owner, name in _descriptors(record) if getattr(owner, name) >= 0]
    if kept.format != FORMAT or len(places) != len(fds):
        raise ValueError(f"session {record.id} has format {kept.format}, {len(fds)} descriptors")
    for place, (owner, name) in enumerate(places):
        setattr(owner, name, fds.take(place))
    for queue in record.queues.values():
        area = record.inflight
        if area is None or queue.index >= area.queues:
            area = record.own_inflight
        queue.log = None if queue.log is None or area is None else log_of(area, queue.index)
    return record, kept.applied


def _descriptors(record: SessionRecord) -> Iterator[tuple[Any, str]]:
    """Yield the places of all descriptors that a record owns."""
    yield record, "backend_channel"
    yield record, "log_event"
    for owner in (record.dirty_log, record.inflight, record.own_inflight, *record.memory):
        if owner is not None:
            yield owner, "fd"
    for queue in record.queues.values():
        for name in ("kick", "call", "error"):
            yield queue, name


def _encode(value: Any) -> Any:
    if isinstance(value, Iotlb):
        return [entry.as_list() for entry in value.entries()]
    raise NotImplementedError(type(value))


def _decode(kind: type, value: Any) -> Any:
    if kind is not Iotlb:
        raise NotImplementedError(kind)
    iotlb = Iotlb()
    for entry in value:
        iotlb.add(Translation(*entry))
    return iotlb
