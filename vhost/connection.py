"""One vhost-user connection: messages with descriptors over a Unix stream socket, without blocking.

Exactly a header is read, then exactly its payload, so that nothing is read ahead and descriptors
belong to the message that was being read when they came. A peer can make us hold one message of at
most MAX_PAYLOAD bytes and MAX_FDS descriptors, for no longer than a time limit once it has begun.

A connection that *peeks* leaves a message in the socket until it is consumed, so that another
process can go on if this one dies: SO_PEEK_OFF (socket(7)) makes MSG_PEEK go forward as reading
does. Descriptors come with every look at the packet that they were sent with, which has to be one
message's, in whole or in part: looking cannot tell whose they are in a packet of several messages.
"""

from __future__ import annotations

import array
import asyncio
import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from reactor.operations import FileDescriptors
from reactor.rights import consume, receive_with_fds
from vhost.messages import (
    MAX_FDS,
    NEED_REPLY,
    REPLY,
    VERSION,
    Header,
    Payload,
    ProtocolError,
    request_name,
)

TIME_LIMIT = 10.0  # seconds for the rest of a message once it has begun, and for sending one
_SO_PEEK_OFF = 42  # asm-generic/socket.h; Python has no name for it


@dataclass(slots=True)
class Message:
    """A message as it came; its descriptors are closed with it unless they are taken."""

    header: Header
    payload: bytes
    fds: FileDescriptors

    @property
    def size(self) -> int:
        """Bytes, with the header."""
        return Header.WIRE.size + len(self.payload)

    @property
    def name(self) -> str:
        """What the specification calls it."""
        return request_name(self.header.request)

    @property
    def wants_reply(self) -> bool:
        """Whether the need_reply flag is set."""
        return bool(self.header.flags & NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        """Whether the reply flag is set."""
        return bool(self.header.flags & REPLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.fds.close()


@dataclass(slots=True)
class Reply:
    """What a message is answered with; the descriptors are closed once they are sent."""

    payload: Payload
    fds: list[int]


class Connection:
    """A connected socket, which it owns. One task may receive while another sends."""

    def __init__(
        self, sock: socket.socket, *, peeks: bool = False, time_limit: float = TIME_LIMIT
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._peeks = peeks
        self._seen = 0  # bytes of a message, by one that peeks
        self._edge: select.epoll | None = None
        self._loop = asyncio.get_running_loop()
        self._time_limit = time_limit
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._socket.fileno() < 0

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once it is closed."""
        return self._socket.fileno()

    @property
    def looked_at(self) -> int:
        """How many bytes have been looked at and are not consumed; of a connection that peeks."""
        return self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF)

    def consume(self, message: Message) -> None:
        """Take out of the socket what was looked at: this message, and its descriptors."""
        if self._peeks:
            consume(self._socket, message.size)

    def peer(self) -> tuple[int, int, int]:
        """Return process, user and group id of the other end as it connected."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("3i", raw)
        return pid, uid, gid

    def close(self) -> None:
        """Close the socket; a task that waits for it gets ConnectionResetError."""
        if not self.closed:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            if self._peeks:  # others may have duplicates: the peer hears of it now
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            for ready in self._waiting:
                _wake(ready)

    async def receive(self) -> Message | None:
        """Return the next message, or None when the peer has closed between two messages.

        Raises ProtocolError for a header that cannot be one and for descriptors past MAX_FDS;
        ConnectionResetError when the peer closes within a message; TimeoutError when the rest of
        a message does not come within the time limit.
        """
        fds = FileDescriptors()
        try:
            self._look_from(0)
            head = await self._read_some(Header.WIRE.size, fds)
            if not head:
                return None
            async with asyncio.timeout(self._time_limit):
                head += await self._read(Header.WIRE.size - len(head), fds)
                header = Header.from_bytes(head)
                if self._peeks:  # again, all at once: descriptors come with each look
                    fds.close()
                    self._look_from(0)
                    whole = await self._read(Header.WIRE.size + header.size, fds)
                    payload = whole[Header.WIRE.size :]
                else:
                    payload = await self._read(header.size, fds)
            message = Message(header, payload, fds)
        except BaseException:
            fds.close()
            raise
        finally:
            if self._edge is not None:
                self._edge.close()
                self._edge = None
        return message

    async def send(
        self,
        request: int,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
    ) -> None:
        """Send a message; ``flags`` are added to the version. The descriptors stay the caller's.

        Raises OSError when the peer is gone, TimeoutError when it does not read. After a failure
        the connection is of no more use, since part of the message may be on its way.
        """
        await self.send_bytes(encode(request, payload, flags), fds)

    async def send_bytes(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message that is encoded already; see ``send``."""
        data = memoryview(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with asyncio.timeout(self._time_limit):
            while data:
                if self.closed:
                    raise ConnectionResetError("the connection was closed")
                try:
                    sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
                except (BlockingIOError, InterruptedError):
                    await self.writable()
                    continue
                data, rights = data[sent:], []

    async def writable(self) -> None:
        """Wait until something can be sent, or the connection was closed."""
        await self._ready(self._socket, self._loop.add_writer, self._loop.remove_writer)

    async def _read(self, size: int, fds: FileDescriptors) -> bytes:
        """Read exactly ``size`` bytes."""
        data = bytearray()
        while len(data) < size:
            part = await self._read_some(size - len(data), fds)
            if not part:
                raise ConnectionResetError("the peer closed within a message")
            data += part
        return bytes(data)

    async def _read_some(self, size: int, fds: FileDescriptors) -> bytes:
        """Read at least one byte and at most ``size``; none at the end. Adds to ``fds``.

        Looking does not end at ``size``: unless it meets descriptors, the kernel goes on to the
        next packet, for no byte, and hands out those that it finds there. So one byte more is asked
        for. If it comes, the descriptors are those of something later; else they are ours.
        """
        while True:
            if self.closed:
                raise ConnectionResetError("the connection was closed")
            try:
                if self._peeks:
                    how = (size + 1, socket.MSG_PEEK, MAX_FDS)
                    data, more, flags = receive_with_fds(self._socket, *how)
                else:
                    data, more, flags = receive_with_fds(self._socket, size, room=MAX_FDS)
            except (BlockingIOError, InterruptedError):
                await self._readable()
                continue
            self._seen += min(len(data), size)
            if len(data) > size:
                more.close()
                data, flags = data[:size], 0
                self._look_from(self._seen)
            fds.extend(more)
            if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                allowed = f"at most {MAX_FDS}, and what the limit of open files allows"
                raise ProtocolError("message", "descriptors", f"{len(fds)} and more", allowed)
            return data

    def _look_from(self, place: int) -> None:
        """Look on from byte ``place`` of the message."""
        self._seen = place
        if self._peeks and not self.closed:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, place)

    async def _readable(self) -> None:
        """Wait until there may be more than what was read."""
        if not self._peeks or not self.looked_at:
            await self._ready(self._socket, self._loop.add_reader, self._loop.remove_reader)
        elif self._edge is None:
            # What was looked at keeps the socket readable: only an edge tells that more has come.
            self._edge = select.epoll()
            self._edge.register(self._socket, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            self._edge.poll(0)  # what is there already; the caller looks once more before it waits
        else:
            await self._ready(self._edge, self._loop.add_reader, self._loop.remove_reader)
            self._edge.poll(0)

    async def _ready(
        self, what: Any, watch: Callable[..., object], unwatch: Callable[[Any], object]
    ) -> None:
        """Wait until a descriptor can be read or written again, or the connection is closed."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(ready)
        watch(what, _wake, ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if what.fileno() >= 0:
                unwatch(what)


def encode(request: int, payload: Payload | None, flags: int = 0) -> bytes:
    """Return a message as it is sent; ``flags`` are added to the version."""
    body = b"" if payload is None else payload.to_bytes()
    return Header(request, VERSION | flags, len(body)).to_bytes() + body


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
