"""One vhost-user connection: messages with descriptors over a Unix stream socket, without blocking.

Exactly a header is read, then exactly its payload, so that nothing is read ahead and descriptors
belong to the message that was being read when they came. A peer can make us hold one message of at
most MAX_PAYLOAD bytes and MAX_FDS descriptors, for no longer than a time limit once it has begun.
"""

from __future__ import annotations

import array
import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from reactor.operations import FileDescriptors
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
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * struct.calcsize("i"))


@dataclass(slots=True)
class Message:
    """A message as it came; its descriptors are closed with it unless they are taken."""

    header: Header
    payload: bytes
    fds: FileDescriptors

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

    def __init__(self, sock: socket.socket, *, time_limit: float = TIME_LIMIT) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._time_limit = time_limit
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._socket.fileno() < 0

    def peer(self) -> tuple[int, int, int]:
        """Return process, user and group id of the other end as it connected."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("3i", raw)
        return pid, uid, gid

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; a task that waits for it gets ConnectionResetError."""
        if not self.closed:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
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
            head = await self._read_some(Header.WIRE.size, fds)
            if not head:
                return None
            async with asyncio.timeout(self._time_limit):
                head += await self._read(Header.WIRE.size - len(head), fds)
                header = Header.from_bytes(head)
                payload = await self._read(header.size, fds)
            message = Message(header, payload, fds)
        except BaseException:
            fds.close()
            raise
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
        body = b"" if payload is None else payload.to_bytes()
        data = memoryview(Header(request, VERSION | flags, len(body)).to_bytes() + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with asyncio.timeout(self._time_limit):
            while data:
                if self.closed:
                    raise ConnectionResetError("the connection was closed")
                try:
                    sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
                except (BlockingIOError, InterruptedError):
                    await self._ready(self._loop.add_writer, self._loop.remove_writer)
                    continue
                data, rights = data[sent:], []

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
        """Read at least one byte and at most ``size``; none at the end. Adds to ``fds``."""
        while True:
            if self.closed:
                raise ConnectionResetError("the connection was closed")
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    # What a truncated message leaves of a descriptor's bytes is no descriptor.
                    whole = len(raw) - len(raw) % struct.calcsize("i")
                    fds.extend(array.array("i", raw[:whole]))
            if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                allowed = f"at most {MAX_FDS}, and what the limit of open files allows"
                raise ProtocolError("message", "descriptors", f"{len(fds)} and more", allowed)
            return data

    async def _ready(
        self, watch: Callable[..., object], unwatch: Callable[[socket.socket], object]
    ) -> None:
        """Wait until the socket can be read or written again."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(ready)
        watch(self._socket, _wake, ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if not self.closed:
                unwatch(self._socket)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
