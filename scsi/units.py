"""Logical units, in the control process: what the ports of one bdev share, whoever serves them.

The state lies in a memfd of ours (scsi/shared.h), so that it outlives every reactor.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Protocol

from bdev.kind import Bdev
from reactor.errors import OperationError, check
from reactor.interfaces import Caller
from reactor.native import ffi, lib


class Bdevs(Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    async def open(self, bdev: Bdev, reactor: Any) -> None:
        """Make sure that ``reactor`` has a handle, and count one more user of it."""

    async def close(self, bdev: Bdev, reactor: Any) -> None:
        """Count one user less."""

    async def use_ranges(self, bdev: Bdev) -> None:
        """Have the device lock ranges, and take COMPARE_AND_WRITE, on all reactors."""


class Unit:
    """A bdev as a logical unit, from the first LUN that names it to the last."""

    def __init__(self, bdev: Bdev) -> None:
        """Raise OSError if there is no memory for its state."""
        self.bdev = bdev
        self.users = 0
        self.fd = os.memfd_create(f"scsi-unit-{bdev.name}"[:200], os.MFD_CLOEXEC)
        self._ports: dict[int, int] = {}
        try:
            check(lib.scsi_shared_init(self.fd), "state of a SCSI unit")
            self.shared = lib.scsi_shared_map(self.fd)
            if self.shared == ffi.NULL:
                raise OSError(ffi.errno, os.strerror(ffi.errno), "state of a SCSI unit")
        except BaseException:
            os.close(self.fd)
            raise

    def port(self, address: int) -> int:
        """Return the relative target port identifier of a port of the unit, from 1."""
        return self._ports.setdefault(address, len(self._ports) + 1)

    def attention(self, condition: int) -> None:
        """Establish a unit attention condition for every nexus."""
        lib.scsi_shared_attention(self.shared, condition, -1)

    def nexus_lost(self, initiator: int, target: int, condition: int) -> None:
        """Release what an initiator has that is gone, or comes anew."""
        lib.scsi_shared_nexus_lost(self.shared, initiator, target, condition)

    def close(self) -> None:
        """Free the state."""
        lib.scsi_shared_unmap(self.shared)
        os.close(self.fd)


class Units:
    """All units, by the bdev that each is."""

    def __init__(self, cluster: Caller, bdevs: Bdevs) -> None:
        self._cluster = cluster
        self._bdevs = bdevs
        self._units: dict[int, Unit] = {}

    def use(self, bdev: Bdev) -> Unit:
        """Return a bdev's unit, for one more LUN; see ``release``."""
        unit = self._units.get(bdev.id)
        if unit is None:
            unit = self._units[bdev.id] = Unit(bdev)
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
            args = {"unit": unit.bdev.id}
            await self._cluster.call(reactor, "scsi_unit_open", args, fds=[unit.fd])
        except BaseException:
            await self._bdevs.close(unit.bdev, reactor)
            raise
        return True

    async def close(self, unit: Unit, reactor: Any) -> None:
        """Undo an ``open`` that has returned True."""
        await self._cluster.call(reactor, "scsi_unit_close", {"unit": unit.bdev.id})
        await self._bdevs.close(unit.bdev, reactor)
