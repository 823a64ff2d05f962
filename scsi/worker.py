"""The reactor's side of logical units: the state that all reactors share, mapped."""

from __future__ import annotations

import errno
import os

from reactor.errors import OperationError
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, operation


class _Opened:
    """A unit, mapped: ``place`` is its struct scsi_place."""

    def __init__(self, unit: int, seat: int, fds: FileDescriptors) -> None:
        shared = lib.scsi_shared_map(fds[0]) if fds else ffi.NULL
        if shared == ffi.NULL:
            raise OSError(ffi.errno or errno.EINVAL, os.strerror(ffi.errno), f"unit {unit}")
        keeper = fds.take(1) if len(fds) > 1 else -1
        self.users = 0
        self.place: CData = ffi.new("struct scsi_place *", (shared, seat, keeper))
        lib.scsi_shared_sit(shared, seat)

    def close(self) -> None:
        lib.scsi_shared_unmap(self.place.shared)
        if self.place.keeper >= 0:
            os.close(self.place.keeper)


class UnitWorker:
    """``scsi_unit_open`` and ``scsi_unit_close``; units have the id of their bdev."""

    def __init__(self) -> None:
        self._units: dict[int, _Opened] = {}

    def find(self, unit: int) -> CData:
        """Return a ``struct scsi_place *``; OperationError(-19) if the unit is not open here."""
        return self._find(unit).place

    @operation
    def scsi_unit_open(self, unit: int, seat: int, fds: FileDescriptors) -> None:
        """Map a unit's shared state, whose file comes along, for one more user.

        ``seat`` is this process's among those that serve the unit. A second descriptor is the
        eventfd of whatever keeps reservations on disk.
        """
        if not 0 <= seat < lib.SCSI_MAX_SEATS:
            raise OperationError(-errno.EINVAL, f"unit {unit} has no seat {seat}")
        if unit not in self._units:
            self._units[unit] = _Opened(unit, seat, fds)
        self._units[unit].users += 1

    @operation
    def scsi_unit_close(self, unit: int) -> None:
        """Count one user less; the last one unmaps the state."""
        opened = self._find(unit)
        opened.users -= 1
        if opened.users == 0:
            del self._units[unit]
            opened.close()

    async def drain(self) -> None:
        """Unmap everything; nobody uses it any more."""
        for opened in self._units.values():
            opened.close()
        self._units.clear()

    def _find(self, unit: int) -> _Opened:
        try:
            return self._units[unit]
        except KeyError:
            raise OperationError(-errno.ENODEV, f"SCSI unit {unit} is not open here") from None
