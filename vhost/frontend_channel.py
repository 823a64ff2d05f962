"""The front-end's end of the channel for requests of the back-end ("Back-end communication")."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from vhost.frontend_link import FrontendError
from vhost.messages import NEED_REPLY, REPLY, U64, VERSION, BackendRequest, Header, ProtocolError

_TOO_LATE = "no request of the back-end came in time"


class BackendChannel:
    """A connected socket, which it owns. Takes CONFIG_CHANGE_MSG, and what ``handlers`` are for.

    Handlers get the payload; everything else is refused. When a thread ``takes`` what comes,
    nobody else may.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.taken = False
        self.handlers: dict[int, Callable[[bytes], None]] = {
            BackendRequest.CONFIG_CHANGE_MSG: lambda _: self._changed.set()
        }
        self._changed = threading.Event()
        self._socket = sock

    @classmethod
    def create(cls) -> tuple[Self, socket.socket]:
        """Return a channel, and the end that goes to the back-end with SET_BACKEND_REQ_FD."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def wait_config_change(self, timeout: float) -> None:
        """Return when the back-end has said that its configuration space has changed.

        Raises FrontendError when it does not within ``timeout`` seconds, or closes the channel.
        """
        deadline = time.monotonic() + timeout
        if self.taken and not self._changed.wait(timeout):
            raise FrontendError(_TOO_LATE)
        while not self._changed.is_set():
            self.take(deadline)
        self._changed.clear()

    def fileno(self) -> int:
        """Return the socket's descriptor, readable when there is a request."""
        return self._socket.fileno()

    def take(self, deadline: float) -> None:
        """Read a request, carry it out, and answer it if that is asked for; FrontendError."""
        try:
            header = Header.from_bytes(self._read(Header.WIRE.size, deadline))
            payload = self._read(header.size, deadline)
            handler = self.handlers.get(header.request)
            if handler is not None:
                handler(payload)
            if header.flags & NEED_REPLY:
                body = U64(1 if handler is None else 0).to_bytes()
                answer = Header(header.request, VERSION | REPLY, len(body))
                self._socket.sendall(answer.to_bytes() + body)
        except TimeoutError:
            raise FrontendError(_TOO_LATE) from None
        except (OSError, ProtocolError) as error:
            raise FrontendError(f"the back-end's channel for requests failed: {error}") from None

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionResetError("the back-end has closed it")
            data += part
        return bytes(data)
