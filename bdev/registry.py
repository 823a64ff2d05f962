"""The block devices of the cluster: who they are, and which reactors have them open.

A *record* (:class:`bdev.kind.Bdev`) belongs to the control process. A *handle* is one reactor's way
to the device; handles are counted by their users, opened with the first and closed with the last.
When a record is removed its handles stay, as long as their users want, and fail every request:
nobody is left with a dangling pointer.
"""

import asyncio
import errno
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import msgspec

from bdev.claims import claim, release, release_bases
from bdev.guest_dma import GuestDma
from bdev.handles import Callback, Entry, Handles
from bdev.kind import Bdev
from bdev.parameters import check_uuid
from bdev.ranges import RangeTable
from bdev.settings import BdevSettings
from reactor.errors import OperationError
from reactor.interfaces import Caller, Reactor, Slots
from reactor.notifications import Notify, ignore
from reactor.operations import FileDescriptors

BdevT = TypeVar("BdevT", bound=Bdev)

log = logging.getLogger(__name__)

FIRST_ID = 1 << 62  # sources of notices, far from those that others give to their objects
DRAIN_TIMEOUT = 30.0  # seconds that requests in flight are waited for


def _key(kind: str, name: str) -> str:
    """Return where the vault has what is kept of a device."""
    return f"bdev/{kind}/{name}"


def _close_shares(bdev: Bdev) -> None:
    for share in (bdev.limits, bdev.ranges):
        if share is not None:
            share.close()
    bdev.limits = bdev.ranges = None


