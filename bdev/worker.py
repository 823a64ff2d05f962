"""The reactor's side of the registry: handles, opened and closed on its behalf."""

import asyncio
import errno
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from bdev.io import BdevIO, notice_ids
from bdev.kind import (
    Op,
    OpenContext,
    find_command,
    find_opener,
    find_task,
    load_kinds,
    make_worker_providers,
)
from reactor.errors import OperationError, check
from reactor.loop import ReactorLoop
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, Operations, operation

log = logging.getLogger(__name__)

MAX_READ = 1 << 19  # bytes; events are capped
MAX_SLOW = 256  # requests that are described at a time
_DRAIN_POLL = 0.001  # seconds between looks whether anything is in flight

# The handles of this process (``struct bdev *``) by the id of their record, for who serves them.
handles: dict[int, CData] = {}


class Node(Protocol):
    """Sends events."""

    def send(self, target: str, op: str, args: dict[str, Any] | None = None) -> None:
        """Send one that is not answered; OSError if it cannot."""


class ReactorContext(Protocol):
    """What is needed of the reactor that loads this module."""

    @property
    def loop(self) -> ReactorLoop:
        """Its event loop."""

    @property
    def presence(self) -> int:
        """The descriptor that is open as long as anything of this process can happen."""

    def send_fds(self, tag: int, fds: Sequence[int]) -> None:
        """Send descriptors to the control process."""

    @property
    def node(self) -> Node:
        """Where it sends events."""

    @property
    def operations(self) -> Operations:
        """Its table of operations."""

    def on_stop(self, fn: Callable[[], Awaitable[None]]) -> None:
        """Run ``fn`` before the reactor ends or begins anew."""


def prepare() -> None:
    """Import every kind of device before there is a reactor that waits for one."""
    load_kinds()


def setup(reactor: ReactorContext) -> None:
    """Add the operations below to a reactor process."""
    lib.uring_hold(reactor.presence)

    def tell(op: str, args: dict[str, Any]) -> None:
        try:
            reactor.node.send("control", op, args)
        except OSError as error:
            log.warning("%s %s: not reported: %s", op, args, error)

    worker, fences = BdevWorker(reactor.loop, handles, tell), FenceOperations(reactor)
    reactor.operations.add(worker, fences, *make_worker_providers())
    reactor.on_stop(worker.drain)


# What reactors share, by name: how a handle begins to use it (a descriptor and a number go with
# it), looks at it again, and ceases to use it.
_SHARES: dict[str, tuple[Callable[[CData, int, int], int], Callable[[CData], object]]] = {
    "limits": (lambda handle, fd, _: lib.bdev_set_qos(handle, fd), lib.bdev_qos_changed),
    "group": (lib.bdev_set_qos_group, lib.bdev_qos_changed),
    "ranges": (lib.bdev_set_ranges, lib.bdev_ranges_repair),
}


def set_watch(handle: CData, watch: dict[str, Any]) -> int:
    """Say how long requests may take: ``struct bdev_watch_setup``; return 0 or -errno."""
    return lib.bdev_set_watch(handle, ffi.new("struct bdev_watch_setup *", watch))


def text_of(native: CData) -> str:
    """Return a C string."""
    text = ffi.string(native)
    return text if isinstance(text, str) else text.decode()


class FenceOperations:
    """``bdev_lend_fence``."""

    def __init__(self, reactor: ReactorContext) -> None:
        self._reactor = reactor

    @operation
    def bdev_lend_fence(self, tag: int) -> None:
        """Send the descriptor that tells whether anything of this reactor can still happen."""
        fd = check(lib.file_fence(self._reactor.loop.native), "no file disk is open here")
        self._reactor.send_fds(tag, [fd])


class _Task:
    """A :class:`bdev.kind.TaskContext`."""

    def __init__(self, loop: ReactorLoop, handle: CData, others: Sequence[CData]) -> None:
        self._loop = loop
        self.handle = handle
        self.others = others

    async def ended(self, start: Callable[[int], int], what: str) -> int:
        ident = next(notice_ids)
        code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def noticed(_kind: int, status: int, _text: str) -> None:
            if not code.done():
                code.set_result(status)

        self._loop.on_notice(ident, noticed)
        try:
            check(start(ident), what)
            return await code
        finally:
            self._loop.on_notice(ident, None)


