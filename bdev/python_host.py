"""The process that a Python device lives in: ``python -m bdev.python_host --channel FD``.

The control process creates the device and attaches reactors by messages on the channel, a
SOCK_SEQPACKET socket: msgpack ``{"id", "op", "args"}`` with descriptors, answered by ``{"id",
"result"}`` or ``{"id", "error"}``. Requests come through memory shared with each reactor
(bdev/python.h). When the channel ends, so does the process.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import contextlib
import errno
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from bdev.device import Device, call, find_device
from bdev.kind import Op
from reactor.errors import OperationError, to_operation_error
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, Operations, operation

MAX_MESSAGE = 1 << 16  # bytes; most of one are the arguments of a device
MAX_FDS = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_END_TIMEOUT = 1.0  # seconds that a device has for close()

log = logging.getLogger(__name__)


class Server:
    """The device, as requests see it: answers each with 0 or -errno."""

    def __init__(self, device: Device, timeout: float) -> None:
        self.device = device
        self._timeout = timeout
        self._failures = 0

    async def serve(self, request: CData, data: memoryview) -> int:
        """Carry a request out; ``data`` is what is written, or where to put what is read."""
        op = Op(request.op)
        try:
            async with asyncio.timeout(self._timeout):
                await self._carry_out(op, request, data)
        except Exception as error:
            return -self._explain(op, request, error)
        return 0

    async def _carry_out(self, op: Op, request: CData, data: memoryview) -> None:
        device, offset, length = self.device, request.offset, request.length
        if op is Op.READ:
            answer = memoryview(await call(device.read, offset, length)).cast("B")
            if len(answer) != length:
                raise ValueError(f"read() returned {len(answer)} bytes, not {length}")
            data[:length] = answer
        elif op is Op.WRITE:
            await call(device.write, offset, bytes(data[:length]))
            if request.flags & lib.BDEV_IO_FUA:
                await call(device.flush)
        elif op is Op.FLUSH:
            await call(device.flush)
        elif op is Op.UNMAP:
            await call(device.discard, offset, length)
        else:
            await call(device.write_zeroes, offset, length)

    def _explain(self, op: Op, request: CData, error: Exception) -> int:
        """Log the first failure and then ever fewer of them; return its errno."""
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            what = f"{op.name} of {request.length} bytes at {request.offset}"
            if isinstance(error, TimeoutError):
                log.error("%s took over %g s and was cancelled", what, self._timeout)
            else:
                log.error("%s failed (failure %d)", what, self._failures, exc_info=error)
        if isinstance(error, TimeoutError):
            return errno.ETIMEDOUT
        if isinstance(error, OSError) and error.errno and 0 < error.errno < 4096:
            return error.errno
        return errno.EIO


class Attached:
    """One reactor's area: takes requests out of it, and puts the answers back."""

    def __init__(self, server: Server, fds: FileDescriptors) -> None:
        self._server = server
        self._area = lib.python_area_map(fds[0])
        if self._area == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno), "memory of requests")
        self._ask_fd, self._answer_fd = fds.take(1), fds.take(2)
        self._request = ffi.new("struct python_request *")
        self._tasks: set[asyncio.Task[None]] = set()
        asyncio.get_running_loop().add_reader(self._ask_fd, self._asked)
        self._take()
        os.eventfd_write(self._answer_fd, 1)  # what a predecessor may not have told

    def _asked(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._ask_fd)
        self._take()

    def _take(self) -> None:
        while (slot := lib.python_area_take(self._area, self._request)) >= 0:
            copy = ffi.new("struct python_request *", self._request[0])
            task = asyncio.create_task(self._serve(slot, copy))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, slot: int, request: CData) -> None:
        view = ffi.buffer(lib.python_area_data(self._area, slot), lib.PYTHON_PIECE)
        status = -errno.ECANCELED
        try:
            status = await self._server.serve(request, memoryview(view))
        finally:
            lib.python_area_answer(self._area, slot, status)
            os.eventfd_write(self._answer_fd, 1)

    async def close(self) -> None:
        """Cancel what is under way, wait for its end, and let go of the area."""
        asyncio.get_running_loop().remove_reader(self._ask_fd)
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        lib.python_area_unmap(self._area)
        os.close(self._ask_fd)
        os.close(self._answer_fd)


