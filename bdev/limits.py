"""Limits of a device, in the units of ``bdev_set_qos_limit``; see bdev/qos.h."""

from bdev.shared import Shared
from reactor.errors import OperationError
from reactor.native import lib

_MIB = 1 << 20
MAX_RATE = (1 << 63) - 1  # a second

# Which limit a parameter sets, and what its unit is.
UNITS = {
    "rw_ios_per_sec": (lib.QOS_RW_IOS, 1),
    "rw_mbytes_per_sec": (lib.QOS_RW_BYTES, _MIB),
    "r_mbytes_per_sec": (lib.QOS_R_BYTES, _MIB),
    "w_mbytes_per_sec": (lib.QOS_W_BYTES, _MIB),
}


def check_limits(limits: dict[str, int]) -> dict[str, int]:
    """Return ``limits``; OperationError(-22) if one is negative or too large."""
    for name, value in limits.items():
        most = MAX_RATE // UNITS[name][1]
        if not 0 <= value <= most:
            raise OperationError(-22, f"{name} {value}: must be 0 (no limit) to {most}")
    return limits


class Limits:
    """Shared memory that every reactor with the device open draws on; ``fd`` is lent to them."""

    def __init__(self, name: str) -> None:
        self._shared = Shared(f"bdev-qos-{name}"[:200], "struct qos_limits")
        self.fd = self._shared.fd

    def change(self, limits: dict[str, int]) -> None:
        """Set some limits, 0 for none; a new rate counts from now on."""
        now = lib.reactor_ticks()
        for name, value in limits.items():
            index, unit = UNITS[name]
            limit = self._shared.struct.limit[index]
            limit.rate = value * unit
            limit.next = now

    def describe(self) -> dict[str, int]:
        """Return all limits, 0 where there is none."""
        limits = self._shared.struct.limit
        return {name: limits[index].rate // unit for name, (index, unit) in UNITS.items()}

    def close(self) -> None:
        """Release the memory here; reactors that have it keep it."""
        self._shared.close()
