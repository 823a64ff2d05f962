"""The reactor's side of logical units: the state that all reactors share, mapped."""

from __future__ import annotations

import errno
import os

from reactor.errors import OperationError
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, operation


class UnitWorker:
    """``scsi_unit_open`` and ``scsi_unit_close``; units have the id of their bdev."""

    def __init__(self) -> None:
        self._mapped: dict[int, CData] = {}
        self._users: dict[int, int] = {}

    def find(self, unit: int) -> CData:
        """Return a ``struct scsi_shared *``; OperationError(-19) if the unit is not open here."""
        try:
            return self._mapped[unit]
        except KeyError:
            raise OperationError(-errno.ENODEV, f"SCSI unit {unit} is not open here") from None

    @operation
    def scsi_unit_open(self, unit: int, fds: FileDescriptors) -> None:
        """Map a unit's shared state, whose file comes along, for one more user."""
        if unit not in self._mapped:
            shared = lib.scsi_shared_map(fds[0]) if fds else ffi.NULL
            if shared == ffi.NULL:
                raise OSError(ffi.errno or errno.EINVAL, os.strerror(ffi.errno), f"unit {unit}")
            self._mapped[unit] = shared
        self._users[unit] = self._users.get(unit, 0) + 1

    @operation
    def scsi_unit_close(self, unit: int) -> None:
        """Count one user less; the last one unmaps the state."""
        shared = self.find(unit)
        self._users[unit] -= 1
        if self._users[unit] == 0:
            del self._users[unit], self._mapped[unit]
            lib.scsi_shared_unmap(shared)

    async def drain(self) -> None:
        """Unmap everything; nobody uses it any more."""
        for shared in self._mapped.values():
            lib.scsi_shared_unmap(shared)
        self._mapped.clear()
        self._users.clear()
