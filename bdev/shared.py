"""A structure in memory that the control process shares with reactors."""

import mmap
import os
from typing import Any

from reactor.native import ffi


class Shared:
    """A zeroed ``ctype`` in a memfd; ``struct`` points at it, ``fd`` is lent to reactors.

    ``size`` in bytes is for one with an array at its end.
    """

    def __init__(self, name: str, ctype: str, size: int | None = None) -> None:
        size = -(-(size or ffi.sizeof(ctype)) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self._view = ffi.from_buffer("char[]", self._map)
        self.struct: Any = ffi.cast(f"{ctype} *", self._view)

    def close(self) -> None:
        """Unmap it; reactors that have it mapped keep it."""
        if self.fd >= 0:
            self.struct = ffi.NULL
            ffi.release(self._view)
            self._map.close()
            os.close(self.fd)
            self.fd = -1
