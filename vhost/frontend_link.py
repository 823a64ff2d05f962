"""The front-end's end of a vhost-user connection: requests, their replies, and descriptors.

Synchronous, since a front-end sets its device up once, one message after the other.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vhost.messages import (
    MAX_FDS,
    MESSAGES,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    Header,
    Payload,
    ProtocolError,
    Request,
    decode,
    request_name,
)


class FrontendError(Exception):
    """The back-end cannot be reached, refuses, breaks the protocol or answers no more."""


@dataclass(slots=True)
class Reply:
    """A message from the back-end; its descriptors are the receiver's to close."""

    header: Header
    data: bytes
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


Where = str | os.PathLike[str] | socket.socket
"""The path of the back-end's socket, or a socket that listens, to which the back-end connects."""


def path_of(where: Where) -> str:
    """Return the path of a socket."""
    return where.getsockname() if isinstance(where, socket.socket) else os.fspath(where)


class Link:
    """A connected socket, which it owns.

    ``send`` and ``receive`` pass on whatever they are given, so that tests can break every rule;
    ``tell`` and ``ask`` keep to the specification, and may be used by several threads. All raise
    FrontendError.
    """

    def __init__(self, where: Where, *, timeout: float = 10.0) -> None:
        self.path = path_of(where)
        self.acknowledges = False
        """Whether REPLY_ACK was negotiated: then every message of ``tell`` is confirmed."""
        self._turn = threading.Lock()
        if isinstance(where, socket.socket):
            self._socket = _accept(where, timeout)
        else:
            self._socket = _connect(self.path, timeout)
        self._socket.settimeout(timeout)

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def shut_down(self) -> None:
        """End the connection, so that another thread that waits for an answer gets none."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def set_timeout(self, timeout: float | None) -> None:
        """Wait so many seconds for each answer from now on; None: for ever."""
        self._socket.settimeout(timeout)

    def alive(self) -> bool:
        """Tell whether the back-end still holds its end."""
        if self._socket.fileno() < 0:
            return False
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return not poller.poll(0)

    def send(
        self,
        request: int,
        payload: Payload | bytes | None = None,
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
    ) -> None:
        """Send a message; ``size`` overrides what its header says of the payload."""
        body = payload.to_bytes() if isinstance(payload, Payload) else payload or b""
        header = Header(request, VERSION | flags, len(body) if size is None else size)
        self.send_bytes(header.to_bytes() + body, fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes that may be no message at all."""
        try:
            sent = socket.send_fds(self._socket, [data], fds) if data else 0
            if sent < len(
                data
            ):  # to send nothing fails too, once the back-end has answered and gone
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise FrontendError(f"{self.path}: the back-end takes no messages: {error}") from None

    def receive(self) -> Reply:
        """Return the next message."""
        fds: list[int] = []
        try:
            header = Header.from_bytes(self._read(Header.WIRE.size, fds))
            return Reply(header, self._read(header.size, fds), fds)
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, ProtocolError):
                raise FrontendError(f"{self.path}: not a vhost-user back-end? {error}") from None
            raise

    def tell(
        self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> None:
        """Send a message without a reply of its own; wait until it is confirmed, if it can be."""
        with self._turn:
            self.send(request, payload, fds, flags=NEED_REPLY if self.acknowledges else 0)
            if not self.acknowledges:
                return
            reply = self._reply(request)
        reply.close()
        status = decode(U64, reply.data, request.name).value
        if status:
            raise FrontendError(f"{self.path}: the back-end refuses {request.name} ({status})")

    def ask(self, request: Request, payload: Payload | None = None) -> Payload:
        """Send a message and return its reply, which brings no descriptors."""
        answer, fds = self.ask_with_fds(request, payload)
        for fd in fds:
            os.close(fd)
        return answer

    def ask_with_fds(
        self, request: Request, payload: Payload | None = None
    ) -> tuple[Payload, list[int]]:
        """Send a message and return its reply with its descriptors, which are the caller's."""
        kind = MESSAGES[request].reply
        if kind is None:
            raise ValueError(f"{request.name} has no reply")
        with self._turn:
            self.send(request, payload)
            reply = self._reply(request)
        try:
            return kind.from_bytes(reply.data, request.name), reply.fds
        except ProtocolError as error:
            reply.close()
            raise FrontendError(f"{self.path}: malformed reply: {error}") from None

    def number(self, request: Request) -> int:
        """Ask for a single integer."""
        answer = self.ask(request)
        assert isinstance(answer, U64)
        return answer.value

    def _reply(self, request: Request) -> Reply:
        reply = self.receive()
        if reply.header.request == request and reply.header.flags & REPLY:
            return reply
        reply.close()
        got = request_name(reply.header.request)
        raise FrontendError(f"{self.path}: reply to {request.name} expected, got {got}")

    def _read(self, size: int, fds: list[int]) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part, rights, _flags, _address = self._socket.recvmsg(
                    size - len(data), socket.CMSG_SPACE(MAX_FDS * struct.calcsize("i"))
                )
            except TimeoutError:
                raise FrontendError(
                    f"{self.path}: no answer within {self._socket.gettimeout():g} s: not a "
                    "vhost-user back-end, or one that is busy with another front-end"
                ) from None
            except OSError as error:
                raise FrontendError(f"{self.path}: {error}") from None
            for _level, _kind, raw in rights:
                with suppress(struct.error):
                    fds.extend(struct.unpack(f"{len(raw) // 4}i", raw[: len(raw) // 4 * 4]))
            if not part:
                raise FrontendError(
                    f"{self.path}: the back-end closed the connection; its log may say why"
                )
            data += part
        return bytes(data)


def _connect(path: str, timeout: float) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(timeout)
    try:
        connected.connect(path)
    except OSError as error:
        connected.close()
        raise FrontendError(_why_not_connected(path, error)) from None
    return connected


def _accept(listener: socket.socket, timeout: float) -> socket.socket:
    listener.settimeout(timeout)
    try:
        return listener.accept()[0]
    except OSError as error:
        path = path_of(listener)
        raise FrontendError(f"{path}: no back-end has connected: {error}") from None


def _why_not_connected(path: str, error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return f"{path}: no such socket: is the target running, and is this its path?"
        case ConnectionRefusedError():
            return f"{path}: nothing listens there: a socket left by a target that has ended?"
        case PermissionError():
            return f"{path}: permission denied: may this user write to the socket?"
        case _:
            return f"{path}: cannot connect: {error.strerror or error}"
