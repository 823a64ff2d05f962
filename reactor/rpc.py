"""JSON-RPC 2.0 on a Unix socket, over a process's table of operations.

Whoever can open the socket may do anything: the socket's mode (0600, set before it has a name) and
its directory are the whole of the access control, as with SPDK's.

What a client can count on:

* Requests need no separator and may be pipelined; they run concurrently and are answered in any
  order.
* A batch runs one request after the other, so that a later one may rely on an earlier one, and is
  answered with one array in the order of the requests (section 6 leaves both to the server).
* A request that was read is carried out even if its client has gone.
* Text that is not JSON is answered with -32700, and then the connection is closed: where the next
  request would begin cannot be known.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Mapping
from typing import Any

import msgspec

from reactor.errors import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    OperationError,
    to_operation_error,
)
from reactor.jsonstream import JsonSplitter
from reactor.lockfile import InUse, LockFile
from reactor.operations import Operations

log = logging.getLogger(__name__)

MAX_REQUEST = 16 << 20  # bytes of one request or batch
MAX_PENDING = 64  # requests or batches of one connection that are not answered yet
PATH_MAX = 107  # bytes, unix(7): sun_path without its terminator
CLOSE_GRACE = 5.0  # seconds
_READ_SIZE = 64 << 10
_BACKLOG = 128
_MEMBERS = frozenset({"jsonrpc", "method", "params", "id"})


class RpcServer:
    """The server: :meth:`bind`, then :meth:`start`, at last :meth:`close`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        operations: Operations,
        *,
        max_request: int = MAX_REQUEST,
        max_pending: int = MAX_PENDING,
        given: socket.socket | None = None,
    ) -> None:
        """``given`` listens already, and ``path`` is where; the name is not ours to remove."""
        self.path = os.fspath(path)
        self._given = given
        self._operations = operations
        self._max_request = max_request
        self._max_pending = max_pending
        self._lock: LockFile | None = None
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    def bind(self) -> None:
        """Take the path: clients can connect from now on, and are served after :meth:`start`.

        A socket that nobody listens on is replaced. Raises InUse if somebody does or if the path is
        something else, and OSError if the socket cannot be made; nothing is left behind then.
        """
        if self._given is not None:
            self._socket = self._given.dup()
            return
        if len(os.fsencode(self.path)) > PATH_MAX:
            raise OSError(
                errno.ENAMETOOLONG, f"a socket path has at most {PATH_MAX} bytes", self.path
            )
        lock = LockFile(f"{self.path}.lock", f"RPC socket {self.path}")
        try:
            _remove_stale(self.path)
            self._socket = _listen(self.path)
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    async def start(self) -> None:
        """Serve those who have connected, and those who will."""
        if self._socket is None:
            self.bind()
        self._server = await asyncio.start_unix_server(
            self._accept, sock=self._socket, limit=_READ_SIZE
        )

    async def close(self, grace: float = CLOSE_GRACE) -> None:
        """Accept and read no more, send the replies that are due, and remove the socket.

        Requests still running and replies not taken after ``grace`` seconds are dropped.
        """
        if self._socket is not None:
            # Its name goes first: who finds no socket knows at once that nobody is there.
            if self._given is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
            if self._server is not None:
                self._server.close()
            self._socket.close()
            self._socket = None
        for connection in self._connections.values():
            connection.stop_reading()
        if self._connections:
            _, late = await asyncio.wait(set(self._connections), timeout=grace)
            for task in late:
                self._connections[task].abort()
                task.cancel()
            if late:
                await asyncio.wait(late)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(
            self._operations, reader, writer, self._max_request, self._max_pending
        )
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection
        try:
            await connection.run()
        except asyncio.CancelledError:
            # Only close() cancels, and it waits for the task, not for its outcome; asyncio's own
            # callback would report a cancelled handler as an error.
            pass
        finally:
            connection.abort()
            del self._connections[task]


