"""ZeroMQ sockets on an asyncio event loop, without a task or a future for each message.

A ZeroMQ socket's descriptor (ZMQ_FD, zmq_getsockopt(3)) is edge-triggered: it says "look at
EVENTS", and any call on the socket may consume what it had to say. So whoever has used a socket
must look at EVENTS before going to sleep; :class:`Drain` is the one place that knows.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from socket import AF_UNIX
from socket import socket as unix_socket

import zmq

from reactor.envelope import MAX_MESSAGE

BATCH = 64  # messages handled before other callbacks and the pollers get their turn
FEW = 2  # messages after which more are expected
HIGH_WATER_MARK = 1000  # messages waiting for one peer

# As plain integers: converting the enumeration on each call costs more than the call.
NOBLOCK = int(zmq.NOBLOCK)
SNDMORE = int(zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


def make_context() -> Context:
    """Return a context with one I/O thread, which starts with the context's first socket."""
    return zmq.Context(io_threads=1)


def make_socket(context: Context, kind: int) -> Socket:
    """Return a socket that never holds up a process: bounded queues, nothing kept after close."""
    socket: Socket = context.socket(kind)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
    # Twice the limit: what is a little too large is answered with an error, what is far too large
    # costs its sender the connection.
    socket.maxmsgsize = 2 * MAX_MESSAGE
    socket.reconnect_ivl = 20  # ms; doubled up to the maximum while nobody listens
    socket.reconnect_ivl_max = 500
    return socket


def readable(socket: Socket) -> bool:
    """Return whether a message waits; also takes note of all that the socket's edge announced."""
    events = socket.get(_EVENTS)
    assert isinstance(events, int)
    return bool(events & _POLLIN)


def receive_only_frame(socket: Socket) -> bytes:
    """Return the next frame, without blocking; nothing if more follow it, which are dropped.

    Raises zmq.Again if there is none. A frame says what follows it at less cost than the socket.
    """
    frame = socket.recv(NOBLOCK, copy=False)
    payload = frame.bytes
    while frame.more:
        frame = socket.recv(NOBLOCK, copy=False)
        payload = b""
    return payload


class Drain:
    """Hands every message of a socket to ``receive``, a bounded number a turn of the loop.

    ``receive()`` takes one message from the socket without blocking, and lets zmq.Again out when
    there is none.
    """

    def __init__(
        self, socket: Socket, loop: asyncio.AbstractEventLoop, receive: Callable[[], None]
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._receive = receive
        self._scheduled = False
        self._fd = int(socket.get(zmq.FD))
        loop.add_reader(self._fd, self._run)
        self.check()  # what arrived before now has had its edge

    def check(self) -> None:
        """Look at EVENTS; to be called after each use of the socket outside ``receive``."""
        if not self._scheduled and readable(self._socket):
            self._scheduled = True
            self._loop.call_soon(self._run)

    def close(self) -> None:
        """Stop watching; the socket stays its owner's."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._fd = -1

    def _run(self) -> None:
        self._scheduled = False
        receive = self._receive
        if self._fd < 0:
            return
        for count in range(1, BATCH + 1):
            try:
                receive()
            except zmq.Again:
                return
            except Exception:
                log.exception("a message could not be handled")
            # Asked rather than tried: an exception costs three times as much, and comes before
            # whoever waits for this message can run. In a burst it is the other way round, since
            # only the last try fails. After a no, the next message makes an edge.
            if self._fd < 0 or (count <= FEW and not readable(self._socket)):
                return
        self._scheduled = True
        self._loop.call_soon(self._run)


def peer_is_listening(path: str) -> bool:
    """Return whether a living process has bound ``path``; the file alone proves nothing."""
    with unix_socket(AF_UNIX) as probe:
        probe.settimeout(0)
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full
            return True
        except OSError:
            return False
        return True


def bind_private(socket: Socket, path: str) -> None:
    """Bind at ``path``, with a socket file that only this user may connect to.

    Raises OSError(EADDRINUSE) if a living process listens there; a dead one's file is replaced.
    """
    if peer_is_listening(path):
        raise OSError(errno.EADDRINUSE, "another process serves this socket", path)
    mask = os.umask(0o177)
    try:
        socket.bind(f"ipc://{path}")
    except zmq.ZMQError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    finally:
        os.umask(mask)
