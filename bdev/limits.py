"""Limits of a device, or of a group, in the units of ``bdev_set_qos_limit``; see bdev/qos.h."""

from collections.abc import Mapping
from typing import Any, TypedDict

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
# Of which limit it is a burst, in the same unit.
BURSTS = {
    "rw_ios_burst": "rw_ios_per_sec",
    "rw_mbytes_burst": "rw_mbytes_per_sec",
    "r_mbytes_burst": "r_mbytes_per_sec",
    "w_mbytes_burst": "w_mbytes_per_sec",
}


class LimitParameters(TypedDict, total=False):
    """Parameters of every operation that sets limits: 0 ends one, absent ones stay.

    A burst, of requests or MiB, is what may go at once after as much was left unused.
    """

    rw_ios_per_sec: int | None
    rw_mbytes_per_sec: int | None
    r_mbytes_per_sec: int | None
    w_mbytes_per_sec: int | None
    rw_ios_burst: int | None
    rw_mbytes_burst: int | None
    r_mbytes_burst: int | None
    w_mbytes_burst: int | None


def check_limits(parameters: LimitParameters) -> dict[str, int]:
    """Return the limits and bursts that are given.

    OperationError(-22) if there is none, or one is negative or too large.
    """
    given: Mapping[str, Any] = parameters
    limits: dict[str, int] = {name: value for name, value in given.items() if value is not None}
    if not limits:
        raise OperationError(-22, f"no limit given: {', '.join((*UNITS, *BURSTS))}")
    for name, value in limits.items():
        most = MAX_RATE // UNITS[BURSTS.get(name, name)][1]
        if not 0 <= value <= most:
            raise OperationError(-22, f"{name} {value}: must be 0 (none) to {most}")
    return limits


def _cost(rate: int) -> int:
    """Return the ticks that a unit may take, times 2^32; 0 for no limit."""
    if not rate:
        return 0
    return min(max((lib.reactor_tick_rate() << 32) // rate, 1), (1 << 64) - 1)


class Rates:
    """The limits in a ``struct qos_limits``, which is somebody else's."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._rates = dict.fromkeys(UNITS, 0)
        self._bursts = dict.fromkeys(BURSTS, 0)

    def change(self, limits: Mapping[str, int]) -> None:
        """Set some limits and bursts, 0 for none; a new rate counts from now on."""
        now = lib.reactor_ticks()
        self._bursts.update({name: limits[name] for name in BURSTS if name in limits})
        for name, value in limits.items():
            if name in UNITS:
                index, unit = UNITS[name]
                self._native.limit[index].next = now
                self._native.limit[index].cost = _cost(value * unit)
                self._rates[name] = value
        for burst, name in BURSTS.items():
            index, unit = UNITS[name]
            limit = self._native.limit[index]
            worth = self._bursts[burst] * unit * lib.reactor_tick_rate()
            least = lib.QOS_SLACK_NS * lib.reactor_tick_rate() // 10**9
            rate = self._rates[name] * unit
            limit.slack = least + (min(worth // rate, 1 << 62) if rate else 0)

    def describe(self) -> dict[str, int]:
        """Return all limits, 0 where there is none, and those bursts that there are."""
        return self._rates | {name: burst for name, burst in self._bursts.items() if burst}


class Limits:
    """Shared memory that every reactor with the device open draws on; ``fd`` is lent to them."""

    def __init__(self, name: str) -> None:
        self._shared = Shared(f"bdev-qos-{name}"[:200], "struct qos_limits")
        self.fd = self._shared.fd
        self.rates = Rates(self._shared.struct)

    def close(self) -> None:
        """Release the memory here; reactors that have it keep it."""
        self._shared.close()


class GroupLimits:
    """The same for a group; devices are members by number."""

    def __init__(self, name: str) -> None:
        self._shared = Shared(f"bdev-qos-group-{name}"[:200], "struct qos_group")
        self.fd = self._shared.fd
        self.rates = Rates(self._shared.struct.limits)

    def clear_member(self, member: int) -> None:
        """Have a new member begin with nothing behind it."""
        self._shared.struct.member[member].asked = self._shared.struct.member[member].clock = 0

    def close(self) -> None:
        """Release the memory here; reactors that have it keep it."""
        self._shared.close()
