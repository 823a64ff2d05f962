"""Requests from Python to an open bdev: a few blocks at a time, outside the data path of a queue.

``BdevIO`` is for a process that runs a poll loop: call ``read()``, ``write()`` ... which poll until
the request has completed, or ``await start(...).completed()`` inside the loop.
"""

import asyncio
import errno
import itertools
import os
import time
from collections.abc import Sequence
from typing import TypeAlias

from bdev.kind import Op
from reactor.loop import PollSelector
from reactor.native import CData, ffi, lib

Buffer: TypeAlias = bytes | bytearray | memoryview

# Sources of notices: far from the numbers that the control process gives to its objects.
notice_ids = itertools.count(1 << 63)


def _view(buffer: Buffer, *, writable: bool) -> CData:
    """Return the buffer's memory, which stays where it is until the view is released."""
    if writable:
        return ffi.from_buffer("char[]", buffer, require_writable=True)
    return ffi.from_buffer("char[]", buffer)


class Request:
    """One submitted request. It keeps its buffers; call :meth:`finish` to get its result."""

    def __init__(
        self,
        selector: PollSelector,
        handle: CData,
        op: Op,
        offset: int,
        length: int,
        buffers: Sequence[Buffer],
        flags: int,
        source: int = 0,
        token: tuple[int, int] = (0, 0),
    ) -> None:
        self.op = op
        self.miscompare: int | None = None  # of a comparison that failed: where
        self._selector = selector
        self._future: asyncio.Future[None] | None = None
        self._views = [_view(buffer, writable=op is Op.READ) for buffer in buffers]
        array = ffi.new("struct bdev_buffer[]", [(view, len(view)) for view in self._views])
        self._id = next(notice_ids)
        setup = ffi.new(
            "struct bdev_request_setup *",
            (self._id, op, flags, offset, length, array, len(self._views), source, token),
        )
        selector.notice_handlers[self._id] = self._noticed
        self._native: CData | None = lib.bdev_request_start(handle, setup)
        if self._native == ffi.NULL:
            del selector.notice_handlers[self._id]
            raise MemoryError("no memory for a request")

    @property
    def done(self) -> bool:
        """Whether it has completed."""
        return self._native is None or lib.bdev_request_done(self._native)

    def _noticed(self, kind: int, code: int, text: str) -> None:  # noqa: ARG002
        self._selector.notice_handlers.pop(self._id, None)
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def abort(self) -> bool:
        """Ask for its end: it fails with ECANCELED. False: the device cannot take it back."""
        return self._native is not None and lib.bdev_request_abort(self._native) == 0

    def finish(self, timeout: float = 30.0) -> None:
        """Poll until it has completed; OSError if it failed, or after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not self.done:
            left = deadline - time.monotonic()
            if left <= 0:
                raise OSError(errno.ETIMEDOUT, f"{self.op.name}: not completed in {timeout} s")
            self._selector.select(left)
        self._release()

    async def completed(self) -> None:
        """Wait, in the event loop, until it has completed; OSError if it failed."""
        if not self.done:
            self._future = asyncio.get_running_loop().create_future()
            await self._future
        self._release()

    def _release(self) -> None:
        """Free what C and Python hold, and raise what the request failed with."""
        if self._native is None:
            return
        native, self._native = self._native, None
        status = lib.bdev_request_status(native)
        if status == -errno.EILSEQ:
            self.miscompare = int(lib.bdev_request_miscompare(native))
        lib.bdev_request_free(native)
        for view in self._views:
            ffi.release(view)
        self._views.clear()
        if status < 0:
            raise OSError(-status, os.strerror(-status), self.op.name)


class BdevIO:
    """Requests to the open bdev ``handle`` of the reactor behind ``selector``."""

    def __init__(self, selector: PollSelector, handle: CData) -> None:
        self.selector = selector
        self.handle = handle

    def start(
        self,
        op: Op,
        offset: int = 0,
        length: int = 0,
        buffers: Sequence[Buffer] = (),
        flags: int = 0,
        *,
        source: int = 0,
        token: tuple[int, int] = (0, 0),
    ) -> Request:
        """Submit a request: READ and WRITE move ``buffers``, others concern ``length`` bytes.

        COMPARE looks at ``buffers``; so does COMPARE_AND_WRITE at the first half of them, and
        writes the second.
        """
        return Request(
            self.selector, self.handle, op, offset, length, buffers, flags, source, token
        )

    def read_into(self, offset: int, *buffers: Buffer) -> None:
        """Read into writable buffers, one after another."""
        self.start(Op.READ, offset, buffers=buffers).finish()

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def write(self, offset: int, *buffers: Buffer, fua: bool = False) -> None:
        """Write buffers, one after another; with ``fua`` they are durable on return."""
        flags = lib.BDEV_IO_FUA if fua else 0
        self.start(Op.WRITE, offset, buffers=buffers, flags=flags).finish()

    def flush(self) -> None:
        """Make all that was written durable."""
        self.start(Op.FLUSH).finish()

    def unmap(self, offset: int, length: int) -> None:
        """Give a range back: it may read as anything afterwards."""
        self.start(Op.UNMAP, offset, length).finish()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeroes; with ``unmap`` its space may be given back."""
        flags = lib.BDEV_IO_UNMAP if unmap else 0
        self.start(Op.WRITE_ZEROES, offset, length, flags=flags).finish()

    def compare(self, offset: int, *buffers: Buffer) -> None:
        """Compare with what is there; OSError(EILSEQ) if it is something else."""
        self.start(Op.COMPARE, offset, buffers=buffers).finish()

    def compare_and_write(self, offset: int, expected: Buffer, data: Buffer) -> None:
        """Write ``data`` if ``expected`` is there, as one; else OSError(EILSEQ)."""
        self.start(Op.COMPARE_AND_WRITE, offset, buffers=[expected, data]).finish()

    def copy(self, source: int, offset: int, length: int) -> None:
        """Copy a range of the device to another one; they may overlap."""
        self.start(Op.COPY, offset, length, source=source).finish()

    def reset(self) -> None:
        """Wait for everything that was submitted before."""
        self.start(Op.RESET).finish()
