"""Events between processes: msgpack maps over ZeroMQ, answered by the operations of a process.

A :class:`Node` is what one process is to the others: a ROUTER bound at ``ipc://RUN_DIR/<name>``
that answers them, and a DEALER for each that it calls itself. Sockets are drained by callbacks of
the event loop; a synchronous operation runs inside that callback, so an event costs no task. See
docs/events.md for the wire, reactor/sockets.py for how sockets and loop fit together.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import zmq

from reactor.envelope import EventId, MalformedError, decode_request, encode, socket_path
from reactor.errors import INTERNAL_ERROR, INVALID_PARAMS, OperationError, to_operation_error
from reactor.operations import FileDescriptors, Operation, Operations, operation
from reactor.peers import Counters, FdSender, Peers
from reactor.sockets import (
    NOBLOCK,
    SNDMORE,
    Drain,
    Socket,
    bind_private,
    make_context,
    make_socket,
    receive_only_frame,
)
from reactor.threads import ThreadPool

MAX_IN_FLIGHT = 128  # asynchronous operations running for one sender

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class FdSource(Protocol):
    """Where file descriptors come from that belong to an event: see reactor/fdpass.py."""

    async def take(self, tag: int, count: int) -> FileDescriptors:
        """Return the descriptors sent for event ``tag``, waiting for them a bounded time."""


class EventOperations:
    """Operations that every process has: to see whether it lives, and to measure events."""

    def __init__(self) -> None:
        self._count = 0

    @operation(internal=True)
    def event_ping(self, payload: Any = None) -> Any:
        """Return the payload."""
        return payload

    @operation(internal=True)
    def event_count(self) -> int:
        """Count this event, and return how many were counted before it."""
        count = self._count
        self._count += 1
        return count


class Node:
    """One process's end of all events.

    Creating it makes the ZeroMQ context, whose threads inherit the CPU affinity of this moment, and
    binds the ROUTER: do so before the process is pinned. Nothing is answered before :meth:`start`.

    Raises OSError if the socket cannot be bound, EADDRINUSE if a living process has the name.
    """

    def __init__(self, run_dir: str | os.PathLike[str], name: str, operations: Operations) -> None:
        self.name = name
        self.operations = operations
        self.counters = Counters()
        self.fd_source: FdSource | None = None
        operations.add(EventOperations())
        self._context = make_context()
        try:
            self._path = socket_path(run_dir, name)
            self._router = self._bind()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._peers = Peers(self._context, run_dir, self.counters)
        self._threads = ThreadPool(self._context, self._peers)
        self._drain: Drain | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: dict[bytes, int] = {}

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Answer events from now on, on ``loop`` or the running one."""
        self._loop = loop or asyncio.get_running_loop()
        self._peers.start(self._loop)
        self._drain = Drain(self._router, self._loop, self._receive)

    async def call(
        self,
        target: str,
        op: str,
        args: dict[str, Any] | None = None,
        *,
        timeout: float | None = 10.0,
        fds: Sequence[int] = (),
        channel: FdSender | None = None,
    ) -> Any:
        """Run operation ``op`` in process ``target`` and return its result.

        ``timeout`` is in seconds, None to wait for ever. Duplicates of ``fds`` go through
        ``channel``.

        Raises OperationError with the code that ``target`` answered; CallTimeoutError (-110, also a
        TimeoutError); PeerLostError (-104) when it died; OSError(ENOENT) when no such process ever
        ran, and OSError(EAGAIN) when its queue is full.
        """
        return await self._peers.get(target).call(op, args, timeout, fds, channel)

    def send(self, target: str, op: str, args: dict[str, Any] | None = None) -> None:
        """Have ``target`` run an operation, without an answer of any kind.

        Raises OSError(EAGAIN) when its queue is full, OSError(ENOENT) when no such process ever
        ran.
        """
        self._peers.get(target).send(op, args)

    def forget(self, target: str) -> None:
        """``target`` died: calls that wait for it raise PeerLostError, unsent events are lost."""
        self._peers.forget(target)

    async def run_in_thread(self, function: Callable[[], Result]) -> Result:
        """Run blocking work in a worker thread, return its result or raise what it raises."""
        return await self._threads.run(function)

    def close(self, linger: float = 0.0) -> None:
        """Stop; answers that are on their way get ``linger`` seconds to leave."""
        if self._drain is not None:
            self._drain.close()
        for task in self._tasks:
            task.cancel()
        all_ended = self._threads.stop()
        self._peers.close()
        # ZeroMQ leaves the socket file behind; it is surely ours while the socket is bound.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._router.close(linger=int(linger * 1000))
        if all_ended:  # else it would wait for the sockets of those that have not
            self._context.term()

    async def retire(self, limit: float) -> None:
        """Answer nobody and forget everybody, until ``rebind``.

        Whoever asks from now on finds nobody. What runs has ``limit`` seconds to end.
        """
        if self._drain is not None:
            self._drain.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._router.close(linger=0)
        self._peers.close()
        if self._tasks:
            _, running = await asyncio.wait(self._tasks, timeout=limit)
            for task in running:
                task.cancel()

    def rebind(self) -> None:
        """Be there again, with a new socket of the same name: nothing that was sent before comes.

        Raises OSError as the constructor does.
        """
        self._router = self._bind()
        self.start(self._loop)

    def _bind(self) -> Socket:
        router = make_socket(self._context, zmq.ROUTER)
        # An answer to somebody who is gone is an error that we can count, instead of silence; and a
        # client that comes back under the identity it had takes over from its former self.
        router.router_mandatory = True
        router.router_handover = True
        bind_private(router, self._path)
        return router

    def _receive(self) -> None:
        identity = self._router.recv(NOBLOCK)
        payload = receive_only_frame(self._router)
        self.counters.received += 1
        event_id = None
        try:
            event_id, op, args, fds = decode_request(payload)
            entry = self.operations.find(op)
            if entry.is_async or fds or not self.operations.is_kept(op):
                self._start(identity, event_id, entry, args, fds)
                return
            answer = {"id": event_id, "result": entry.method(**entry.bind(args, None))}
        except MalformedError as error:
            self.counters.malformed += 1
            event_id = error.event_id
            answer = {"id": event_id, "error": error.to_wire()}
        except Exception as error:
            answer = self._failure(event_id, error)
        if event_id is not None:
            self._answer(identity, answer)

    def _start(
        self,
        identity: bytes,
        event_id: EventId | None,
        entry: Operation,
        args: dict[str, Any],
        fds: int,
    ) -> None:
        """Make a task of an event that has to wait for something."""
        running = self._in_flight.get(identity, 0)
        if running >= MAX_IN_FLIGHT:
            self.counters.busy += 1
            raise OperationError(
                -errno.EAGAIN, f"busy: {running} operations of this sender are still running"
            )
        if fds and self.fd_source is None:
            raise OperationError(INVALID_PARAMS, f"{self.name} takes no file descriptors")
        assert self._loop is not None
        self._in_flight[identity] = running + 1
        task = self._loop.create_task(self._run(identity, event_id, entry, args, fds))
        self._tasks.add(task)

        def finished(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._in_flight[identity] -= 1
            if not self._in_flight[identity]:
                del self._in_flight[identity]

        task.add_done_callback(finished)

    async def _run(
        self,
        identity: bytes,
        event_id: EventId | None,
        entry: Operation,
        args: dict[str, Any],
        fds: int,
    ) -> None:
        try:
            received = None
            if fds:
                assert self.fd_source is not None
                assert isinstance(event_id, int)
                received = await self.fd_source.take(event_id, fds)
            result = await self.operations.invoke(entry.name, args, received)
            answer = {"id": event_id, "result": result}
        except Exception as error:
            answer = self._failure(event_id, error)
        await self.operations.kept(entry.name)
        if event_id is not None and not self._router.closed:
            self._answer(identity, answer)
            assert self._drain is not None
            self._drain.check()

    def _failure(self, event_id: EventId | None, error: Exception) -> dict[str, Any]:
        """Count an operation that failed; log one that failed by our own fault."""
        self.counters.failed += 1
        told = to_operation_error(error)
        if told.code == INTERNAL_ERROR and not isinstance(error, OperationError):
            log.error("%s: operation failed", self.name, exc_info=error)
        return {"id": event_id, "error": told.to_wire()}

    def _answer(self, identity: bytes, answer: dict[str, Any]) -> None:
        """Send an answer, or count it as undelivered: nobody waits for its receiver."""
        try:
            payload = encode(answer)
        except OperationError as error:
            payload = encode(self._failure(answer["id"], error))
        try:
            self._router.send(identity, SNDMORE | NOBLOCK)
            self._router.send(payload, NOBLOCK)
        except zmq.ZMQError:  # EAGAIN: does not read; EHOSTUNREACH: is gone
            self.counters.undelivered += 1
