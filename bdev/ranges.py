"""The table of locked ranges of one device, in the control process; see bdev/ranges.h."""

import os

from reactor.errors import check
from reactor.native import ffi, lib


class RangeTable:
    """Shared memory that every reactor with the device open maps; ``fd`` is lent to them."""

    def __init__(self, name: str) -> None:
        """Raise OSError if there is no memory for it."""
        self.fd = os.memfd_create(f"bdev-ranges-{name}"[:200], os.MFD_CLOEXEC)
        try:
            check(lib.range_table_init(self.fd), "table of locked ranges")
            self._table = lib.range_table_map(self.fd)
            if self._table == ffi.NULL:
                raise OSError(ffi.errno, os.strerror(ffi.errno), "table of locked ranges")
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def used(self) -> int:
        """How many ranges are locked, or wait to be written again."""
        return int(lib.range_table_used(self._table))

    def owner_gone(self, owner: int) -> int:
        """Free what a dead reactor had locked; return how many writes are to be done again."""
        return int(lib.range_table_owner_gone(self._table, owner))

    def close(self) -> None:
        """Release the memory here; reactors that have it keep it."""
        lib.range_table_unmap(self._table)
        os.close(self.fd)
