"""Logical units, in the control process: what the ports of one bdev share, whoever serves them.

The state lies in a memfd of ours (scsi/shared.h), so that it outlives every reactor.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bdev.kind import Bdev
from reactor.errors import OperationError, check
from reactor.interfaces import Caller
from reactor.native import CData, ffi, lib
from scsi.keeper import Registration, ReservationStore
from scsi.sanitize_store import SanitizeStore
from scsi.sanitizer import Sanitizer

log = logging.getLogger(__name__)


class Bdevs(Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    async def open(self, bdev: Bdev, reactor: Any) -> None:
        """Make sure that ``reactor`` has a handle, and count one more user of it."""

    async def close(self, bdev: Bdev, reactor: Any) -> None:
        """Count one user less."""

    def using(self, bdev: Bdev, reactor: Any) -> AbstractAsyncContextManager[None]:
        """Hold the device open in ``reactor`` for a while."""

    async def use_ranges(self, bdev: Bdev) -> None:
        """Have the device lock ranges, and take COMPARE_AND_WRITE, on all reactors."""


class Unit:
    """A bdev as a logical unit, from the first LUN that names it to the last."""

    def __init__(self, bdev: Bdev, store: ReservationStore | None, sanitizer: Sanitizer) -> None:
        """Bring back what ``store`` has of it.

        Raises OSError: no memory for its state, DamagedError, a file that cannot be read.
        """
        self.bdev = bdev
        self.users = 0
        self.keeps = store is not None
        self._ports: dict[int, int] = {}
        self._seats: dict[int, int] = {}
        with ExitStack() as stack:
            self.fd = os.memfd_create(f"scsi-unit-{bdev.name}"[:200], os.MFD_CLOEXEC)
            stack.callback(os.close, self.fd)
            check(lib.scsi_shared_init(self.fd), "state of a SCSI unit")
            self.shared = lib.scsi_shared_map(self.fd)
            if self.shared == ffi.NULL:
                raise OSError(ffi.errno, os.strerror(ffi.errno), "state of a SCSI unit")
            stack.callback(lib.scsi_shared_unmap, self.shared)
            if store is not None:
                self._restore(store.load(bdev.uuid))
            self._news = News()
            stack.callback(self._news.close)
            if store is not None:
                self._news.watch(Keeper(self, store).save)
            self._news.watch(partial(sanitizer.run, bdev, self.shared))
            if sanitizer.restore(bdev, self.shared):
                os.eventfd_write(self._news.fd, 1)
            self._stack = stack.pop_all()

    @property
    def fds(self) -> list[int]:
        """What a reactor gets: the state, and the eventfd that has us look at it."""
        return [self.fd, self._news.fd]

    def port(self, address: int) -> int:
        """Return the relative target port identifier of a port of the unit, from 1."""
        free = max(self._ports.values(), default=0) + 1
        return self._ports.setdefault(address, free)

    def seat(self, cpu: int) -> int:
        """Return the seat of a CPU's reactor; one that replaces another has the same.

        Raises OperationError(-ENOSPC) if there are too many.
        """
        seat = self._seats.setdefault(cpu, len(self._seats))
        if seat >= lib.SCSI_MAX_SEATS:
            text = f"bdev {self.bdev.name} is served by {lib.SCSI_MAX_SEATS} reactors already"
            raise OperationError(-errno.ENOSPC, text)
        return seat

    def attention(self, condition: int) -> None:
        """Establish a unit attention condition for every nexus."""
        lib.scsi_shared_attention(self.shared, condition, -1)

    def nexus_lost(self, initiator: int, target: int, condition: int) -> None:
        """Release what an initiator has that comes anew."""
        lib.scsi_shared_nexus_lost(self.shared, initiator, target, condition)

    def nexus_gone(self, initiator: int, target: int) -> None:
        """Forget an initiator that has gone, but for its registration."""
        lib.scsi_shared_nexus_gone(self.shared, initiator, target)

    def nexus(self, initiator: int, target: int) -> int:
        """Return the number of a nexus that the unit knows, or -ENOENT."""
        return int(lib.scsi_shared_nexus(self.shared, initiator, target))

    def close(self) -> None:
        """Free the state."""
        self._stack.close()

    def _restore(self, registrations: list[Registration]) -> None:
        if not registrations:
            return
        items = ffi.new("struct scsi_registration[]", len(registrations))
        for item, one in zip(items, registrations, strict=True):
            item.initiator, item.target, item.key = one.initiator, one.target, one.key
            item.port, item.holder, item.type = one.port, one.type != 0, one.type
            self._ports[one.target] = one.port
        rc = lib.scsi_shared_restore(self.shared, items, len(registrations))
        check(rc, f"reservations of bdev {self.bdev.name}")
        log.info("bdev %s: %d registrations are back", self.bdev.name, len(registrations))


class News:
    """An eventfd of reactors, and what is to be looked at when it was written."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watchers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._running: dict[int, asyncio.Task[None]] = {}  # by watcher
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self.fd, self._written)

    def watch(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``look`` at news, but not twice at a time; it sees what comes up meanwhile."""
        self._watchers.append(look)

    def close(self) -> None:
        """Look no more; what has begun ends where it is."""
        self._loop.remove_reader(self.fd)
        os.close(self.fd)
        for task in self._running.values():
            task.cancel()

    def _written(self) -> None:
        os.eventfd_read(self.fd)
        for number, look in enumerate(self._watchers):
            running = self._running.get(number)
            if running is None or running.done():
                self._running[number] = self._loop.create_task(look())


class Keeper:
    """Has changes of a unit's reservations on disk before their commands are answered."""

    def __init__(self, unit: Unit, store: ReservationStore) -> None:
        self._unit = unit
        self._store = store
        self._written = 0  # the last change that was dealt with

    async def save(self) -> None:
        """Write until there is nothing that was not."""
        bdev, shared = self._unit.bdev, self._unit.shared
        while True:
            number, registrations = snapshot(shared)
            if number == self._written:
                return
            ticket, failed = self._store.ticket(), False
            try:
                await asyncio.to_thread(self._store.save, bdev.uuid, registrations, ticket)
            except OSError as error:
                failed = True
                log.error("reservations of bdev %s are not on disk: %s", bdev.name, error)
            lib.scsi_shared_kept(shared, number, failed)
            self._written = number


def snapshot(shared: CData) -> tuple[int, list[Registration]]:
    """Return what is to be on disk, and the number of the last change that it has in it."""
    items = ffi.new("struct scsi_registration[]", lib.SCSI_MAX_NEXUSES)
    found: CData = ffi.new("struct scsi_snapshot *")
    lib.scsi_shared_registrations(shared, items, found)
    kept = items[0 : found.count] if found.aptpl else ()
    return found.number, [
        Registration(one.initiator, one.target, one.key, one.port, one.type) for one in kept
    ]


class Units:
    """All units, by the bdev that each is."""

    def __init__(self, cluster: Caller, bdevs: Bdevs, state_dir: Path | None = None) -> None:
        """Without ``state_dir`` no reservation survives a restart, nor a SANITIZE; no APTPL."""
        self._store = None if state_dir is None else ReservationStore(state_dir / "reservations")
        self._sanitizer = Sanitizer(
            cluster, bdevs, None if state_dir is None else SanitizeStore(state_dir / "sanitize")
        )
        self._cluster = cluster
        self._bdevs = bdevs
        self._units: dict[int, Unit] = {}

    def use(self, bdev: Bdev) -> Unit:
        """Return a bdev's unit, for one more LUN; see ``release``. Raises OSError, see Unit."""
        unit = self._units.get(bdev.id)
        if unit is None:
            unit = self._units[bdev.id] = Unit(bdev, self._store, self._sanitizer)
        unit.users += 1
        return unit

    def release(self, unit: Unit) -> None:
        """Count one LUN less; the unit ends with the last."""
        unit.users -= 1
        if unit.users == 0:
            del self._units[unit.bdev.id]
            unit.close()

    async def open(self, unit: Unit, reactor: Any) -> bool:
        """Let a reactor have a unit and its bdev; False if the bdev is being removed."""
        try:
            await self._bdevs.use_ranges(unit.bdev)
            await self._bdevs.open(unit.bdev, reactor)
        except OperationError as error:
            if error.code == -errno.ENODEV:
                return False
            raise
        try:
            args = {"unit": unit.bdev.id, "seat": unit.seat(reactor.cpu), "keeps": unit.keeps}
            await self._cluster.call(reactor, "scsi_unit_open", args, fds=unit.fds)
        except BaseException:
            await self._bdevs.close(unit.bdev, reactor)
            raise
        return True

    async def close(self, unit: Unit, reactor: Any) -> None:
        """Undo an ``open`` that has returned True."""
        await self._cluster.call(reactor, "scsi_unit_close", {"unit": unit.bdev.id})
        await self._bdevs.close(unit.bdev, reactor)
