"""How front-ends come to a controller: they connect to its socket, or it connects to theirs."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from reactor import activation
from reactor.vault import NoVault

SERVER, CLIENT = "server", "client"

FIRST_DELAY = 0.1  # seconds until a front-end that cannot be reached is tried again
LONGEST_DELAY = 5.0
_ACCEPT_PAUSE = 1.0  # seconds without accepting when descriptors have run out
_SUN_PATH = 108  # unix(7): bytes of a path, with the final NUL

Begin = Callable[[socket.socket], asyncio.Task[None] | None]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a controller meets its front-ends, and who listens there."""

    path: str
    mode: str = SERVER

    def params(self) -> dict[str, Any]:
        """Return the parameters that have a controller created with it."""
        return {} if self.mode == SERVER else {"mode": self.mode, "path": self.path}

    def entrance(self, name: str, begin: Begin, warn: Warn, vault: NoVault) -> Entrance:
        """Return what calls ``begin`` with each connection, or refuses by returning None.

        ``begin`` returns the task that serves it. ``warn`` writes a line to the log. ``name`` is
        what the service manager may call a socket of its own making.
        """
        if self.mode == CLIENT:
            return Connector(self.path, begin, warn, vault)
        return Listener(self.path, begin, warn, vault, activation.find(name))


class Entrance(Protocol):
    """What brings front-ends from ``open`` to ``close``."""

    def open(self) -> None:
        """Begin; raises OSError."""
        ...

    def resumed(self, serving: asyncio.Task[None]) -> None:
        """Take note that a front-end is there since the control process before."""
        ...

    def close(self) -> None:
        """Bring no more; sessions go on."""
        ...


class Listener:
    """Accepts connections at a path, or on a socket that was made for us."""

    def __init__(
        self,
        path: str,
        begin: Begin,
        warn: Warn,
        vault: NoVault,
        given: socket.socket | None = None,
    ) -> None:
        self._path = path
        self._vault = vault
        self._key = f"listener/{path}"
        self._begin = begin
        self._warn = warn
        self._given = given
        self._socket: socket.socket | None = None
        self._inode = 0
        self._pause: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """See Entrance and bind_socket.

        If the control process before has left its socket, it is that one: front-ends that have
        connected meanwhile wait there.
        """
        if self._given is not None:
            self._socket = self._given.dup()
            self._watch()
            return
        kept = self._vault.inherit(self._key)
        if kept is None:
            listener = bind_socket(self._path)
        else:
            listener = socket.socket(fileno=kept.fds.take(0))
        self._socket = listener
        self._vault.put(self._key, lambda: (b"", [listener.fileno()]))
        self._inode = os.lstat(self._path).st_ino
        self._watch()

    def resumed(self, serving: asyncio.Task[None]) -> None:
        """See Entrance: others may come beside it."""

    def close(self) -> None:
        """See Entrance; removes the socket, unless the service manager has made it."""
        if self._socket is None:
            return
        if self._pause is not None:
            self._pause.cancel()
        asyncio.get_running_loop().remove_reader(self._socket)
        if self._given is None:
            self._unlink()
            self._vault.drop(self._key)
        self._socket.close()
        self._socket = None

    def _unlink(self) -> None:
        """Remove the socket, unless somebody has put another one in its place."""
        with suppress(FileNotFoundError):
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def _watch(self) -> None:
        self._pause = None
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # EMFILE, ENFILE, ENOMEM: the peer stays in the backlog
            self._warn(f"cannot accept a connection: {error.strerror}")
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            self._pause = loop.call_later(_ACCEPT_PAUSE, self._watch)
            return
        self._begin(sock)


class Connector:
    """Connects to a front-end that listens, and again whenever the connection has ended.

    It never gives up: the time between two attempts doubles up to LONGEST_DELAY.
    """

    def __init__(self, path: str, begin: Begin, warn: Warn, vault: NoVault) -> None:
        self._path = path
        self._begin = begin
        self._warn = warn
        self._vault = vault
        self._resumed: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """See Entrance; whether anybody listens need not be known yet."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def resumed(self, serving: asyncio.Task[None]) -> None:
        """See Entrance: we connect again when it has ended."""
        self._resumed = serving

    def close(self) -> None:
        """See Entrance."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        delay, told = FIRST_DELAY, 0
        await self._vault.settled()
        if self._resumed is not None:
            await asyncio.wait({self._resumed})
        while True:
            try:
                sock = await self._connect()
            except OSError as error:
                if error.errno != told:  # every attempt fails alike
                    told = error.errno or 0
                    self._warn(f"no front-end at {self._path} yet: {error.strerror}")
            else:
                began = time.monotonic()
                serving = self._begin(sock)
                if serving is not None:
                    await asyncio.wait({serving})
                if time.monotonic() - began > LONGEST_DELAY:
                    delay = FIRST_DELAY
                told = 0
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)

    async def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # At once or not at all, connect(2): a backlog that is full is EAGAIN.
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        return sock


def check_path(path: str) -> None:
    """Raise OSError(ENAMETOOLONG) for a path that no socket can have."""
    if len(os.fsencode(path)) >= _SUN_PATH:
        text = f"longer than {_SUN_PATH - 1} bytes: use a shorter socket directory or name"
        raise OSError(errno.ENAMETOOLONG, text, path)


def bind_socket(path: str) -> socket.socket:
    """Return a socket that listens at ``path``, in place of one that nobody listens on any more.

    Raises OSError: EADDRINUSE when somebody does, EEXIST when there is something that is no socket,
    ENAMETOOLONG, and what bind(2) says.
    """
    check_path(path)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    return listener


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "File exists and is no socket: remove it", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise OSError(errno.EADDRINUSE, "Address already in use: another process listens there", path)
