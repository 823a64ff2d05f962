"""The reactor's side of logical units: the state that all reactors share, mapped."""

from __future__ import annotations

import errno
import os

from bdev import worker as bdevs
from bdev.io import BdevIO
from bdev.kind import Op
from reactor.errors import OperationError
from reactor.loop import ReactorLoop
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, operation

_PIECE = 1 << 20  # bytes that are written at a time


class _Opened:
    """A unit, mapped: ``place`` is its struct scsi_place."""

    def __init__(self, unit: int, seat: int, keeps: bool, fds: FileDescriptors) -> None:
        shared = lib.scsi_shared_map(fds[0]) if fds else ffi.NULL
        if shared == ffi.NULL:
            raise OSError(ffi.errno or errno.EINVAL, os.strerror(ffi.errno), f"unit {unit}")
        news = fds.take(1) if len(fds) > 1 else -1
        self.users = 0
        self.place: CData = ffi.new("struct scsi_place *", (shared, seat, news, keeps))
        lib.scsi_shared_sit(shared, seat)

    def close(self) -> None:
        lib.scsi_shared_unmap(self.place.shared)
        if self.place.news >= 0:
            os.close(self.place.news)


class UnitWorker:
    """``scsi_unit_open`` and ``scsi_unit_close``; units have the id of their bdev."""

    def __init__(self, loop: ReactorLoop) -> None:
        self._loop = loop
        self._units: dict[int, _Opened] = {}

    def find(self, unit: int) -> CData:
        """Return a ``struct scsi_place *``; OperationError(-19) if the unit is not open here."""
        return self._find(unit).place

    @operation
    def scsi_unit_open(self, unit: int, seat: int, keeps: bool, fds: FileDescriptors) -> None:
        """Map a unit's shared state, whose file comes along, for one more user.

        ``seat`` is this process's among those that serve the unit; ``keeps``: reservations can be
        kept on disk. The second descriptor is the eventfd that has the control process look.
        """
        if not 0 <= seat < lib.SCSI_MAX_SEATS:
            raise OperationError(-errno.EINVAL, f"unit {unit} has no seat {seat}")
        if unit not in self._units:
            self._units[unit] = _Opened(unit, seat, keeps, fds)
        self._units[unit].users += 1

    @operation
    def scsi_unit_close(self, unit: int) -> None:
        """Count one user less; the last one unmaps the state."""
        opened = self._find(unit)
        opened.users -= 1
        if opened.users == 0:
            del self._units[unit]
            opened.close()

    @operation(internal=True)
    async def scsi_unit_sanitize(self, unit: int, offset: int, length: int, pattern: bytes) -> None:
        """Write over a part of a unit's medium, all of it durable on return.

        ``pattern`` is what each block gets, zeroes if it is empty.

        OSError, with what the bdev failed with.
        """
        handle = bdevs.handles.get(unit)
        if handle is None:
            raise OperationError(-errno.ENODEV, f"bdev {unit} is not open in this reactor")
        disk = BdevIO(self._loop.selector, handle)
        if not pattern and lib.bdev_supported(handle) & 1 << Op.WRITE_ZEROES:
            erase = disk.start(Op.WRITE_ZEROES, offset, length, flags=lib.BDEV_IO_UNMAP)
            await erase.completed()
        else:
            block = pattern or bytes(lib.bdev_block_size(handle))
            for at in range(offset, offset + length, _PIECE):
                data = block * (min(_PIECE, offset + length - at) // len(block))
                await disk.start(Op.WRITE, at, buffers=[data]).completed()
        await disk.start(Op.FLUSH, 0, 0).completed()

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
