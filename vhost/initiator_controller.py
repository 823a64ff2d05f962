"""A vhost-user server as the control process has it: connected, lent out, and found again.

Every handle of a reactor has one of the server's queues. When the server goes away its queues are
taken from the reactors, whose requests then wait; it is looked for until it is back.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import select
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from reactor.errors import OperationError
from reactor.interfaces import Caller
from vhost.frontend_link import FrontendError
from vhost.initiator_session import Disk, InitiatorSession

MIN_DELAY, MAX_DELAY = 0.05, 5.0  # seconds between attempts to find a server, doubled each time

_keys = itertools.count(1)

log = logging.getLogger(__name__)


@dataclass
class Lent:
    """A queue that a reactor's handle has."""

    key: int
    reactor: Any
    place: int  # among the session's areas
    generation: int = -1  # of what the reactor was told last


def to_error(error: FrontendError) -> OperationError:
    """Return what a caller is told."""
    return OperationError(-errno.EIO, str(error))


class InitiatorController:
    """One server. ``changed(disks)`` is awaited when sizes may be others."""

    def __init__(
        self,
        name: str,
        path: str,
        kind: str,
        *,
        queues: int | None,
        queue_size: int,
        cluster: Caller,
        changed: Callable[[Iterable[Disk]], Awaitable[None]],
    ) -> None:
        self.name = name
        self.path = path
        self.kind = kind
        self.queue_size = queue_size
        self.reconnects = 0
        self.disks: list[Disk] = []
        self._queues = queues
        self._cluster = cluster
        self._changed = changed
        self._session: InitiatorSession | None = None
        self._generation = 0  # counts connections, and their ends
        self._lock = asyncio.Lock()  # the connection, and what is lent
        self._lent: dict[tuple[Any, str], Lent] = {}
        self._free: list[int] = []
        self._event = asyncio.Event()  # the server says something, or is gone
        self._watch: select.epoll | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the server is there."""
        return self._session is not None

    @property
    def queue_count(self) -> int:
        """How many queues there are to be lent."""
        return len(self._free) + len(self._lent)

    async def start(self) -> None:
        """Connect for the first time. OperationError."""
        try:
            session = await self._open()
        except FrontendError as error:
            raise to_error(error) from None
        self.disks = session.disks
        self._free = list(range(len(session.areas)))
        self._use(session)
        self._task = asyncio.create_task(self._supervise())

    async def _open(self) -> InitiatorSession:
        """Return a connection; one that is there too late for a caller that gave up is closed."""
        opening = asyncio.ensure_future(asyncio.to_thread(self._open_blocking))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_discard)
            raise

    def _open_blocking(self) -> InitiatorSession:
        session = InitiatorSession(self.path, self.kind)
        try:
            if not session.disks:
                raise FrontendError(f"{self.path}: the server has no disk")
            session.share(self._queues, self.queue_size)
        except BaseException:
            session.close()
            raise
        return session

    def _use(self, session: InitiatorSession) -> None:
        self._session = session
        self._generation += 1
        self._watch = watch = select.epoll()
        watch.register(session.raw.fileno(), select.EPOLLRDHUP)  # not answers: threads read those
        if session.channel is not None:
            watch.register(session.channel.fileno(), select.EPOLLIN)
        asyncio.get_running_loop().add_reader(watch.fileno(), self._event.set)

    def _drop(self) -> InitiatorSession | None:
        """Be without a server."""
        session, self._session = self._session, None
        self._generation += 1
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch.fileno())
            self._watch.close()
            self._watch = None
        return session

    # --- what reactors borrow

    async def lend(self, owner: Any, reactor: Any) -> tuple[int, dict[str, Any] | None, list[int]]:
        """Give a reactor a queue: its key, what it is (None: the server is away), descriptors."""
        async with self._lock:
            if not self._free:
                raise OperationError(
                    -errno.ENOSPC,
                    f"{self.name}: all {len(self._lent)} queues are in use, and each reactor needs "
                    "one for each disk: have the server offer more",
                )
            lent = self._lent[owner, reactor.name] = Lent(next(_keys), reactor, self._free.pop(0))
            link, fds = await self._attach(lent)
            return lent.key, link, fds

    async def _attach(self, lent: Lent) -> tuple[dict[str, Any] | None, list[int]]:
        lent.generation = self._generation
        session = self._session
        if session is None:
            return None, []
        try:
            await asyncio.to_thread(session.start_area, lent.place)
        except FrontendError as error:
            self._fail(session, error)
            return None, []
        area = session.areas[lent.place]
        link = {"offset": area.offset, "guest": area.guest, "event_idx": session.event_idx}
        return link, [session.memory.fds[0], area.kick_fd, area.call_fd]

    async def opened(self, owner: Any, reactor: Any) -> None:
        """Tell a handle that has just been opened what has happened to the server meanwhile."""
        async with self._lock:
            lent = self._lent.get((owner, reactor.name))
            if lent is not None and lent.generation != self._generation:
                await self._tell(lent)

    async def _tell(self, lent: Lent) -> None:
        """Tell a reactor of the server that there is now, or that there is none."""
        link, fds = await self._attach(lent)
        try:
            if link is None:
                await self._cluster.call(lent.reactor, "bdev_virtio_disconnect", {"key": lent.key})
            else:
                args = {"key": lent.key, "link": link}
                await self._cluster.call(lent.reactor, "bdev_virtio_connect", args, fds)
        except OperationError as error:
            if error.code != -errno.ECONNRESET:  # a reactor that has died asks again
                log.error("%s: %s: %s", self.name, lent.reactor.name, error.message)

    async def take_back(self, owner: Any, reactor: Any) -> None:
        """Return when the server has finished with what a reactor had asked for."""
        async with self._lock:
            lent = self._lent.pop((owner, reactor.name), None)
            if lent is None:
                return
            session = self._session
            if session is not None and lent.generation == self._generation:
                try:
                    await asyncio.to_thread(session.stop_area, lent.place)
                except FrontendError as error:
                    self._fail(session, error)
            self._free.append(lent.place)

    # --- coming and going

    def _fail(self, session: InitiatorSession, error: FrontendError) -> None:
        """Give a server up that does not do what it should."""
        log.error("%s: %s", self.name, error)
        session.raw.shut_down()
        self._event.set()

    async def _supervise(self) -> None:
        while True:
            await self._event.wait()
            self._event.clear()
            session = self._session
            if session is None:
                continue
            if not session.raw.alive():
                await self.lose()
                await self._find_again()
            else:
                await self._look_again(session)

    async def _look_again(self, session: InitiatorSession) -> None:
        """Read what the server says has changed."""
        async with self._lock:
            try:
                self.disks = await asyncio.to_thread(_read_change, session)
            except FrontendError as error:
                self._fail(session, error)
                return
        await self._changed(self.disks)

    async def lose(self) -> None:
        """Let go of the server: its requests wait until there is another one."""
        async with self._lock:
            session = self._drop()
            if session is None:
                return
            log.warning("%s: %s has gone away; its requests wait", self.name, self.path)
            for lent in self._lent.values():
                await self._tell(lent)
            await asyncio.to_thread(session.close)

    async def _find_again(self) -> None:
        start, delay = time.monotonic(), MIN_DELAY
        while True:
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY)
            try:
                session = await self._open()
            except FrontendError as error:
                log.info("%s: %s", self.name, error)
                continue
            if not self._fits(session):
                await asyncio.to_thread(session.close)
                continue
            break
        self.reconnects += 1
        async with self._lock:
            self._use(session)
            self.disks = session.disks
            for lent in self._lent.values():
                await self._tell(lent)
        took = time.monotonic() - start
        log.warning("%s: %s is back after %.1f s", self.name, self.path, took)
        await self._changed(self.disks)

    def _fits(self, session: InitiatorSession) -> bool:
        """Whether a server is one whose place another had: but for sizes it must be the same."""
        if session.disks != self.disks:
            text = "%s: %s has other disks than before, and is not used: %s, not %s"
            log.error(text, self.name, self.path, session.disks, self.disks)
            return False
        if len(session.areas) < self.queue_count:
            text = "%s: %s has %d queues now, not %d, and is not used"
            log.error(text, self.name, self.path, len(session.areas), self.queue_count)
            return False
        return True

    async def close(self) -> None:
        """Disconnect; no reactor has a queue any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        session = self._drop()
        if session is not None:
            await asyncio.to_thread(session.close)

    def close_now(self) -> None:
        """Disconnect at the end of the process, when nothing can be waited for."""
        if self._task is not None:
            self._task.cancel()
        session = self._drop()
        if session is not None:
            session.raw.shut_down()
            session.close()


def _read_change(session: InitiatorSession) -> list[Disk]:
    """Take a request of the server, and look at what it may have been about."""
    assert session.channel is not None
    session.channel.take(time.monotonic() + 1.0)
    return session.disks if session.scsi else [session.read_disk()]


def _discard(opening: asyncio.Future[InitiatorSession]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        session = opening.result()
        session.raw.shut_down()
        session.close()


def socket_path(traddr: str) -> str:
    """Return the path of a server's socket; OperationError(-22) if it cannot be one."""
    if not traddr or len(os.fsencode(traddr)) > 107:  # unix(7)
        raise OperationError(
            -errno.EINVAL, f"traddr {traddr!r:.120}: must be the path of a socket, 1 to 107 bytes"
        )
    return os.path.abspath(traddr)
