"""The control process's end of a Python device: its process, which is replaced when it dies.

``HostProcess`` starts it, tells it which reactors to serve, and looks every second whether its loop
turns: one that does not for longer than a request may take is killed.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from bdev.python_host import MAX_MESSAGE
from reactor.child import Child, describe_exit
from reactor.errors import OperationError
from reactor.fdpass import channel_pair
from reactor.native import lib

START_TIMEOUT = 30.0  # seconds from starting it to its device: it imports what its user wants
PING_PERIOD = 1.0  # seconds
END_TIMEOUT = 3.0  # seconds from the end of the channel to killing it

_AREA_SIZE = lib.PYTHON_DATA + lib.PYTHON_SLOTS * lib.PYTHON_PIECE

log = logging.getLogger(__name__)


class Area:
    """What one reactor shares with the process: memory, and an eventfd for each direction."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.fds: list[int] = []
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        try:
            self.fds.append(os.memfd_create("bdev-python", os.MFD_CLOEXEC))
            os.ftruncate(self.fds[0], _AREA_SIZE)
            self.fds += [os.eventfd(0, flags), os.eventfd(0, flags)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors; who has them mapped keeps them."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class HostProcess:
    """One device's process, the first one and those that replace it."""

    def __init__(
        self, name: str, device: str, args: dict[str, Any], timeout: float, modules: Sequence[str]
    ) -> None:
        self.name = name
        self.restarts = 0
        self._create = {"device": device, "args": args, "timeout": timeout}
        self._timeout = timeout
        self._options = ["--name", name]
        self._options += [option for module in modules for option in ("--load", module)]
        self._numbers = itertools.count(1)
        self._areas: dict[int, Area] = {}
        self._lock = asyncio.Lock()  # what concerns areas, and replacing the process
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._child: Child | None = None
        self._ready = False  # the process has its device, so that its loop should turn
        self._socket: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return None if self._child is None else self._child.pid

    async def start(self) -> dict[str, Any]:
        """Start the process and its device; return what that is like. OperationError."""
        try:
            described = await self._launch()
        except BaseException:
            await self.end()
            raise
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch())]
        return described

    async def _launch(self) -> dict[str, Any]:
        self._ready = False
        ours, theirs = channel_pair()
        ours.setblocking(False)
        with theirs:
            channel = theirs.fileno()
            arguments = ["--channel", str(channel), *self._options]
            try:
                self._child = Child("bdev.python_host", arguments, (channel,))
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._receive, ours)
        described: dict[str, Any] = await self.call("create", self._create, timeout=START_TIMEOUT)
        self._ready = True
        return described

    async def call(
        self, op: str, args: dict[str, Any], fds: Sequence[int] = (), *, timeout: float
    ) -> Any:
        """Have the process do something. OperationError(-104) if it dies, -110 if it is late."""
        if self._socket is None:
            raise OperationError(-errno.ECONNRESET, f"bdev {self.name}: its process has ended")
        ident = next(self._numbers)
        data = msgspec.msgpack.encode({"id": ident, "op": op, "args": args})
        if len(data) > MAX_MESSAGE:
            raise OperationError(
                -errno.EINVAL, f"args: have {len(data)} bytes, {MAX_MESSAGE} is the most"
            )
        answer = self._answers[ident] = asyncio.get_running_loop().create_future()
        try:
            socket.send_fds(self._socket, [data], fds)
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            text = f"bdev {self.name}: its process did not {op} within {timeout:g} s"
            raise OperationError(-errno.ETIMEDOUT, text) from None
        except OSError as error:
            raise OperationError(
                -(error.errno or errno.EIO), f"bdev {self.name}: {error}"
            ) from None
        finally:
            del self._answers[ident]

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(sock)
            return
        message = msgspec.msgpack.decode(data)
        answer = self._answers.get(message["id"])
        if answer is None or answer.done():
            return
        if "error" in message:
            error = OperationError.from_wire(message["error"])
            error.message = f"bdev {self.name}: {error.message}"
            answer.set_exception(error)
        else:
            answer.set_result(message["result"])

    def _hang_up(self, sock: socket.socket) -> None:
        """Close the channel, and fail what waits for an answer."""
        asyncio.get_running_loop().remove_reader(sock)
        sock.close()
        if self._socket is sock:
            self._socket = None
        for answer in self._answers.values():
            if not answer.done():
                text = f"bdev {self.name}: its process has ended; its log says why"
                answer.set_exception(OperationError(-errno.ECONNRESET, text))

    # --- areas

    async def attach(self) -> Area:
        """Have one more reactor served: return what to lend to it."""
        async with self._lock:
            area = Area(next(self._numbers))
            self._areas[area.number] = area
            await self._attach(area)
        return area

    async def _attach(self, area: Area) -> None:
        """Tell the process of an area; one that does not listen is replaced, and told again."""
        try:
            await self.call("attach", {"channel": area.number}, area.fds, timeout=self._patience)
        except OperationError as error:
            self._kill(error.message)

    async def detach(self, area: Area) -> None:
        """Serve a reactor no more: what it had asked for is over when this returns."""
        async with self._lock:
            if self._areas.pop(area.number, None) is None:
                return
            try:
                await self.call("detach", {"channel": area.number}, timeout=self._patience)
            except OperationError as error:
                if self._child is not None:
                    self._kill(error.message)
                    await self._child.wait()
            area.close()

    @property
    def _patience(self) -> float:
        return self._timeout + PING_PERIOD

    # --- supervision

    def _kill(self, why: str) -> None:
        if self._child is not None and not self._child.exited.done():
            log.error("%s: it is killed", why)
            self._child.send_signal(signal.SIGKILL)

    async def _watch(self) -> None:
        """Kill a process whose loop does not turn."""
        while True:
            await asyncio.sleep(PING_PERIOD)
            if not self._ready:
                continue
            try:
                await self.call("ping", {}, timeout=self._patience)
            except OperationError as error:
                if error.code == -errno.ETIMEDOUT:
                    self._kill(error.message)

    async def _supervise(self) -> None:
        """Replace the process whenever it dies; what was not answered yet is done anew."""
        from reactor.cluster import Backoff  # not in reactors, which import this module, too

        backoff = Backoff()
        loop = asyncio.get_running_loop()
        while self._child is not None:
            code = await self._child.wait()
            delay = backoff.died(loop.time())
            text = "bdev %s: its process %s; the next one starts in %.1f s"
            log.error(text, self.name, describe_exit(code), delay)
            await asyncio.sleep(delay)
            async with self._lock:
                self.restarts += 1
                try:
                    await self._launch()
                    for area in list(self._areas.values()):
                        await self._attach(area)
                except (OSError, OperationError) as error:
                    log.error("%s", error)
                    self._kill(f"bdev {self.name}: not ready")

    # --- the end

    def close(self) -> None:
        """Have the process end, now or soon; nobody uses the device any more."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        if self._socket is not None:
            self._hang_up(self._socket)
        for area in self._areas.values():
            area.close()
        self._areas.clear()

    async def end(self) -> None:
        """Close, and wait until the process is gone."""
        self.close()
        if self._child is not None:
            try:
                await asyncio.wait_for(self._child.wait(), END_TIMEOUT)
            except TimeoutError:
                await self._child.kill()

    def end_blocking(self) -> None:
        """Close, and wait for that without a loop."""
        self.close()
        if self._child is not None:
            self._child.end_blocking(END_TIMEOUT)
