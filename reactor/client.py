"""Events from outside: a client for scripts and tools, blocking or asynchronous.

    with Client("/run/vhost-reactor") as client:
        print(client.call("control", "bdev_get_bdevs", name="Malloc0"))

Both raise OperationError with the code and message that the operation failed with, CallTimeoutError
(also a TimeoutError) when nobody answers, and FileNotFoundError when no process of that name is
running.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import time
from types import TracebackType
from typing import Any, Self

import zmq

from reactor.envelope import CallTimeoutError, decode, encode_request
from reactor.errors import OperationError
from reactor.peers import Counters, Peers, find_endpoint
from reactor.sockets import Socket, make_context, make_socket

DEFAULT_TIMEOUT = 10.0
LINGER = 1000  # ms that close() waits for events to leave, which they do if their receiver lives


class Client:
    """A blocking client of the processes in ``run_dir``; to be used by one thread at a time.

    ``timeout`` is in seconds, for each call and for each wait for room in a full queue.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        self.timeout = timeout
        self._run_dir = run_dir
        self._context = make_context()
        self._sockets: dict[str, Socket] = {}
        self._waits: dict[str, int] = {}  # milliseconds, by socket, as they are set
        self._next_id = itertools.count(1).__next__

    def call(self, target: str, op: str, /, **args: Any) -> Any:
        """Run operation ``op`` in process ``target``, return its result."""
        return self.request(target, op, args)

    def request(
        self,
        target: str,
        op: str,
        args: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Do as :meth:`call`, with arguments in a map and a time-out of its own."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        event_id = self._next_id()
        self._send(target, encode_request(event_id, op, args))
        socket = self._sockets[target]
        left = limit
        while True:
            self._wait_at_most(target, socket, left)
            try:
                reply = decode(socket.recv())
            except zmq.Again:
                raise CallTimeoutError(target, op, limit) from None
            if reply.get("id") == event_id:  # any other answers a call that timed out
                break
            left = max(0.0, deadline - time.monotonic())
        if "error" in reply:
            raise OperationError.from_wire(reply["error"])
        return reply.get("result")

    def _wait_at_most(self, target: str, socket: Socket, seconds: float) -> None:
        """Set a socket's time-out, which takes as long as a tenth of a round trip, if need be."""
        milliseconds = int(seconds * 1000)
        if self._waits.get(target) != milliseconds:
            socket.rcvtimeo = self._waits[target] = milliseconds

    def send(self, target: str, op: str, /, **args: Any) -> None:
        """Have ``target`` run an operation, without an answer; waits for room in a full queue."""
        self._send(target, encode_request(None, op, args))

    def _send(self, target: str, payload: bytes) -> None:
        socket = self._sockets.get(target)
        if socket is None:
            endpoint = find_endpoint(self._run_dir, target)
            socket = self._sockets[target] = make_socket(self._context, zmq.DEALER)
            socket.linger = LINGER
            socket.sndtimeo = int(self.timeout * 1000)
            socket.connect(endpoint)
        try:
            socket.send(payload)
        except zmq.Again:
            raise TimeoutError(
                errno.ETIMEDOUT, f"queue of events stayed full for {self.timeout:g} s", target
            ) from None

    def close(self) -> None:
        """Disconnect."""
        for socket in self._sockets.values():
            socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio; to be made in a running event loop. Calls run concurrently.

    :meth:`close` drops events that have not left; a call that was answered shows that those sent
    before it have.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        self.timeout = timeout
        self.counters = Counters()
        self._context = make_context()
        self._peers = Peers(self._context, run_dir, self.counters)
        self._peers.start(asyncio.get_running_loop())

    async def call(self, target: str, op: str, /, **args: Any) -> Any:
        """Run operation ``op`` in process ``target``, return its result."""
        return await self.request(target, op, args)

    async def request(
        self,
        target: str,
        op: str,
        args: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Do as :meth:`call`, with arguments in a map and a time-out of its own."""
        limit = self.timeout if timeout is None else timeout
        return await self._peers.get(target).call(op, args, limit)

    def send(self, target: str, op: str, /, **args: Any) -> None:
        """Have ``target`` run an operation, without an answer; see Node.send()."""
        self._peers.get(target).send(op, args)

    def close(self) -> None:
        """Disconnect; calls that wait raise PeerLostError."""
        self._peers.close()
        self._context.term()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
