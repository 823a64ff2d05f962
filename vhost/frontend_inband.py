"""The front-end's side of in-band notifications: messages in place of eventfds.

Queues keep their eventfds, which stay here: a thread sends VRING_KICK for what the driver kicks,
and signals the driver for VRING_CALL and VRING_ERR.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from vhost.frontend_channel import BackendChannel
from vhost.frontend_link import FrontendError, Link
from vhost.frontend_memory import DriverQueue
from vhost.messages import BackendRequest, Request, VringState, decode

_TIMEOUT = 10.0  # seconds for the rest of a request that has begun to come


class InBand:
    """Carries notifications from ``start`` to ``stop``, between which nobody else may."""

    def __init__(self, link: Link, channel: BackendChannel, queues: Sequence[DriverQueue]) -> None:
        self._link = link
        self._channel = channel
        self._queues = queues
        self._ending = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="in-band", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._channel.handlers |= {
            BackendRequest.VRING_CALL: lambda data: self._signal(data, "call_fd"),
            BackendRequest.VRING_ERR: lambda data: self._signal(data, "error_fd"),
        }
        self._channel.taken = True
        self._thread.start()

    def stop(self) -> None:
        """End; what comes meanwhile waits in the socket."""
        os.eventfd_write(self._ending, 1)
        self._thread.join()
        self._channel.taken = False
        os.close(self._ending)

    def _run(self) -> None:
        with selectors.EpollSelector() as waiting, suppress(FrontendError):
            waiting.register(self._ending, selectors.EVENT_READ)
            waiting.register(self._channel, selectors.EVENT_READ, self._take)
            for queue in self._queues:
                kick = partial(self._kick, queue)
                waiting.register(queue.kick_fd, selectors.EVENT_READ, kick)
            while True:
                for key, _ in waiting.select():
                    if key.fd == self._ending:
                        return
                    key.data()

    def _take(self) -> None:
        self._channel.take(time.monotonic() + _TIMEOUT)

    def _kick(self, queue: DriverQueue) -> None:
        os.eventfd_read(queue.kick_fd)
        self._link.tell(Request.VRING_KICK, VringState(queue.index, 0))

    def _signal(self, data: bytes, which: str) -> None:
        index = decode(VringState, data, "VRING_CALL").index
        if index < len(self._queues):
            os.eventfd_write(getattr(self._queues[index], which), 1)
