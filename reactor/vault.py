"""The control process's side of the keeper: what it puts there, and what it finds there.

Everything that must outlive the control process is an entry under a key, such as
``session/7`` or ``bdev/malloc/Malloc0``; its owner puts it and drops it. When a cluster starts on a
run directory whose keeper is alive, the entries of the control process before are there to be
inherited, each by its new owner (docs/recovery.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from reactor.child import Child, Process, describe_exit
from reactor.frames import Frames, frames_of
from reactor.keeper import HAND_OVER_TIMEOUT, SOCKET, Answer, Request
from reactor.operations import FileDescriptors
from reactor.rights import send_with_fds

ORPHAN_TIMEOUT = 300.0  # seconds that a cluster waits for its next control process
RESTART_DELAY = 1.0  # seconds from the end of a keeper that never worked to the next one

log = logging.getLogger(__name__)

Source = Callable[[], tuple[bytes, Sequence[int]]]
"""Returns what an entry is now: its data, and descriptors that stay the owner's."""


class Inherited(NamedTuple):
    """An entry of the control process before; the descriptors are the heir's."""

    data: bytes
    fds: FileDescriptors


class KeeperLostError(ConnectionResetError):
    """The keeper has died, and it is not known whether it did what it was asked to."""


@dataclass(slots=True)
class _Asked:
    """A request that was not answered yet."""

    answer: asyncio.Future[int]
    is_put: bool  # done by the next keeper, if this one dies
    frames: deque[tuple[bytes, FileDescriptors]] = field(default_factory=deque)  # not sent yet


