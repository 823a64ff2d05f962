"""Handles: which reactors have a device open, and for how many users.

A handle is opened with its first user, after those of the bases, and closed with its last.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from bdev.claims import claim, release, release_bases
from bdev.kind import Bdev, Watch
from bdev.stacked import check_addition
from reactor.errors import OperationError
from reactor.interfaces import Caller, Reactor

CLOSE_RETRY = 0.01  # seconds until a handle that is still in use is closed again
CALL_MARGIN = 5.0  # seconds more than an operation may take, for the answer

Callback = Callable[[Bdev], Awaitable[None]]


class Handle:
    """One reactor's handle on one record."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.lock = asyncio.Lock()  # opening, closing, and whatever else talks to the reactor
        self.references = 0
        self.open = False
        self.lost = False  # the reactor went away, and the handle with it
        self.claimed = False  # the bases, by this handle
        self.bases: list[tuple[Entry, Handle]] = []  # of the same reactor, one user of which we are


class Entry:
    """A record and its handles."""

    def __init__(self, bdev: Bdev) -> None:
        self.bdev = bdev
        self.handles: dict[str, Handle] = {}
        self.on_removed: list[Callback] = []
        self.on_resized: list[Callback] = []
        self.doomed = False  # being removed: nobody finds or opens it
        self.removing = False  # ... at this moment
        self.removed = False  # only the handles that somebody keeps are left


async def _nothing(_reactor: Any) -> None:
    pass


def _is_gone(handle: Handle, error: BaseException) -> bool:
    """Whether a call failed because its reactor died: the handle went with it."""
    return handle.lost or (isinstance(error, OperationError) and error.code == -errno.ECONNRESET)


