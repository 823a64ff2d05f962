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
from typing import Any, Protocol

import msgspec

from bdev.guest_dma import GuestDma
from bdev.kind import Bdev, check_uuid
from bdev.limits import Limits
from reactor.errors import OperationError
from reactor.notifications import Notify, ignore
from reactor.operations import FileDescriptors
from reactor.stats import SlotAllocator, StatsArea
from reactor.vault import NoVault

log = logging.getLogger(__name__)

FIRST_ID = 1 << 62  # sources of notices, far from those that others give to their objects
DRAIN_TIMEOUT = 30.0  # seconds that requests in flight are waited for
CALL_MARGIN = 5.0  # seconds more, for the answer

Callback = Callable[[Bdev], Awaitable[None]]


class Reactor(Protocol):
    """What the registry needs to know of a reactor; its name is the same after a restart."""

    @property
    def name(self) -> str:
        """As ``reactor-0``."""

    @property
    def stats(self) -> StatsArea:
        """Its statistics, as the control process maps them."""


class Cluster(Protocol):
    """What the registry needs of the cluster."""

    vault: NoVault

    @property
    def reactors(self) -> Sequence[Any]:
        """Every :class:`Reactor`, dead or alive."""

    async def call(
        self,
        reactor: Any,
        op: str,
        args: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        timeout: float = ...,
    ) -> Any:
        """Run an operation in a reactor; see ``reactor.cluster``."""


