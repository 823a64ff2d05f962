"""A small blocking client of the JSON-RPC server, for the command line and scripts."""

import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from reactor.errors import OperationError
from reactor.jsonstream import JsonSplitter

MAX_REPLY = 256 << 20  # bytes
DEFAULT_TIMEOUT = 60.0


class RpcClient:
    """One connection, to be used by one thread at a time; ``timeout`` is in seconds a call.

    Raises OSError with the path if nobody listens there.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> None:
        self.path = os.fspath(path)
        self._timeout = timeout
        self._last_id = 0
        self._splitter = JsonSplitter(MAX_REPLY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            self._socket.close()
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(error.errno or errno.EINVAL, reason, self.path) from None

    def call(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call a method and return its result.

        Raises OperationError with the server's code and message, TimeoutError when no reply came
        in time, ConnectionError when the server has gone, and ValueError when what came is no
        reply; the connection is of no use after the last three.
        """
        self._last_id += 1
        request: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "id": self._last_id}
        if params:
            request["params"] = dict(params)
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            reply = self._exchange(json.dumps(request).encode(), deadline)
        except TimeoutError:
            text = f"no answer to {method} within {self._timeout:g} s"
            raise TimeoutError(errno.ETIMEDOUT, text, self.path) from None
        if "error" in reply:
            raise OperationError.from_wire(reply["error"])
        return reply.get("result")

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def _exchange(self, request: bytes, deadline: float | None) -> dict[str, Any]:
        self._allow_until(deadline)
        self._socket.sendall(request)
        while True:
            self._allow_until(deadline)
            data = self._socket.recv(1 << 16)
            if not data:
                reason = "connection closed without an answer"
                raise ConnectionResetError(errno.ECONNRESET, reason, self.path)
            for text in self._splitter.feed(data):
                reply = json.loads(text)
                if not isinstance(reply, dict):
                    raise ValueError(f"expected an object, got {reply!r:.100}")
                return reply  # the only one: one call is answered before the next is sent

    def _allow_until(self, deadline: float | None) -> None:
        """Let the socket's next operation last until ``deadline``."""
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
