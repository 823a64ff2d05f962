"""Requests of the back-end to its front-end, over the socket that came with SET_BACKEND_REQ_FD."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from vhost.connection import Connection
from vhost.messages import (
    NEED_REPLY,
    U64,
    VERSION,
    BackendRequest,
    Header,
    Payload,
    ProtocolError,
    decode,
)
from vhost.record import SessionRecord


class RequestChannel:
    """The way to one front-end; the socket is the record's."""

    def __init__(self, record: SessionRecord, warn: Callable[[str], None]) -> None:
        self._record = record
        self._warn = warn
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the front-end has given us a socket that still works."""
        return self._record.backend_channel >= 0

    def use(self, fd: int) -> None:
        """Send over another socket from now on; who waits for a reply gets ConnectionResetError."""
        self.close()
        self._record.drop_backend_channel()
        self._record.backend_channel = fd

    def close(self) -> None:
        """Wait for no replies; the socket stays open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def tell(self, request: BackendRequest, payload: Payload | None = None) -> None:
        """Send a request for which no reply is asked; never waits.

        A front-end that reads so little that the socket is full still has such requests to read,
        and needs no more of them: this one is dropped.
        """
        body = b"" if payload is None else payload.to_bytes()
        message = Header(request, VERSION, len(body)).to_bytes() + body
        try:
            with self._duplicate() as sock, suppress(BlockingIOError):
                sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            self._fail(error)

    async def ask(self, request: BackendRequest, payload: Payload) -> int:
        """Send a request, wait until the front-end has carried it out, and return its result.

        The result is 0 for success. There is one such request on its way at a time. Raises OSError
        when there is no answer, after which the channel is closed unless there is a new one.
        """
        async with self._turn:
            if self._connection is None:
                self._connection = Connection(self._duplicate())
            connection = self._connection
            try:
                await connection.send(request, payload, flags=NEED_REPLY)
                return await _receive_result(connection, request)
            except (OSError, ProtocolError) as error:
                if connection is self._connection:
                    self._fail(error)
                raise OSError(errno.EPIPE, f"{request.name}: {error}") from None

    def _fail(self, error: Exception) -> None:
        """Send nothing any more, since ``error`` has happened."""
        self._warn(f"requests to the front-end end here: {error}")
        self.close()
        self._record.drop_backend_channel()

    def _duplicate(self) -> socket.socket:
        """Return a socket of our own, since a connection closes what it has."""
        return socket.socket(fileno=os.dup(self._record.backend_channel))


async def _receive_result(connection: Connection, request: BackendRequest) -> int:
    """Return what the front-end answers to a request; OSError or ProtocolError if it does not."""
    message = await connection.receive()
    if message is None:
        raise ConnectionResetError(errno.ECONNRESET, "the front-end has closed the channel")
    with message:
        if message.header.request != request or not message.is_reply:
            number = message.header.request
            raise ProtocolError("reply", "request", number, f"{request}: {request.name}")
        return decode(U64, message.payload, request.name).value
