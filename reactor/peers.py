"""The calling side of events: a DEALER for each process that is called, and calls that wait."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

from reactor.envelope import (
    CallTimeoutError,
    MalformedError,
    PeerLostError,
    decode,
    encode_request,
    socket_path,
)
from reactor.errors import INTERNAL_ERROR, OperationError
from reactor.reply import Reply
from reactor.sockets import NOBLOCK, Context, Drain, Socket, make_socket, receive_only_frame


class FdSender(Protocol):
    """What carries file descriptors to a peer, beside its events: see reactor/fdpass.py."""

    def send(self, tag: int, fds: Sequence[int]) -> None:
        """Send duplicates of ``fds``, to be claimed by the event whose id is ``tag``."""


@dataclasses.dataclass(slots=True)
class Counters:
    """What a process has seen of events since it started."""

    received: int = 0  # messages that came to our ROUTER
    malformed: int = 0  # of these, those that were no valid event
    failed: int = 0  # events whose operation did not exist, was refused, or raised
    busy: int = 0  # events refused because their sender had too many unanswered
    undelivered: int = 0  # answers to somebody who was gone or did not read
    sent: int = 0  # events sent to others
    rejected: int = 0  # events not sent because the receiver's queue was full
    timeouts: int = 0  # calls that nobody answered in time
    lost: int = 0  # calls whose receiver died
    late: int = 0  # answers that nobody waited for any more

    def to_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return dataclasses.asdict(self)


class Peer:
    """One process that we send to."""

    def __init__(
        self,
        target: str,
        socket: Socket,
        loop: asyncio.AbstractEventLoop,
        ids: Callable[[], int],
        counters: Counters,
    ) -> None:
        self.target = target
        self._socket = socket
        self._loop = loop
        self._next_id = ids
        self._counters = counters
        self._waiting: dict[int, Reply] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # when the timer fires
        self._drain = Drain(socket, loop, self._receive)

    @property
    def waiting(self) -> int:
        """How many calls have not been answered."""
        return len(self._waiting)

    def send(self, op: str, args: dict[str, Any] | None) -> None:
        """Queue an event that wants no answer; see Node.send()."""
        self.send_payload(encode_request(None, op, args))

    def send_payload(self, payload: bytes) -> None:
        """Queue a message; OSError(EAGAIN) when the queue is full."""
        try:
            self._socket.send(payload, NOBLOCK)
        except zmq.Again:
            self._counters.rejected += 1
            raise BlockingIOError(
                errno.EAGAIN, "its queue of events is full: try again later", self.target
            ) from None
        self._counters.sent += 1
        self._drain.check()

    async def call(
        self,
        op: str,
        args: dict[str, Any] | None,
        timeout: float | None,
        fds: Sequence[int] = (),
        channel: FdSender | None = None,
    ) -> Any:
        """Send, and return the result; see Node.call()."""
        event_id = self._next_id()
        payload = encode_request(event_id, op, args, len(fds))
        if fds:
            if channel is None:
                raise ValueError(f"no channel for file descriptors to {self.target}")
            channel.send(event_id, fds)
        reply = Reply(self._loop, op, math.inf if timeout is None else timeout)
        self._waiting[event_id] = reply
        if reply.deadline < self._due:
            self._arm(reply.deadline)
        try:
            self.send_payload(payload)
            answer = await reply
        finally:
            self._waiting.pop(event_id, None)
        if "error" in answer:
            raise OperationError.from_wire(answer["error"])
        return answer.get("result")

    def _receive(self) -> None:
        payload = receive_only_frame(self._socket)  # as an answer has
        try:
            reply = decode(payload)
            event_id = reply.get("id")
        except MalformedError as error:
            self._counters.malformed += 1
            event_id = error.event_id
            broken = OperationError(INTERNAL_ERROR, f"malformed answer: {error.message}")
            reply = {"error": broken.to_wire()}
        waiting = self._waiting.get(event_id) if type(event_id) is int else None
        if waiting is None or waiting.done:
            self._counters.late += 1
        else:
            waiting.resume(reply)

    def _arm(self, deadline: float) -> None:
        """Have one timer for all calls, set for the first that is due: most never are."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = deadline
        self._timer = None
        if deadline < math.inf:
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        now = self._loop.time()
        for reply in self._waiting.values():
            if reply.deadline <= now and not reply.done:
                self._counters.timeouts += 1
                reply.fail(CallTimeoutError(self.target, reply.op, reply.timeout))
        left = (reply.deadline for reply in self._waiting.values() if not reply.done)
        self._arm(min(left, default=math.inf))

    def close(self) -> None:
        """Fail the calls that wait with PeerLostError, and drop what was not sent."""
        self._arm(math.inf)
        self._drain.close()
        self._socket.close()
        for reply in self._waiting.values():
            if not reply.done:
                self._counters.lost += 1
                reply.fail(PeerLostError(self.target, reply.op))
        self._waiting.clear()


class Peers:
    """Every process that we send to, connected on first use."""

    def __init__(
        self, context: Context, run_dir: str | os.PathLike[str], counters: Counters
    ) -> None:
        self._context = context
        self._run_dir = run_dir
        self._counters = counters
        self._peers: dict[str, Peer] = {}
        self._local: dict[str, str] = {}
        self._next_id = itertools.count(1).__next__
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use ``loop`` from now on."""
        self._loop = loop

    def add_local(self, name: str, endpoint: str) -> None:
        """Reach ``name``, a thread of this process, at an inproc:// endpoint."""
        self._local[name] = endpoint

    def get(self, target: str) -> Peer:
        """Return the peer called ``target``.

        Raises OSError(ENOENT) if no process of that name has ever bound its socket in the run
        directory, or if the name cannot be one.
        """
        peer = self._peers.get(target)
        if peer is None:
            peer = self._peers[target] = self._connect(target)
        return peer

    def _connect(self, target: str) -> Peer:
        if self._loop is None:
            raise RuntimeError("not started, or closed already")
        endpoint = self._local.get(target) or find_endpoint(self._run_dir, target)
        socket = make_socket(self._context, zmq.DEALER)
        socket.connect(endpoint)
        return Peer(target, socket, self._loop, self._next_id, self._counters)

    def forget(self, target: str) -> None:
        """Fail what waits for ``target`` with PeerLostError; the next call connects anew."""
        peer = self._peers.pop(target, None)
        if peer is not None:
            peer.close()

    def close(self) -> None:
        """Forget everybody."""
        for target in list(self._peers):
            self.forget(target)
        self._loop = None


def find_endpoint(run_dir: str | os.PathLike[str], target: str) -> str:
    """Return the endpoint of a process; OSError(ENOENT) if it is not there."""
    path = socket_path(run_dir, target)
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "no process of this name is running", path)
    return f"ipc://{path}"