def describe(device: Device) -> dict[str, Any]:
    """Return what the control process has to know of a device; TypeError if it is none."""
    cls = type(device)
    size, block_size = getattr(device, "size", None), device.block_size
    if not isinstance(size, int) or not isinstance(block_size, int) or block_size < 1:
        raise TypeError(f"{cls.__name__}: size and block_size must be numbers of bytes")
    if cls.read is Device.read:
        raise TypeError(f"{cls.__name__}: has no method read")
    return {
        "num_blocks": size // block_size,
        "block_size": block_size,
        "readonly": device.readonly or cls.write is Device.write,
        "discard": cls.discard is not Device.discard,
    }


class Host:
    """The operations that the control process asks for."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self._attached: dict[int, Attached] = {}

    @operation
    def create(self, device: str, args: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Make the device and return what it is like."""
        try:
            made = find_device(device)(**args)
            described = describe(made)
        except Exception as error:
            if not isinstance(error, LookupError):
                log.error("device %s cannot be made", device, exc_info=error)
            raise OperationError(-errno.EINVAL, _reason(error)) from None
        self.server = Server(made, timeout)
        return described

    @operation
    def describe(self) -> dict[str, Any]:
        """Return what the device is like now."""
        assert self.server is not None
        return describe(self.server.device)

    @operation
    def attach(self, channel: int, fds: FileDescriptors) -> bool:
        """Serve the requests of one more reactor."""
        assert self.server is not None
        self._attached[channel] = Attached(self.server, fds)
        return True

    @operation
    async def detach(self, channel: int) -> bool:
        """Serve a reactor no more; nothing that it asked for happens after this."""
        attached = self._attached.pop(channel, None)
        if attached is not None:
            await attached.close()
        return True

    @operation
    def ping(self) -> bool:
        """Show that the loop turns."""
        return True

    async def end(self) -> None:
        """Finish with the device."""
        for channel in list(self._attached):
            await self.detach(channel)
        if self.server is not None:
            await call(self.server.device.close)


def _reason(error: Exception) -> str:
    if isinstance(error, LookupError) and error.args:
        return str(error.args[0])
    return f"{type(error).__name__}: {error}"


class Channel:
    """Answers the control process; ``closed`` is set when it is gone."""

    def __init__(self, sock: socket.socket, operations: Operations) -> None:
        self.closed = asyncio.Event()
        self._socket = sock
        self._operations = operations
        self._tasks: set[asyncio.Task[None]] = set()
        asyncio.get_running_loop().add_reader(sock, self._receive)

    def _receive(self) -> None:
        room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            data, ancillary = b"", []
        fds = FileDescriptors(array.array("i", b"".join(raw for _, _, raw in ancillary)))
        if not data:
            asyncio.get_running_loop().remove_reader(self._socket)
            self.closed.set()
            return
        task = asyncio.create_task(self._answer(msgspec.msgpack.decode(data), fds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: dict[str, Any], fds: FileDescriptors) -> None:
        answer: dict[str, Any] = {"id": message["id"]}
        try:
            args = message["args"]
            answer["result"] = await self._operations.invoke(message["op"], args, fds or None)
        except Exception as error:
            answer["error"] = to_operation_error(error).to_wire()
        with contextlib.suppress(OSError):  # it is gone, which is noticed elsewhere
            self._socket.send(msgspec.msgpack.encode(answer))


async def serve(sock: socket.socket) -> None:
    """Serve until the control process closes the channel."""
    host = Host()
    operations = Operations()
    operations.add(host)
    channel = Channel(sock, operations)
    await channel.closed.wait()
    signal.alarm(round(2 * _END_TIMEOUT))  # a device that blocks ends by that
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_TIMEOUT):
            await host.end()


def main(arguments: Sequence[str]) -> int:
    """Run the process; return its exit status."""
    parser = argparse.ArgumentParser(prog="bdev.python_host", description="One Python device.")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the channel")
    parser.add_argument("--name", required=True, help="of the bdev")
    parser.add_argument("--load", action="append", default=[], metavar="MODULE")
    options = parser.parse_args(arguments)
    os.set_inheritable(options.channel, False)
    import ctypes  # not where reactors import this module with all others

    # A device that blocks does not notice that the control process has died.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    form = f"%(asctime)s %(levelname)-7s bdev {options.name.replace('%', '%%')}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    sock = socket.socket(fileno=options.channel)
    sock.setblocking(False)
    for module in options.load:
        importlib.import_module(module)
    asyncio.run(serve(sock))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