class BdevWorker:
    """``bdev_open``, ``bdev_share``, ``bdev_close`` and others, in one reactor."""

    def __init__(
        self,
        loop: ReactorLoop,
        table: dict[int, CData],
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """``tell`` sends an event to the control process."""
        self._loop = loop
        self._tell = tell
        self.handles = table
        self._drained: dict[int, asyncio.Event] = {}

    def _handle(self, ident: int) -> CData:
        try:
            return self.handles[ident]
        except KeyError:
            raise OperationError(-errno.ENODEV, f"bdev {ident} is not open here") from None

    @operation
    def bdev_open(
        self,
        id: int,  # noqa: A002
        kind: str,
        slot: int,
        args: dict[str, Any],
        fds: FileDescriptors,
        bases: Sequence[int] = (),
        shares: Sequence[tuple[str, int]] = (),
        watch: dict[str, Any] | None = None,
    ) -> bool:
        """Open a device of ``kind``; ``args`` and descriptors are the kind's own.

        ``bases`` are the ids of those that it stands on, which are open here. The last descriptors
        are those of ``shares``, what is shared by reactors, each with a number that goes with it.
        ``watch``: how long requests may take.
        """
        if id in self.handles:
            raise OperationError(-errno.EEXIST, f"bdev {id} is open here already")
        below = [self._handle(base) for base in bases]
        handle = find_opener(kind)(OpenContext(self._loop.native, id, slot, args, fds, below))
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno), f"{kind} bdev")
        try:
            if watch is not None:
                check(set_watch(handle, watch), "watch")
            for (share, number), fd in zip(reversed(shares), reversed(fds), strict=False):
                check(_SHARES[share][0](handle, fd, number), share)
        except BaseException:
            lib.bdev_close(handle)
            raise
        self.handles[id] = handle
        self._drained[id] = asyncio.Event()
        self._loop.on_notice(id, functools.partial(self._notice, id))
        return True

    def _notice(self, ident: int, kind: int, code: int, text: str) -> None:
        if kind == lib.NOTICE_DRAINED:
            self._drained[ident].set()
        elif code == -errno.ETIMEDOUT:
            self._tell("bdev_timed_out", {"id": ident, "text": text})
        else:
            log.warning("bdev %d: %s", ident, text)

    @operation
    def bdev_watch(self, id: int, watch: dict[str, Any]) -> bool:  # noqa: A002
        """Say how long requests may take: ``struct bdev_watch_setup``."""
        check(set_watch(self._handle(id), watch), "watch")
        return True

    @operation
    def bdev_slow_requests(self, id: int) -> list[dict[str, Any]]:  # noqa: A002
        """Return those over the limit: ``struct bdev_slow_request``."""
        found = ffi.new("struct bdev_slow_request[]", MAX_SLOW)
        count = lib.bdev_slow_requests(self._handle(id), found, MAX_SLOW)
        return [
            {
                "offset": one.offset,
                "length": one.length,
                "age": one.age,
                "ended": one.ended,
                "op": one.op,
                "stage": text_of(lib.bdev_stage_name(one.stage)),
                "status": one.status,
                "timed_out": one.timed_out,
            }
            for one in found[0:count]
        ]

    @operation
    def bdev_command(self, id: int, kind: str, args: dict[str, Any]) -> bool:  # noqa: A002
        """Tell a handle something that only its kind knows of."""
        find_command(kind)(self._handle(id), args)
        return True

    @operation
    async def bdev_task(
        self,
        id: int,  # noqa: A002
        kind: str,
        args: dict[str, Any],
        bases: Sequence[int] = (),
    ) -> Any:
        """Do work on a handle that only its kind knows of, and answer when it is over."""
        others = [self._handle(base) for base in bases]
        return await find_task(kind)(_Task(self._loop, self._handle(id), others), args)

    @operation
    async def bdev_read(self, id: int, offset: int, length: int) -> bytes:  # noqa: A002
        """Return bytes of a device, at most 512 KiB."""
        if not 0 <= length <= MAX_READ:
            raise OperationError(-errno.EINVAL, f"length {length}: must be 0 to {MAX_READ}")
        buffer = bytearray(length)
        io = BdevIO(self._loop.selector, self._handle(id))
        await io.start(Op.READ, offset, buffers=[buffer]).completed()
        return bytes(buffer)

    @operation
    async def bdev_write(self, id: int, offset: int, data: bytes) -> bool:  # noqa: A002
        """Write bytes to a device, durably."""
        io = BdevIO(self._loop.selector, self._handle(id))
        request = io.start(Op.WRITE, offset, buffers=[data], flags=lib.BDEV_IO_FUA)
        await request.completed()
        return True

    @operation
    def bdev_share(
        self,
        id: int,  # noqa: A002
        share: str,
        number: int,
        fds: FileDescriptors,
    ) -> bool:
        """Have a handle use what is behind a descriptor."""
        check(_SHARES[share][0](self._handle(id), fds[0], number), share)
        return True

    @operation
    def bdev_unshare(self, id: int, share: str) -> bool:  # noqa: A002
        """Have a handle use it no more."""
        check(_SHARES[share][0](self._handle(id), -1, 0), share)
        return True

    @operation
    def bdev_share_changed(self, id: int, share: str) -> bool:  # noqa: A002
        """Have a handle look at what is shared again."""
        _SHARES[share][1](self._handle(id))
        return True

    @operation
    def bdev_resize(self, id: int, num_blocks: int) -> bool:  # noqa: A002
        """Let requests reach up to another size."""
        check(lib.bdev_set_blocks(self._handle(id), num_blocks), "resize")
        return True

    @operation
    async def bdev_remove(self, id: int, timeout: float) -> bool:  # noqa: A002
        """Fail new requests and wait for those in flight; -110 if that takes over ``timeout`` s."""
        handle = self._handle(id)
        lib.bdev_remove(handle)
        try:
            await asyncio.wait_for(self._drained[id].wait(), timeout)
        except TimeoutError:
            count = lib.bdev_in_flight(handle)
            raise OperationError(
                -errno.ETIMEDOUT, f"{count} requests are in flight after {timeout:g} s"
            ) from None
        return True

    @operation
    def bdev_close(self, id: int) -> bool:  # noqa: A002
        """Close a handle; -16 while requests are in flight."""
        check(lib.bdev_close(self._handle(id)), "requests are in flight")
        del self.handles[id], self._drained[id]
        self._loop.on_notice(id, None)
        return True

    async def drain(self) -> None:
        """Close every handle, those that stand on others first, once nothing of it is in flight."""
        for ident in reversed(list(self.handles)):
            while lib.bdev_in_flight(self.handles[ident]):  # noqa: ASYNC110 - C gives no event
                await asyncio.sleep(_DRAIN_POLL)
            self.bdev_close(ident)