class _Handle:
    """One reactor's handle on one record."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.lock = asyncio.Lock()  # opening, closing, and whatever else talks to the reactor
        self.references = 0
        self.open = False
        self.lost = False  # the reactor went away, and the handle with it
        self.claimed = False  # the bases, by this handle
        self.bases: list[
            tuple[_Entry, _Handle]
        ] = []  # of the same reactor, one user of which we are


class _Entry:
    """A record and its handles."""

    def __init__(self, bdev: Bdev) -> None:
        self.bdev = bdev
        self.handles: dict[str, _Handle] = {}
        self.on_removed: list[Callback] = []
        self.on_resized: list[Callback] = []
        self.doomed = False  # being removed: nobody finds or opens it
        self.removing = False  # ... at this moment
        self.removed = False  # only the handles that somebody keeps are left


def _is_gone(handle: _Handle, error: BaseException) -> bool:
    """Whether a call failed because its reactor died: the handle went with it."""
    return handle.lost or (isinstance(error, OperationError) and error.code == -errno.ECONNRESET)


def _key(kind: str, name: str) -> str:
    """Return where the vault has what is kept of a device."""
    return f"bdev/{kind}/{name}"


def _close_limits(bdev: Bdev) -> None:
    if bdev.limits is not None:
        bdev.limits.close()
        bdev.limits = None


class BdevRegistry:
    """Every block device, by name, UUID and id. The subsystem ``bdev`` of a saved configuration."""

    name = "bdev"
    depends_on: Sequence[str] = ()

    def __init__(self, cluster: Cluster, slots: SlotAllocator) -> None:
        self.cluster = cluster
        self.notify: Notify = ignore
        self._slots = slots
        self._ids = itertools.count(FIRST_ID)
        self._entries: dict[int, _Entry] = {}  # by id, in order of creation
        self._names: dict[str, _Entry] = {}  # names and UUIDs of those not removed yet
        self._waiters: set[asyncio.Future[None]] = set()
        self.guest_dma = GuestDma()
        self._at_end: list[Callable[[], None]] = []
        self._settings: list[Callable[[], list[dict[str, Any]]]] = []
        self._on_created: list[Callback] = []

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
                self._claim_bases(bdev)
            try:
                bdev.slot = self._slots.allocate()
            except BaseException:
                if not bdev.automatic:
                    self._release_bases(bdev)
                raise
        except BaseException:
            bdev.close()
            raise
        for reactor in self.cluster.reactors:
            reactor.stats.clear_slot(bdev.slot)
        bdev.id = next(self._ids)
        if bdev.keepsake() is not None:
            await self._keep(bdev)
        entry = _Entry(bdev)
        self._entries[bdev.id] = entry
        self._names[bdev.name] = self._names[bdev.uuid] = entry
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
        """Note that ``owner`` holds the device: for itself, or to read it as others may.

        The same owner may claim it again. OperationError(-16) if another has it.
        """
        if bdev.claims and bdev.claims[0] != owner and not (shared and bdev.claims_shared):
            how = "shared, for reading" if bdev.claims_shared else "for itself"
            raise OperationError(
                -errno.EBUSY,
                f"bdev {bdev.name} is claimed already, by {bdev.claims[0]} {how}",
            )
        bdev.claims.append(owner)
        bdev.claims_shared = shared

    def release(self, bdev: Bdev, owner: str) -> None:
        """End a claim."""
        if owner in bdev.claims:
            bdev.claims.remove(owner)

    def _claim_bases(self, bdev: Bdev) -> None:
        """Claim what a device stands on, or nothing; read-only devices share a read-only base."""
        claimed: list[Bdev] = []
        try:
            for base in bdev.bases:
                below = self._entries.get(base.id)
                if below is None or below.doomed:
                    raise OperationError(-errno.ENODEV, f"bdev {base.name} has been removed")
                if below.on_removed and not base.readonly:
                    raise OperationError(
                        -errno.EBUSY, f"bdev {base.name} is in use: a controller serves it"
                    )
                self.claim(base, bdev.owner, shared=base.readonly)
                claimed.append(base)
        except BaseException:
            for base in claimed:
                self.release(base, bdev.owner)
            raise

    def _release_bases(self, bdev: Bdev) -> None:
        for base in bdev.bases:
            self.release(base, bdev.owner)

    def above(self, bdev: Bdev) -> list[Bdev]:
        """Return the devices that stand directly on ``bdev``, oldest first."""
        return [entry.bdev for entry in self._above(bdev)]

    def _above(self, bdev: Bdev) -> list["_Entry"]:
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
        await self._open(bdev, reactor)

    async def _open(self, bdev: Bdev, reactor: Reactor) -> tuple[_Entry, _Handle]:
        entry = self._entries.get(bdev.id)
        while True:
            if entry is None or entry.doomed:
                raise OperationError(-errno.ENODEV, f"bdev {bdev.name} has been removed")
            handle = entry.handles.get(reactor.name)
            if handle is None:
                handle = entry.handles[reactor.name] = _Handle(reactor)
            async with handle.lock:
                if handle.lost or entry.doomed:
                    continue  # meanwhile
                if not handle.open:
                    await self._open_handle(entry, handle)
                handle.references += 1
                return entry, handle

    async def _open_handle(self, entry: _Entry, handle: _Handle) -> None:
        bdev = entry.bdev
        try:
            if bdev.automatic:
                self._claim_bases(bdev)
                handle.claimed = True
            for base in bdev.bases:
                handle.bases.append(await self._open(base, handle.reactor))
            await self._lend(bdev, handle.reactor)
        except BaseException:
            self._forget(entry, handle)
            await self._close_bases(handle)
            raise
        handle.open = True
        await bdev.opened(self.cluster, handle.reactor)

    async def _lend(self, bdev: Bdev, reactor: Reactor) -> None:
        """Have a reactor open a device with what it lends; what fails is taken back."""
        lent, fds = await bdev.lend(reactor)
        args = {"id": bdev.id, "kind": bdev.kind, "slot": bdev.slot, "args": lent}
        if bdev.bases:
            args["bases"] = [base.id for base in bdev.bases]
        if bdev.limits is not None:
            args["limited"] = True
            fds = [*fds, bdev.limits.fd]
        try:
            await self.cluster.call(reactor, "bdev_open", args, fds=fds)
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

    async def _close(self, entry: _Entry, handle: _Handle) -> None:
        async with handle.lock:
            if handle.lost:
                return
            handle.references = max(0, handle.references - 1)
            if handle.references > 0:
                return
            try:
                await self.cluster.call(handle.reactor, "bdev_close", {"id": entry.bdev.id})
            except OperationError as error:
                if not _is_gone(handle, error):
                    raise
            else:
                entry.bdev.closed(handle.reactor)
            self._forget(entry, handle)
            await entry.bdev.take_back(handle.reactor)
            await self._close_bases(handle)

    async def _close_bases(self, handle: _Handle) -> None:
        """Be a user of the bases no more, the last one first; nothing if the reactor is gone."""
        while handle.bases:
            await self._close(*handle.bases.pop())

    def _forget(self, entry: _Entry, handle: _Handle) -> None:
        handle.lost = True
        handle.open = False
        if handle.claimed:
            handle.claimed = False
            self._release_bases(entry.bdev)
        if entry.handles.get(handle.reactor.name) is handle:
            del entry.handles[handle.reactor.name]
        if entry.removed and not entry.handles:
            self._forget_entry(entry)

    async def reactor_lost(self, reactor: Reactor) -> None:
        """Forget the handles of a reactor that has died; its users open them again.

        Returns when nothing that it had begun can still happen to any device.
        """
        fences = []
        for entry in list(self._entries.values()):
            handle = entry.handles.get(reactor.name)
            if handle is not None:
                if handle.open:
                    fences.append(entry.bdev.fence(reactor))
                self._forget(entry, handle)
        await asyncio.gather(*fences)

    async def read(self, bdev: Bdev, offset: int, length: int) -> bytes:
        """Return bytes of a device, by way of any reactor; at most 512 KiB, for metadata.

        OperationError as open(), or with what the read failed with.
        """
        reactor = self.cluster.reactors[0]
        await self.open(bdev, reactor)
        try:
            args = {"id": bdev.id, "offset": offset, "length": length}
            return bytes(await self.cluster.call(reactor, "bdev_read", args))
        finally:
            await self.close(bdev, reactor)

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

    async def _remove(self, entry: _Entry, timeout: float) -> None:
        bdev = entry.bdev
        if entry.removing:
            raise OperationError(-errno.EBUSY, f"bdev {bdev.name} is being removed")
        entry.doomed = entry.removing = True
        try:
            for above in self._above(bdev):
                await self._remove(above, timeout)
            await self._drain(entry, timeout)
        finally:
            entry.removing = False
        await self._tell(bdev, entry.on_removed)
        self.cluster.vault.drop(_key(bdev.kind, bdev.name))
        bdev.close()
        entry.removed = True
        if not bdev.automatic:
            self._release_bases(bdev)
        del self._names[bdev.name], self._names[bdev.uuid]
        if not entry.handles:
            self._forget_entry(entry)
        self.notify("bdev_unregister", entry.bdev.name)

    def _forget_entry(self, entry: _Entry) -> None:
        if self._entries.pop(entry.bdev.id, None) is not None:
            _close_limits(entry.bdev)
            self._slots.free(entry.bdev.slot)

    async def _drain(self, entry: _Entry, limit: float) -> None:
        """Have every reactor fail new requests and wait for the others."""
        handles = list(entry.handles.values())
        results = await asyncio.gather(
            *(self._drain_handle(entry, handle, limit) for handle in handles),
            return_exceptions=True,
        )
        for handle, result in zip(handles, results, strict=True):
            if isinstance(result, BaseException) and not _is_gone(handle, result):
                raise result

    async def _drain_handle(self, entry: _Entry, handle: _Handle, limit: float) -> None:
        async with handle.lock:
            if handle.open:
                await self.cluster.call(
                    handle.reactor,
                    "bdev_remove",
                    {"id": entry.bdev.id, "timeout": limit},
                    timeout=limit + CALL_MARGIN,
                )

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
        await self._call_all(self._entries[bdev.id], "bdev_command", wire)

    async def limit(self, bdev: Bdev, changes: dict[str, int]) -> None:
        """Change some of a device's limits (see bdev.limits), in every reactor, now."""
        fds = []
        if bdev.limits is None:
            bdev.limits = Limits(bdev.name)
            fds = [bdev.limits.fd]
        bdev.limits.change(changes)
        await self._call_all(self._entries[bdev.id], "bdev_limit", {"id": bdev.id}, fds)

    async def _call_all(
        self, entry: _Entry, op: str, args: dict[str, Any], fds: Sequence[int] = ()
    ) -> None:
        """Run an operation in every reactor that has the device open."""
        for handle in list(entry.handles.values()):
            async with handle.lock:
                if handle.open:
                    try:
                        await self.cluster.call(handle.reactor, op, args, fds=fds)
                    except OperationError as error:
                        if not _is_gone(handle, error):
                            raise

    async def resize(self, bdev: Bdev, num_blocks: int) -> None:
        """Tell every reactor that has the device open, then whoever asked, of its new size."""
        if num_blocks == bdev.num_blocks:
            return
        bdev.num_blocks = num_blocks  # reactors that open it from now on see this
        entry = self._entries[bdev.id]
        await self._call_all(entry, "bdev_resize", {"id": bdev.id, "num_blocks": num_blocks})
        self.notify("bdev_resize", bdev.name, num_blocks=num_blocks)
        await self._tell(bdev, entry.on_resized)
        for above in self.above(bdev):
            await self.resize(above, above.blocks_now())

    # --- the whole

    def config(self) -> list[dict[str, Any]]:
        """Return the calls that would create every device again, bases before those on them."""
        calls: list[dict[str, Any]] = [call for settings in self._settings for call in settings()]
        for bdev in self:
            call = bdev.config()
            if call and call not in calls:  # one call may create several devices
                calls.append(call)
        for bdev in self:
            if bdev.limits is not None and any(bdev.limits.describe().values()):
                params = {"name": bdev.name, **bdev.limits.describe()}
                calls.append({"method": "bdev_set_qos_limit", "params": params})
        return calls

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when all devices have been released, at the end of the process."""
        self._at_end.append(callback)

    def add_settings(self, settings: Callable[[], list[dict[str, Any]]]) -> None:
        """Have the calls that ``settings`` returns stand before those that create devices."""
        self._settings.append(settings)

    def close_all(self) -> None:
        """Release every device; the reactors are gone."""
        for entry in self._entries.values():
            _close_limits(entry.bdev)
            if not entry.removed:
                entry.bdev.close()
        self._entries.clear()
        self._names.clear()
        for callback in self._at_end:
            callback()