class _Connection:
    """One client: reads requests as long as it may have more pending, and sends the replies."""

    def __init__(
        self,
        operations: Operations,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        max_request: int,
        max_pending: int,
    ) -> None:
        self._operations = operations
        self._reader = reader
        self._writer = writer
        self._splitter = JsonSplitter(max_request)
        self._slots = asyncio.Semaphore(max_pending)
        self._writing = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._reading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until the client closes, sends what is not JSON, or :meth:`stop_reading`."""
        self._reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait({self._reading})
            # A client that shut down its sending side may still want the replies.
            if self._running:
                await asyncio.wait(self._running)
            with contextlib.suppress(OSError):
                self._writer.close()
                await self._writer.wait_closed()
        finally:
            for task in (self._reading, *self._running):
                task.cancel()

    def stop_reading(self) -> None:
        """Let the requests that were read be the last."""
        if self._reading is not None:
            self._reading.cancel()

    def abort(self) -> None:
        """Drop the connection with whatever it has not taken."""
        self._writer.transport.abort()

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(_READ_SIZE):
                for text in self._splitter.feed(data):
                    await self._begin(text)
            for text in self._splitter.finish():
                await self._begin(text)
        except (ValueError, msgspec.DecodeError) as error:  # JsonStreamError is a ValueError
            await self._send(_failure(None, OperationError(PARSE_ERROR, f"Parse error: {error}")))
        except OSError as error:
            log.debug("rpc: connection lost: %s", error)

    async def _begin(self, text: bytes) -> None:
        """Start to answer one text, once there are few enough of them."""
        request = msgspec.json.decode(text)
        await self._slots.acquire()
        task = asyncio.create_task(self._answer(request))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._slots.release()
        if not task.cancelled() and (error := task.exception()):
            log.error("rpc: a reply was lost", exc_info=error)

    async def _answer(self, request: Any) -> None:
        if not isinstance(request, list):
            reply = await answer(self._operations, request)
            await self._kept([request])
            await self._send(reply)
        elif not request:
            empty = OperationError(INVALID_REQUEST, "Invalid request: the batch is empty")
            await self._send(_failure(None, empty))
        else:
            replies = [await answer(self._operations, one) for one in request]
            await self._kept(request)
            expected = [reply for reply in replies if reply is not None]
            await self._send(b"[" + b",".join(expected) + b"]" if expected else None)

    async def _kept(self, requests: list[Any]) -> None:
        """Return when all that they have changed is kept; the first waits for the others', too."""
        for request in requests:
            if isinstance(request, dict) and isinstance(method := request.get("method"), str):
                await self._operations.kept(method)

    async def _send(self, reply: bytes | None) -> None:
        """Send, no faster than the client reads; a client that has gone misses its reply."""
        if reply is None:
            return
        try:
            async with self._writing:
                if self._writer.is_closing():
                    raise ConnectionResetError("the client has gone")
                self._writer.write(reply + b"\n")
                await self._writer.drain()
        except OSError as error:
            log.debug("rpc: a reply has nobody to read it: %s", error)


async def answer(operations: Operations, request: Any) -> bytes | None:
    """Carry out one decoded request and return its encoded reply, None for a notification."""
    try:
        method, params, identifier = _validate(request)
    except OperationError as error:
        return _failure(None, error)
    notification = "id" not in request
    try:
        if not isinstance(params, dict):
            raise OperationError(
                INVALID_PARAMS, f"{method}: params must be an object, by name, not an array"
            )
        result = await operations.invoke(method, params, internal=False)
        return None if notification else _success(identifier, result)
    except Exception as error:
        refusal = to_operation_error(error)
        if refusal.code == INTERNAL_ERROR and not isinstance(error, OperationError):
            log.exception("rpc: %s failed", method)
        return None if notification else _failure(identifier, refusal)


def _validate(request: Any) -> tuple[str, Any, Any]:
    """Return method, params and id of a request object (JSON-RPC 2.0, section 4)."""

    def refuse(reason: str) -> OperationError:
        return OperationError(INVALID_REQUEST, f"Invalid request: {reason}")

    if not isinstance(request, Mapping):
        raise refuse(f"expected an object, got {_kind(request)}")
    if unknown := request.keys() - _MEMBERS:
        raise refuse(f"unknown member {min(unknown)!r:.100}")
    if request.get("jsonrpc", "2.0") != "2.0":
        raise refuse(f'jsonrpc must be "2.0", not {request["jsonrpc"]!r:.100}')
    method, identifier = request.get("method"), request.get("id")
    if not isinstance(method, str):
        raise refuse("method is missing" if method is None else "method must be a string")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | float | None):
        raise refuse(f"id must be a string, a number or null, not {_kind(identifier)}")
    params = request.get("params")
    if not isinstance(params, dict | list | None):
        raise refuse(f"params must be an object, not {_kind(params)}")
    return method, {} if params is None else params, identifier


def _kind(value: Any) -> str:
    """Return what JSON calls the type of ``value``."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _success(identifier: Any, result: Any) -> bytes:
    return _encode({"jsonrpc": "2.0", "id": identifier, "result": msgspec.to_builtins(result)})


def _failure(identifier: Any, error: OperationError) -> bytes:
    wire = msgspec.to_builtins(error.to_wire())
    return _encode({"jsonrpc": "2.0", "id": identifier, "error": wire})


def _encode(reply: dict[str, Any]) -> bytes:
    # ASCII only: SPDK's client decodes each piece it receives by itself, and loses a character that
    # two pieces share. That is also why msgspec's encoder, which writes UTF-8, is not used.
    return json.dumps(reply, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _remove_stale(path: str) -> None:
    """Remove the socket that a dead server left at ``path``; raise InUse if it lives."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InUse(f"{path} exists and is not a socket; remove it or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise InUse(f"RPC socket {path} is in use: a server listens on it")


def _listen(path: str) -> socket.socket:
    """Return a socket that listens at ``path`` and that only its owner can connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the name gets the mode of the socket's inode: it never has another mode.
        os.fchmod(listener.fileno(), 0o600)
        try:
            listener.bind(path)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
        listener.setblocking(False)
        try:
            listener.listen(_BACKLOG)
        except OSError:
            os.unlink(path)
            raise
    except BaseException:
        listener.close()
        raise
    return listener
