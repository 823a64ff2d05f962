"""Kicks, calls and errors as messages (vhost-user, "In-band notifications").

Reactors know nothing of it. Where a front-end announces no eventfd for a queue, we make one: it is
written when VRING_KICK comes; VRING_CALL or VRING_ERR is sent when a reactor has written the other
two. The front-end confirms each before the next is sent, so that a simulator knows at any time that
it has dealt with all that has happened. Those that are due meanwhile become one for each queue.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from vhost.backend_channel import RequestChannel
from vhost.messages import BackendRequest, VringState
from vhost.record import QueueRecord, SessionRecord, Told

_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class InBand:
    """The notifications of one session's queues that have no eventfds of the front-end."""

    def __init__(self, record: SessionRecord, channel: RequestChannel) -> None:
        """Go on with the eventfds that a record has already."""
        self._record = record
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._watched: set[int] = set()
        self._due: dict[tuple[BackendRequest, int], None] = {}
        self._sender: asyncio.Task[None] | None = None
        for queue in record.queues.values():
            if queue.call >= 0 and not queue.told & Told.CALL:
                self._watch(queue.call, BackendRequest.VRING_CALL, queue)
            if queue.error >= 0 and not queue.told & Told.ERROR:
                self._watch(queue.error, BackendRequest.VRING_ERR, queue)

    def kick(self, queue: QueueRecord) -> None:
        """Take a kick that came in a message: it starts a queue that has not been started.

        One that has an eventfd of the front-end's is kicked through that.
        """
        if not queue.started:
            queue.kick, queue.started = os.eventfd(0, _FLAGS), True
        if queue.kick >= 0:
            with suppress(BlockingIOError):  # the counter is full: there is a kick to see
                os.eventfd_write(queue.kick, 1)

    def prepare(self, queue: QueueRecord) -> None:
        """Make the eventfds that a queue needs to be served."""
        if not self._record.inband:
            return
        if queue.call < 0 and not queue.told & Told.CALL:
            queue.call = os.eventfd(0, _FLAGS)
            self._watch(queue.call, BackendRequest.VRING_CALL, queue)
        if queue.error < 0 and not queue.told & Told.ERROR:
            queue.error = os.eventfd(0, _FLAGS)
            self._watch(queue.error, BackendRequest.VRING_ERR, queue)

    def unwatch(self, fd: int) -> None:
        """Send no messages for an eventfd that is about to be closed."""
        if fd in self._watched:
            self._watched.remove(fd)
            self._loop.remove_reader(fd)

    def channel_changed(self) -> None:
        """Send what is due, over the channel that there is now."""
        self._send_soon()

    def close(self) -> None:
        """Send nothing any more."""
        for fd in list(self._watched):
            self.unwatch(fd)
        self._due.clear()
        if self._sender is not None:
            self._sender.cancel()

    def _watch(self, fd: int, request: BackendRequest, queue: QueueRecord) -> None:
        """Have ``request`` sent when an eventfd is signalled."""
        self._watched.add(fd)
        self._loop.add_reader(fd, self._signalled, fd, request, queue.index)

    def _signalled(self, fd: int, request: BackendRequest, index: int) -> None:
        os.eventfd_read(fd)
        self._due[request, index] = None
        self._send_soon()

    def _send_soon(self) -> None:
        can_send = self._record.inband and self._channel.is_open
        if self._due and self._sender is None and can_send:
            self._sender = self._loop.create_task(self._send())

    async def _send(self) -> None:
        """Send what is due, and what becomes so meanwhile; over a new channel if there is one."""
        try:
            while self._due and self._channel.is_open:
                request, index = next(iter(self._due))
                del self._due[request, index]
                try:
                    await self._channel.ask(request, VringState(index, 0))
                except OSError:
                    self._due[request, index] = None
        finally:
            self._sender = None