class NoVault:
    """For a cluster that ends with its control process: nothing is kept, nothing inherited."""

    adopted = False

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with ``prefix`` and that nobody has inherited yet."""
        del prefix
        return []

    def inherit(self, key: str) -> Inherited | None:
        """Return what the control process before had under ``key``: once, and None after that."""
        del key
        return None

    def put(self, key: str, source: Source) -> Awaitable[object]:
        """Keep what ``source`` returns, in place of what was there; wait for it to be sure of it.

        The source is asked now, and again whenever a keeper replaces one that died.
        """
        del key, source
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        done.set_result(0)
        return done

    def drop(self, key: str) -> None:
        """Keep an entry no more."""

    def drop_inherited(self) -> None:
        """Drop what nobody has inherited: it belonged to something that was never finished."""

    async def settled(self) -> None:
        """Return when nothing is left to be inherited."""

    async def renew(self) -> None:
        """Replace the keeper by one of this program, which may be a newer one."""


class Vault(NoVault):
    """A cluster's keeper, started or found by ``open``.

    ``adopted`` tells whether there was one, that is whether there is a cluster to be taken over.
    """

    def __init__(self, run_dir: str | os.PathLike[str], timeout: float = ORPHAN_TIMEOUT) -> None:
        self._run_dir = os.fspath(run_dir)
        self._timeout = timeout
        self._inherited: dict[str, Inherited] = {}
        self._sources: dict[str, Source] = {}
        self._frames: Frames | None = None
        self._process: Process | None = None
        self._asked: deque[_Asked] = deque()
        self._waiting: list[asyncio.Future[int]] = []  # puts, for the next keeper
        self._restart: asyncio.Task[None] | None = None
        self._closed = False
        self._settled = asyncio.Event()
        self._works = False  # this keeper has answered

    @property
    def pid(self) -> int | None:
        """The keeper's process; None while there is none."""
        return None if self._process is None else self._process.pid

    async def open(self) -> None:
        """Take over what a living keeper has, or start one. Raises OSError."""
        self.adopted = self._adopt()
        if not self.adopted:
            self._settled.set()
            self._start()

    def keys(self, prefix: str) -> list[str]:
        """See NoVault."""
        return [key for key in self._inherited if key.startswith(prefix)]

    def inherit(self, key: str) -> Inherited | None:
        """See NoVault."""
        return self._inherited.pop(key, None)

    def drop_inherited(self) -> None:
        """See NoVault."""
        for key, entry in self._inherited.items():
            log.info("nothing needs %s any more", key)
            entry.fds.close()
            if key not in self._sources:
                self.drop(key)
        self._inherited.clear()
        self._settled.set()

    async def settled(self) -> None:
        """See NoVault."""
        await self._settled.wait()

    def put(self, key: str, source: Source) -> Awaitable[object]:
        """See NoVault."""
        self._sources[key] = source
        data, fds = source()
        return self._ask(Request("put", key, data), fds, is_put=True)

    def drop(self, key: str) -> None:
        """See NoVault."""
        self._sources.pop(key, None)
        self._ask(Request("drop", key), (), is_put=True)

    async def finish(
        self, key: str, source: Source | None, consume: int, reply: bytes, fds: Sequence[int]
    ) -> int:
        """Answer a message of a connection that is kept: see keeper.Request.

        Returns 0 or an errno: EAGAIN when nothing was done because the peer does not read. Raises
        KeeperLostError, once there is another keeper.
        """
        data, kept = (None, ()) if source is None else source()
        request = Request("finish", key, data, consume, reply, len(fds))
        return await self._ask(request, [*kept, *fds])

    async def renew(self) -> None:
        """See NoVault; for when nothing is left to be inherited."""
        former, frames = self._process, self._frames
        if frames is not None:
            self._forget_channel()
        self._start()
        if self._asked:  # the former has everything until this one has
            with contextlib.suppress(KeeperLostError):
                await asyncio.shield(self._asked[-1].answer)
        if frames is not None:
            with contextlib.suppress(OSError):
                frames.socket.setblocking(True)
                frames.send(msgspec.msgpack.encode(Request("end")))
            frames.close()
        if former is not None:
            await former.wait()

    async def close(self) -> None:
        """End the keeper: nothing is left to be inherited."""
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()
        if self._frames is not None:
            with contextlib.suppress(KeeperLostError):
                await self._ask(Request("end"), ())
        self._forget_channel(close=True)
        if self._process is not None:
            await self._process.wait()

    # --- the connection

    def _adopt(self) -> bool:
        """Connect to a keeper that waits and read what it has; False if there is none."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(HAND_OVER_TIMEOUT)
            sock.connect(os.path.join(self._run_dir, SOCKET))
            pid, _, _ = struct.unpack(
                "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            frames = Frames(sock)
            while (entry := self._read_entry(frames)) is not None:
                key, inherited = entry
                self._inherited[key] = inherited
            pidfd = os.pidfd_open(pid)
        except (FileNotFoundError, ConnectionRefusedError, EOFError, ProcessLookupError):
            sock.close()  # none, or it has just ended
            return False
        except BaseException:
            sock.close()
            raise
        self._watch(frames, Process(pid, pidfd))
        return True

    @staticmethod
    def _read_entry(frames: Frames) -> tuple[str, Inherited] | None:
        message = None
        while message is None:
            message = frames.receive()
        data, fds = message
        answer = msgspec.msgpack.decode(data, type=Answer)
        return (answer.key, Inherited(answer.data, fds)) if answer.key else None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                channel = theirs.fileno()
                arguments = ["--run-dir", self._run_dir, "--channel", str(channel)]
                arguments += ["--timeout", str(self._timeout)]
                process = Child("reactor.keeper", arguments, (channel,))
        except BaseException:
            ours.close()
            raise
        self._watch(Frames(ours), process)
        for source_key, source in self._sources.items():
            data, fds = source()
            self._ask(Request("put", source_key, data), fds, is_put=True)
        waiting, self._waiting = self._waiting, []

        def restocked(_: object = None) -> None:
            for future in waiting:
                if not future.done():
                    future.set_result(0)

        if self._asked:
            self._asked[-1].answer.add_done_callback(restocked)
        else:
            restocked()

    def _watch(self, frames: Frames, process: Process) -> None:
        frames.socket.setblocking(False)
        self._frames, self._process, self._works = frames, process, False
        asyncio.get_running_loop().add_reader(frames.socket, self._readable, frames)

    def _readable(self, frames: Frames) -> None:
        try:
            message = frames.receive()
        except BlockingIOError:
            return
        except (EOFError, OSError):
            self._lost()
            return
        if message is None:
            return
        data, fds = message
        fds.close()
        answer = msgspec.msgpack.decode(data, type=Answer)
        self._works = True
        asked = self._asked.popleft()
        if not asked.answer.done():
            asked.answer.set_result(answer.error)

    def _lost(self) -> None:
        process = self._process
        self._forget_channel(close=True)
        if not self._closed and process is not None:
            self._restart = asyncio.ensure_future(self._replace(process))

    async def _replace(self, process: Process) -> None:
        code = await process.wait()
        log.error("the keeper (pid %d) %s", process.pid, describe_exit(code))
        if not self._works:  # it may not be able to live at all: nobody waits for that
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(0)
            await asyncio.sleep(RESTART_DELAY)
        while self._frames is None:
            try:
                self._start()
            except OSError as error:
                log.error("no keeper could be started: %s", error)
                await asyncio.sleep(RESTART_DELAY)

    def _forget_channel(self, *, close: bool = False) -> None:
        """Ask this keeper nothing more; what it has not answered is unknown or the next one's."""
        if self._frames is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._frames.socket)
        loop.remove_writer(self._frames.socket)
        if close:
            self._frames.close()
        self._frames = None
        unanswered, self._asked = self._asked, deque()
        for asked in unanswered:
            for _, fds in asked.frames:
                fds.close()
            if asked.is_put:
                self._waiting.append(asked.answer)
            elif not asked.answer.done():
                asked.answer.set_exception(KeeperLostError(errno.ECONNRESET, "the keeper died"))

    def _ask(
        self, request: Request, fds: Sequence[int], *, is_put: bool = False
    ) -> asyncio.Future[int]:
        """Send a request, or as much of it as the socket takes now; its answer is the result."""
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self._frames is None:
            if is_put:
                self._waiting.append(answer)
            else:
                answer.set_exception(KeeperLostError(errno.ECONNRESET, "there is no keeper"))
            return answer
        asked = _Asked(answer, is_put)
        blocked = any(before.frames for before in self._asked)
        self._asked.append(asked)
        for data, parcel in frames_of(msgspec.msgpack.encode(request), fds):
            if blocked or not self._send(data, parcel):
                blocked = True
                asked.frames.append((data, FileDescriptors(map(os.dup, parcel))))
        if blocked:
            asyncio.get_running_loop().add_writer(self._frames.socket, self._writable)
        return answer

    def _send(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send a frame; False if it has to wait. That the keeper is gone, we hear elsewhere."""
        assert self._frames is not None
        try:
            send_with_fds(self._frames.socket, data, fds)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass
        return True

    def _writable(self) -> None:
        assert self._frames is not None
        for asked in self._asked:
            while asked.frames:
                data, fds = asked.frames[0]
                if not self._send(data, fds):
                    return
                fds.close()
                asked.frames.popleft()
        asyncio.get_running_loop().remove_writer(self._frames.socket)