class BdevRegistry(BdevSettings):
    """Every block device, by name, UUID and id."""

    def __init__(self, cluster: Caller, slots: Slots) -> None:
        self.cluster = cluster
        self.notify: Notify = ignore
        self._slots = slots
        self._ids = itertools.count(FIRST_ID)
        self._entries: dict[int, Entry] = {}  # by id, in order of creation
        super().__init__(self._entries)
        self._handles = Handles(cluster, self._entries, self._forget_entry)
        self._names: dict[str, Entry] = {}  # names and UUIDs of those not removed yet
        self._waiters: set[asyncio.Future[None]] = set()
        self.guest_dma = GuestDma()
        self._at_end: list[Callable[[], None]] = []
        self._on_created: list[Callback] = []
        self._on_forgotten: list[Callable[[Bdev], None]] = []

    # --- records

    def __iter__(self) -> Iterator[Bdev]:
        """Iterate over the records that are not being removed, oldest first."""
        return iter([entry.bdev for entry in self._entries.values() if not entry.doomed])

    def find(self, name: str) -> Bdev:
        """Return the record with this name or UUID; OperationError(-19) if there is none."""
        entry = self._names.get(name) or self._names.get(name.lower())
        if entry is None or entry.doomed:
            raise OperationError(-errno.ENODEV, f"No such device: bdev {name!r:.80}")
        return entry.bdev

    def find_as(self, name: str, cls: type[BdevT]) -> BdevT:
        """Return the record with this name or UUID if it is a ``cls``; OperationError(-19)."""
        entry = self._names.get(name) or self._names.get(name.lower())
        if entry is None or entry.doomed or not isinstance(entry.bdev, cls):
            raise OperationError(-errno.ENODEV, f"No such device: {cls.kind} bdev {name!r:.80}")
        return entry.bdev

    def unused_name(self, prefix: str) -> str:
        """Return ``prefix`` with the lowest number that makes a new name."""
        return next(name for n in itertools.count() if (name := f"{prefix}{n}") not in self._names)

    def check_unused(self, name: str, uuid: str) -> None:
        """OperationError(-17) if the name or the UUID is taken (one that is being removed, too)."""
        for key in (name, check_uuid(uuid)):
            if key and key in self._names:
                raise OperationError(-errno.EEXIST, f"File exists: bdev {key!r:.80}")

    async def register(self, bdev: Bdev) -> None:
        """Take a record over; OperationError (and the record is closed) if its name is taken."""
        try:
            self.check_unused(bdev.name, bdev.uuid)
            if not bdev.automatic:
                self._handles.claim_bases(bdev)
            try:
                bdev.slot = self._slots.allocate()
            except BaseException:
                if not bdev.automatic:
                    release_bases(bdev)
                raise
        except BaseException:
            bdev.close()
            raise
        for reactor in self.cluster.counting:
            reactor.stats.clear_slot(bdev.slot)
        bdev.id = next(self._ids)
        if bdev.keepsake() is not None:
            await self._keep(bdev)
        entry = Entry(bdev)
        self._entries[bdev.id] = entry
        self._names[bdev.name] = self._names[bdev.uuid] = entry
        self.touch(bdev)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.notify("bdev_register", bdev.name, kind=bdev.kind)
        await self._tell(bdev, self._on_created)

    def inherit(self, kind: str, name: str, **known: Any) -> tuple[dict[str, Any], FileDescriptors]:
        """Return the keepsake that the control process before had of a device, or nothing.

        It is that of another device, and nothing, unless it has all that is ``known``. The
        descriptors are the caller's.
        """
        kept = self.cluster.vault.inherit(_key(kind, name))
        if kept is None:
            return {}, FileDescriptors()
        found: dict[str, Any] = msgspec.msgpack.decode(kept.data)
        if known.items() <= found.items():
            return found, kept.fds
        kept.fds.close()
        return {}, FileDescriptors()

    async def _keep(self, bdev: Bdev) -> None:
        def kept() -> tuple[bytes, list[int]]:
            facts, fds = bdev.keepsake() or ({}, [])
            return msgspec.msgpack.encode(facts), fds

        await self.cluster.vault.put(_key(bdev.kind, bdev.name), kept)

    def on_created(self, callback: Callback) -> None:
        """Await ``callback(bdev)`` with every new device before the call that created it ends."""
        self._on_created.append(callback)

    def on_forgotten(self, callback: Callable[[Bdev], None]) -> None:
        """Call ``callback(bdev)`` when a device was removed and nobody has it open any more."""
        self._on_forgotten.append(callback)

    async def wait_for(self, name: str, timeout: float) -> Bdev:
        """Return the record called ``name``, waiting up to ``timeout`` seconds for its creation."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            try:
                return self.find(name)
            except OperationError:
                if loop.time() >= deadline:
                    raise
            waiter = loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=deadline - loop.time())
            finally:
                self._waiters.discard(waiter)

    def claim(self, bdev: Bdev, owner: str, *, shared: bool = False) -> None:
        """Note that ``owner`` holds the device; OperationError(-16) if another has it."""
        claim(bdev, owner, shared=shared)

    def release(self, bdev: Bdev, owner: str) -> None:
        """End a claim."""
        release(bdev, owner)

    def above(self, bdev: Bdev) -> list[Bdev]:
        """Return the devices that stand directly on ``bdev``, oldest first."""
        return [entry.bdev for entry in self._above(bdev)]

    def _above(self, bdev: Bdev) -> list[Entry]:
        return [
            entry
            for entry in self._entries.values()
            if bdev in entry.bdev.bases and not entry.removed
        ]

    # --- handles

    async def open(self, bdev: Bdev, reactor: Reactor) -> None:
        """Make sure that ``reactor`` has a handle, and count one more user of it.

        OperationError(-19) if the device has been removed; or what opening it failed with, and then
        nothing is counted.
        """
        await self._handles.open(bdev, reactor)

    async def close(self, bdev: Bdev, reactor: Reactor) -> None:
        """Count one user less; the last one closes the handle. Not open: nothing happens.

        OperationError(-16) if requests are in flight: the handle stays, to be closed again.
        """
        await self._handles.close(bdev, reactor)

    def using(self, bdev: Bdev, reactor: Reactor) -> AbstractAsyncContextManager[None]:
        """Hold the device open in ``reactor`` for a while; errors as open() and close()."""
        return self._handles.using(bdev, reactor)

    async def add_base(
        self, bdev: Bdev, base: Bdev, attach: Callable[[Any], Awaitable[None]]
    ) -> None:
        """See :meth:`bdev.handles.Handles.add_base`."""
        await self._handles.add_base(bdev, base, attach)

    async def drop_base(
        self, bdev: Bdev, base: Bdev, detach: Callable[[Any], Awaitable[None]]
    ) -> None:
        """See :meth:`bdev.handles.Handles.drop_base`."""
        await self._handles.drop_base(bdev, base, detach)

    def number(self, reactor: Reactor) -> int:
        """Return the number, from 1 on, by which ``reactor`` is known in shared memory."""
        return reactor.number + 1

    async def reactor_lost(self, reactor: Reactor) -> None:
        """Forget the handles of a reactor that has died; its users open them again.

        Returns when nothing that it had begun can still happen to any device.
        """
        await self._handles.reactor_lost(reactor)

    async def read(self, bdev: Bdev, offset: int, length: int) -> bytes:
        """Return bytes of a device, by way of any reactor; at most 512 KiB, for metadata.

        OperationError as open(), or with what the read failed with.
        """
        reactor = self.cluster.reactors[0]
        async with self.using(bdev, reactor):
            args = {"id": bdev.id, "offset": offset, "length": length}
            return bytes(await self.cluster.call(reactor, "bdev_read", args))

    async def write(self, bdev: Bdev, offset: int, data: bytes) -> None:
        """Write bytes to a device, durably, by way of any reactor; for metadata. As read()."""
        reactor = self.cluster.reactors[0]
        async with self.using(bdev, reactor):
            args = {"id": bdev.id, "offset": offset, "data": data}
            await self.cluster.call(reactor, "bdev_write", args)

    # --- removal

    async def remove(
        self,
        name: str,
        *,
        kind: str | None = None,
        timeout: float = DRAIN_TIMEOUT,
        unplug: bool = False,
    ) -> None:
        """Remove a device: new requests fail, those in flight are waited for, then it is gone.

        A device that others stand on is refused to whoever asks, with their names; if it goes away
        by itself (``unplug``), they are removed first.

        OperationError(-19) if there is none of that name and kind, -16 if its removal goes on
        already or it is claimed, -110 if requests were still in flight after ``timeout`` seconds:
        it goes on failing new ones, and may be removed again.
        """
        entry = self._names.get(name)
        if entry is None or (kind is not None and entry.bdev.kind != kind):
            raise OperationError(
                -errno.ENODEV, f"No such device: {f'{kind} ' if kind else ''}bdev {name!r:.80}"
            )
        if not unplug:
            self.check_free(name)
        await self._remove(entry, timeout)

    def check_free(self, name: str) -> None:
        """OperationError(-16) if something stands on this device that does not go with it."""
        bdev = self._names[name].bdev
        above = self.above(bdev)
        owners = sorted({one.owner for one in above if not one.automatic})
        if owners:
            raise OperationError(
                -errno.EBUSY,
                f"bdev {name} is claimed by {', '.join(owners[:5])}: delete that first",
            )
        for part in above:
            self.check_free(part.name)

    async def _remove(self, entry: Entry, timeout: float) -> None:
        bdev = entry.bdev
        if entry.removing:
            raise OperationError(-errno.EBUSY, f"bdev {bdev.name} is being removed")
        entry.doomed = entry.removing = True
        self.touch(bdev)
        try:
            for above in self._above(bdev):
                if await above.bdev.lose_base(bdev):
                    self.touch(above.bdev)
                else:
                    await self._remove(above, timeout)
            await self._handles.drain(entry, timeout)
        finally:
            entry.removing = False
        await self._tell(bdev, entry.on_removed)
        self.cluster.vault.drop(_key(bdev.kind, bdev.name))
        bdev.let_go()
        bdev.close()
        entry.removed = True
        if not bdev.automatic:
            release_bases(bdev)
        del self._names[bdev.name], self._names[bdev.uuid]
        if not entry.handles:
            self._forget_entry(entry)
        self.notify("bdev_unregister", entry.bdev.name)
        for base in bdev.private_bases:
            await self._remove(self._entries[base.id], timeout)

    def _forget_entry(self, entry: Entry) -> None:
        if self._entries.pop(entry.bdev.id, None) is not None:
            _close_shares(entry.bdev)
            self._slots.free(entry.bdev.slot)
            for callback in self._on_forgotten:
                callback(entry.bdev)

    def on_removed(self, bdev: Bdev, callback: Callback) -> None:
        """Await ``callback(bdev)`` when the device has been drained, before it is closed.

        The holder may close its handles there, or keep them to have requests fail.
        """
        self._entries[bdev.id].on_removed.append(callback)

    def on_resized(self, bdev: Bdev, callback: Callback) -> None:
        """Await ``callback(bdev)`` when ``bdev.num_blocks`` has changed."""
        self._entries[bdev.id].on_resized.append(callback)

    def forget_callbacks(self, bdev: Bdev, *callbacks: Callback) -> None:
        """Call these no more."""
        entry = self._entries.get(bdev.id)
        if entry is not None:
            for registered in (entry.on_removed, entry.on_resized):
                registered[:] = [one for one in registered if one not in callbacks]

    async def _tell(self, bdev: Bdev, callbacks: list[Callback]) -> None:
        for callback in list(callbacks):
            try:
                await callback(bdev)
            except Exception:
                log.exception("bdev %s: %r raised", bdev.name, callback)

    async def command(self, bdev: Bdev, args: dict[str, Any]) -> None:
        """Tell every open handle something that its kind knows of; later ones see open_args()."""
        wire = {"id": bdev.id, "kind": bdev.kind, "args": args}
        await self._handles.call_all(self._entries[bdev.id], "bdev_command", wire)

    def _open_entry(self, bdev: Bdev) -> Entry:
        entry = self._entries.get(bdev.id)
        if entry is None or entry.doomed:
            raise OperationError(-errno.ENODEV, f"bdev {bdev.name} has been removed")
        return entry

    async def share(self, bdev: Bdev, share: str, fd: int, number: int | None = None) -> None:
        """Have every handle use what is behind ``fd``, now and when it is opened.

        ``share`` is one of those of bdev.worker; ``number`` goes with it, None: the reactor's own.
        """
        entry = self._open_entry(bdev)
        bdev.shares[share] = (fd, number)
        await self._handles.share(entry, share)

    async def unshare(self, bdev: Bdev, share: str) -> None:
        """Have no handle use it any more."""
        if bdev.shares.pop(share, None) is not None:
            args = {"id": bdev.id, "share": share}
            await self._handles.call_all(self._entries[bdev.id], "bdev_unshare", args)

    async def share_changed(self, bdev: Bdev, share: str) -> None:
        """Have every handle look at it again."""
        entry = self._entries.get(bdev.id)
        if entry is not None and not entry.doomed:
            args = {"id": bdev.id, "share": share}
            await self._handles.call_all(entry, "bdev_share_changed", args)

    async def task(
        self,
        bdev: Bdev,
        reactor: Reactor,
        args: dict[str, Any],
        bases: Sequence[Bdev] = (),
        timeout: float | None = None,
    ) -> Any:
        """Have ``reactor``, which has ``bdev`` and ``bases`` open, do work that its kind knows of.

        Returns what the kind's :func:`bdev.kind.task` returns, when it is over.
        """
        wire = {"id": bdev.id, "kind": bdev.kind, "args": args, "bases": [b.id for b in bases]}
        return await self.cluster.call(reactor, "bdev_task", wire, timeout=timeout)

    async def ask(self, bdev: Bdev, op: str, args: dict[str, Any]) -> dict[str, Any]:
        """Run an operation on every open handle, and return the answers by reactor."""
        entry = self._open_entry(bdev)
        answers = await self._handles.call_all(entry, op, {"id": bdev.id, **args})
        return {reactor: answer for reactor, answer in answers.items() if answer is not None}

    async def use_ranges(self, bdev: Bdev) -> None:
        """Have a device take COMPARE_AND_WRITE, and locks of ranges, on all reactors.

        From then on its writes look out for ranges that are locked; it is not undone.
        """
        self._open_entry(bdev)
        if bdev.ranges is None:
            bdev.ranges = RangeTable(bdev.name)
            await self.share(bdev, "ranges", bdev.ranges.fd)

    async def resize(self, bdev: Bdev, num_blocks: int) -> None:
        """Tell every reactor that has the device open, then whoever asked, of its new size."""
        if num_blocks == bdev.num_blocks:
            return
        bdev.num_blocks = num_blocks  # reactors that open it from now on see this
        self.touch(bdev)
        entry = self._entries[bdev.id]
        await self._handles.call_all(
            entry, "bdev_resize", {"id": bdev.id, "num_blocks": num_blocks}
        )
        self.notify("bdev_resize", bdev.name, num_blocks=num_blocks)
        await self._tell(bdev, entry.on_resized)
        for above in self.above(bdev):
            await self.resize(above, above.blocks_now())

    # --- the whole

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when all devices have been released, at the end of the process."""
        self._at_end.append(callback)

    def close_all(self) -> None:
        """Release every device; the reactors are gone."""
        for entry in self._entries.values():
            _close_shares(entry.bdev)
            if not entry.removed:
                entry.bdev.close()
        self._entries.clear()
        self._names.clear()
        for callback in self._at_end:
            callback()