class Handles:
    """The handles of every device in ``entries``; ``forgotten`` is told of the last one's end."""

    def __init__(
        self, cluster: Caller, entries: dict[int, Entry], forgotten: Callable[[Entry], None]
    ) -> None:
        self._cluster = cluster
        self._entries = entries
        self._forgotten = forgotten

    async def open(self, bdev: Bdev, reactor: Reactor) -> None:
        """Make sure that ``reactor`` has a handle, and count one more user of it.

        OperationError(-19) if the device has been removed; or what opening it failed with, and then
        nothing is counted.
        """
        await self._open(bdev, reactor)

    @contextlib.asynccontextmanager
    async def using(self, bdev: Bdev, reactor: Reactor) -> AsyncIterator[None]:
        """Be a user of the handle that ``reactor`` has now, or opens; not of a later one."""
        entry, handle = await self._open(bdev, reactor)
        try:
            yield
        finally:
            await self._close(entry, handle)

    async def _open(self, bdev: Bdev, reactor: Reactor) -> tuple[Entry, Handle]:
        entry = self._entries.get(bdev.id)
        while True:
            if entry is None or entry.doomed:
                raise OperationError(-errno.ENODEV, f"bdev {bdev.name} has been removed")
            handle = entry.handles.get(reactor.name)
            if handle is None:
                handle = entry.handles[reactor.name] = Handle(reactor)
            async with handle.lock:
                if handle.lost or entry.doomed:
                    continue  # meanwhile
                if not handle.open:
                    await self._open_handle(entry, handle)
                handle.references += 1
                return entry, handle

    async def _open_handle(self, entry: Entry, handle: Handle) -> None:
        bdev = entry.bdev
        try:
            if bdev.automatic:
                self.claim_bases(bdev)
                handle.claimed = True
            for base in bdev.bases:
                handle.bases.append(await self._open(base, handle.reactor))
            await self._lend(bdev, handle.reactor)
        except BaseException:
            self._forget(entry, handle)
            await self._close_bases(handle)
            raise
        handle.open = True
        await bdev.opened(self._cluster, handle.reactor)

    async def _lend(self, bdev: Bdev, reactor: Reactor) -> None:
        """Have a reactor open a device with what it lends; what fails is taken back."""
        lent, fds = await bdev.lend(reactor)
        args = {"id": bdev.id, "kind": bdev.kind, "slot": bdev.slot, "args": lent}
        if bdev.bases:
            args["bases"] = [base.id for base in bdev.bases]
        if bdev.shares:
            args["shares"] = [[name, self._number(reactor, name, bdev)] for name in bdev.shares]
            fds = [*fds, *(fd for fd, _ in bdev.shares.values())]
        if bdev.watch != Watch():
            args["watch"] = dataclasses.asdict(bdev.watch)
        try:
            await self._cluster.call(reactor, "bdev_open", args, fds=fds)
        except BaseException:
            await bdev.take_back(reactor)
            raise

    async def close(self, bdev: Bdev, reactor: Reactor) -> None:
        """Count one user less; the last one closes the handle. Not open: nothing happens.

        OperationError(-16) if requests are in flight: the handle stays, to be closed again.
        """
        entry = self._entries.get(bdev.id)
        handle = entry.handles.get(reactor.name) if entry else None
        if entry is not None and handle is not None:
            await self._close(entry, handle)

    async def _close(self, entry: Entry, handle: Handle) -> None:
        async with handle.lock:
            if handle.lost:
                return
            handle.references = max(0, handle.references - 1)
            if handle.references > 0:
                return
            try:
                await self._cluster.call(handle.reactor, "bdev_close", {"id": entry.bdev.id})
            except OperationError as error:
                if not _is_gone(handle, error):
                    raise
            else:
                entry.bdev.closed(handle.reactor)
            self._forget(entry, handle)
            await entry.bdev.take_back(handle.reactor)
            await self._close_bases(handle)

    async def _close_bases(self, handle: Handle) -> None:
        """Be a user of the bases no more, the last one first; nothing if the reactor is gone."""
        while handle.bases:
            await self._close(*handle.bases.pop())

    def _forget(self, entry: Entry, handle: Handle) -> None:
        handle.lost = True
        handle.open = False
        if handle.claimed:
            handle.claimed = False
            release_bases(entry.bdev)
        if entry.handles.get(handle.reactor.name) is handle:
            del entry.handles[handle.reactor.name]
        if entry.removed and not entry.handles:
            self._forgotten(entry)

    async def reactor_lost(self, reactor: Reactor) -> None:
        """Forget the handles of a reactor that has died; its users open them again.

        Returns when nothing that it had begun can still happen to any device.
        """
        affected = []
        for entry in list(self._entries.values()):
            handle = entry.handles.get(reactor.name)
            if handle is not None:
                if handle.open:
                    affected.append(entry)
                self._forget(entry, handle)
        await asyncio.gather(*(entry.bdev.fence(reactor) for entry in affected))
        for entry in affected:
            if not entry.removed:
                await entry.bdev.recovered(reactor)
        for entry in list(self._entries.values()):
            if entry.bdev.ranges is not None and entry.bdev.ranges.owner_gone(reactor.number):
                args = {"id": entry.bdev.id, "share": "ranges"}
                await self.call_all(entry, "bdev_share_changed", args)

    async def drain(self, entry: Entry, limit: float) -> None:
        """Have every reactor fail new requests and wait for the others."""
        handles = list(entry.handles.values())
        results = await asyncio.gather(
            *(self._drain_handle(entry, handle, limit) for handle in handles),
            return_exceptions=True,
        )
        for handle, result in zip(handles, results, strict=True):
            if isinstance(result, BaseException) and not _is_gone(handle, result):
                raise result

    async def _drain_handle(self, entry: Entry, handle: Handle, limit: float) -> None:
        async with handle.lock:
            if handle.open:
                await self._cluster.call(
                    handle.reactor,
                    "bdev_remove",
                    {"id": entry.bdev.id, "timeout": limit},
                    timeout=limit + CALL_MARGIN,
                )

    def claim_bases(self, bdev: Bdev) -> None:
        """Claim what a device stands on, or nothing; read-only devices share a read-only base."""
        claimed: list[Bdev] = []
        try:
            for base in bdev.bases:
                self._claim_base(bdev, base)
                claimed.append(base)
        except BaseException:
            for base in claimed:
                release(base, bdev.owner)
            raise

    def _number(self, reactor: Reactor, share: str, bdev: Bdev) -> int:
        number = bdev.shares[share][1]
        return reactor.number if number is None else number

    def _claim_base(self, bdev: Bdev, base: Bdev) -> None:
        below = self._entries.get(base.id)
        if below is None or below.doomed:
            raise OperationError(-errno.ENODEV, f"bdev {base.name} has been removed")
        if below.on_removed and not base.readonly:
            raise OperationError(
                -errno.EBUSY, f"bdev {base.name} is in use: a controller serves it"
            )
        claim(base, bdev.owner, shared=base.readonly)

    async def add_base(
        self, bdev: Bdev, base: Bdev, attach: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Have ``bdev`` stand on one more, in every reactor that has it open.

        There ``base`` is opened, then ``attach(reactor)`` awaited. OperationError if one fails, or
        if that cannot be a stack, and then it is as before, but for what ``attach`` did.
        """
        check_addition(bdev, base, [entry.bdev for entry in self._entries.values()])
        self._claim_base(bdev, base)
        entry = self._entries[bdev.id]
        bdev.bases = (*bdev.bases, base)  # reactors that open it from now on have it
        try:
            for handle in list(entry.handles.values()):
                async with handle.lock:
                    if handle.open and not any(below.bdev is base for below, _ in handle.bases):
                        handle.bases.append(await self._open(base, handle.reactor))
                        await self._unless_gone(handle, attach(handle.reactor))
        except BaseException:
            await self.drop_base(bdev, base, _nothing)
            raise

    async def drop_base(
        self, bdev: Bdev, base: Bdev, detach: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Have ``bdev`` stand on ``base`` no more, after ``detach(reactor)`` where it is open.

        Returns when nothing that it had begun there is under way, and ``base`` is nobody's.
        """
        entry = self._entries[bdev.id]
        bdev.bases = tuple(one for one in bdev.bases if one is not base)
        left: list[tuple[Entry, Handle]] = []
        try:
            for handle in list(entry.handles.values()):
                async with handle.lock:
                    if handle.open:
                        await self._unless_gone(handle, detach(handle.reactor))
                    left += [pair for pair in handle.bases if pair[0].bdev is base]
                    handle.bases = [pair for pair in handle.bases if pair[0].bdev is not base]
            for below, handle in left:
                await self._close_when_over(below, handle)
        finally:
            release(base, bdev.owner)

    async def _close_when_over(self, entry: Entry, handle: Handle) -> None:
        """Be a user of a handle no more, once nothing is in flight there."""
        while True:
            try:
                await self._close(entry, handle)
            except OperationError as error:
                if error.code != -errno.EBUSY:
                    raise
                await asyncio.sleep(CLOSE_RETRY)
            else:
                return

    async def _unless_gone(self, handle: Handle, call: Awaitable[Any]) -> Any:
        """Await ``call``; None if the reactor dies: the handle goes with it, and all is well."""
        try:
            return await call
        except OperationError as error:
            if not _is_gone(handle, error):
                raise
            return None

    async def share(self, entry: Entry, share: str) -> None:
        """Have every open handle of a device use one of its ``shares`` from now on."""
        fd = entry.bdev.shares[share][0]
        for handle in list(entry.handles.values()):
            async with handle.lock:
                if handle.open:
                    number = self._number(handle.reactor, share, entry.bdev)
                    args = {"id": entry.bdev.id, "share": share, "number": number}
                    await self._tell(handle, "bdev_share", args, [fd])

    async def _tell(self, handle: Handle, op: str, args: dict[str, Any], fds: Sequence[int]) -> Any:
        """Run an operation for a handle; None if that goes away with its reactor meanwhile."""
        call = self._cluster.call(handle.reactor, op, args, fds=fds)
        return await self._unless_gone(handle, call)

    async def call_all(
        self, entry: Entry, op: str, args: dict[str, Any], fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Run an operation in every reactor that has the device open; return their answers."""
        answers = {}
        for handle in list(entry.handles.values()):
            async with handle.lock:
                if handle.open:
                    answers[handle.reactor.name] = await self._tell(handle, op, args, fds)
        return answers
