"""The front-end's end of the channel for requests of the back-end ("Back-end communication")."""

from __future__ import annotations

import socket
import time
from typing import Self

from vhost.frontend_link import FrontendError
from vhost.messages import NEED_REPLY, REPLY, U64, VERSION, BackendRequest, Header, ProtocolError


class BackendChannel:
    """A connected socket, which it owns. Takes CONFIG_CHANGE_MSG and refuses everything else."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def create(cls) -> tuple[Self, socket.socket]:
        """Return a channel, and the end that goes to the back-end with SET_BACKEND_REQ_FD."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def fileno(self) -> int:
        """Return the socket's descriptor, readable when there is a request."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def wait_config_change(self, timeout: float) -> None:
        """Return when the back-end has said that its configuration space has changed.

        Raises FrontendError when it does not within ``timeout`` seconds, or closes the channel.
        """
        deadline = time.monotonic() + timeout
        while self._take(deadline) != BackendRequest.CONFIG_CHANGE_MSG:
            pass

    def _take(self, deadline: float) -> int:
        """Read a request, answer it if that is asked for, and return its number."""
        try:
            header = Header.from_bytes(self._read(Header.WIRE.size, deadline))
            self._read(header.size, deadline)
            if header.flags & NEED_REPLY:
                known = header.request == BackendRequest.CONFIG_CHANGE_MSG
                body = U64(0 if known else 1).to_bytes()
                answer = Header(header.request, VERSION | REPLY, len(body))
                self._socket.sendall(answer.to_bytes() + body)
        except TimeoutError:
            raise FrontendError("no request of the back-end came in time") from None
        except (OSError, ProtocolError) as error:
            raise FrontendError(f"the back-end's channel for requests failed: {error}") from None
        return header.request

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionResetError("the back-end has closed it")
            data += part
        return bytes(data)
