"""What has happened in a cluster: a short log to be asked for, and a socket that pushes it.

Every notification has the next ``id``, a ``type``, ``ctx`` (the name of the object that it is
about), ``time`` in seconds since 1970, and for some types ``details``. The last ones are kept and
answered by ``notify_get_notifications``; each is also published at
``ipc://RUN_DIR/notifications``. See docs/events.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import zmq

from reactor.envelope import decode, encode, socket_path
from reactor.operations import operation
from reactor.sockets import NOBLOCK, SNDMORE, bind_private, make_context, make_socket

KEPT = 1024  # as SPDK
SOCKET = "notifications"  # in the run directory

TYPES = (
    "bdev_register",
    "bdev_unregister",
    "bdev_resize",
    "bdev_timeout",
    "bdev_raid_leg_lost",
    "bdev_raid_rebuilt",
    "vhost_connect",
    "vhost_disconnect",
    "vhost_features",
    "vhost_reset",
    "vhost_queue_broken",
    "vhost_bdev_removed",
    "reactor_lost",
    "reactor_recovered",
)

log = logging.getLogger(__name__)


class Notify(Protocol):
    """How the parts of a process tell that something has happened."""

    def __call__(self, kind: str, ctx: str, /, **details: Any) -> None:
        """Tell that ``kind``, one of TYPES, has happened to the object called ``ctx``."""


def ignore(_kind: str, _ctx: str, /, **_details: Any) -> None:
    """Tell nobody: a Notify where nobody listens."""


class Notifications:
    """The log, its operations, and the socket once there is one; ``emit`` is a Notify."""

    def __init__(self) -> None:
        self._next_id = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._publisher: Publisher | None = None

    def publish(self, run_dir: str | os.PathLike[str]) -> Publisher:
        """Push from now on, to whoever subscribes; the socket is the caller's to close."""
        self._publisher = Publisher(run_dir)
        return self._publisher

    def emit(self, kind: str, ctx: str, /, **details: Any) -> None:
        """See Notify; never raises for what is the listeners' fault."""
        assert kind in TYPES, kind
        entry: dict[str, Any] = {"id": self._next_id, "type": kind, "ctx": ctx}
        entry["time"] = time.time()
        if details:
            entry["details"] = details
        self._next_id += 1
        self._kept.append(entry)
        if self._publisher is not None:
            self._publisher.send(entry)

    @operation(aliases=["get_notification_types"])
    def notify_get_types(self) -> list[str]:
        """Return the types of notifications that there are."""
        return list(TYPES)

    @operation(aliases=["get_notifications"])
    def notify_get_notifications(
        self,
        id: int = 0,  # noqa: A002 - SPDK's name
        max: int = KEPT,  # noqa: A002 - SPDK's name
    ) -> list[dict[str, Any]]:
        """Return up to ``max`` notifications from number ``id`` on, the oldest first.

        The last 1024 are kept: when the first one of the answer is above ``id``, some were missed.
        """
        found = [entry for entry in self._kept if entry["id"] >= id]
        return found[: builtin_max(0, max)]


builtin_max = max  # hidden by the parameter's name


class Publisher:
    """A PUB socket; slow subscribers lose notifications, and nobody waits for them."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        """Bind it; OSError if that is not possible."""
        self._context = make_context()
        self._socket = make_socket(self._context, zmq.PUB)
        try:
            self._path = socket_path(run_dir, SOCKET)
            bind_private(self._socket, self._path)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def send(self, entry: dict[str, Any]) -> None:
        """Send two frames: the type, to subscribe by, and the notification as msgpack."""
        try:
            self._socket.send(entry["type"].encode(), SNDMORE | NOBLOCK)
            self._socket.send(encode(entry), NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("notification %d was not published: %s", entry["id"], error)

    def close(self) -> None:
        """Close the socket, once what was sent has left or a tenth of a second is over."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._context.destroy(linger=100)


def subscribe(
    run_dir: str | os.PathLike[str], kinds: tuple[str, ...] = (), idle: float = 1.0
) -> Iterator[dict[str, Any] | None]:
    """Yield notifications as they come, of ``kinds`` or all; None when ``idle`` s were quiet.

    Raises FileNotFoundError if no cluster runs there. What the socket loses, the log may still
    have: a gap in the ids shows it.
    """
    path = socket_path(run_dir, SOCKET)
    if not os.path.exists(path):
        raise FileNotFoundError(2, "no cluster publishes notifications there", path)
    context = make_context()
    socket = make_socket(context, zmq.SUB)
    socket.rcvtimeo = int(idle * 1000)
    try:
        for kind in kinds or ("",):
            socket.subscribe(kind)
        socket.connect(f"ipc://{path}")
        while True:
            try:
                _, payload = socket.recv_multipart()
            except zmq.Again:
                yield None
                continue
            entry: dict[str, Any] = decode(payload)
            yield entry
    finally:
        context.destroy(linger=0)
