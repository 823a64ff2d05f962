"""What is known of the block devices: SPDK's ``bdev_get_bdevs`` and ``bdev_get_iostat``."""

import enum
from collections.abc import Iterable
from typing import Any

from bdev.kind import Bdev, Op, provider
from bdev.limits import UNITS
from bdev.registry import BdevRegistry, Reactor
from reactor.native import CData, lib
from reactor.operations import operation

# SPDK's names of I/O types, in its order. None: there is no such operation here.
_IO_TYPES: dict[str, Op | None] = {
    "read": Op.READ,
    "write": Op.WRITE,
    "unmap": Op.UNMAP,
    "flush": Op.FLUSH,
    "reset": Op.RESET,
    "nvme_admin": None,
    "nvme_io": None,
    "nvme_io_md": None,
    "write_zeroes": Op.WRITE_ZEROES,
    "zcopy": None,
    "get_zone_info": None,
    "zone_management": None,
    "zone_append": None,
    "compare": None,
    "compare_and_write": None,
    "abort": None,
    "seek_hole": None,
    "seek_data": None,
    "copy": None,
    "nvme_iov_md": None,
    "nvme_nssr": None,
    "write_uncorrectable": None,
}

# SPDK's words for what it counts, in its order. None: always 0 here.
_COUNTED: dict[str, tuple[str, str, Op | None]] = {
    "read": ("bytes_read", "num_read_ops", Op.READ),
    "write": ("bytes_written", "num_write_ops", Op.WRITE),
    "unmap": ("bytes_unmapped", "num_unmap_ops", Op.UNMAP),
    "copy": ("bytes_copied", "num_copy_ops", None),
}


class ResetMode(enum.Enum):
    """What reading the statistics starts afresh."""

    NONE = "none"
    MAXMIN = "maxmin"
    ALL = "all"


def describe(bdev: Bdev) -> dict[str, Any]:
    """Return a device's entry in ``bdev_get_bdevs``."""
    return {
        "name": bdev.name,
        "aliases": [bdev.uuid],
        "product_name": bdev.product_name,
        "block_size": bdev.block_size,
        "num_blocks": bdev.num_blocks,
        "preferred_write_alignment": 0,
        "preferred_write_granularity": 0,
        "optimal_write_size": 0,
        "preferred_unmap_alignment": 0,
        "preferred_unmap_granularity": 0,
        "uuid": bdev.uuid,
        **bdev.describe(),
        "assigned_rate_limits": bdev.limits.describe() if bdev.limits else dict.fromkeys(UNITS, 0),
        "claimed": bool(bdev.claims),
        "zoned": False,
        "supported_io_types": {name: op in bdev.supported for name, op in _IO_TYPES.items()},
        "driver_specific": bdev.driver_specific(),
    }


class Totals:
    """The statistics of one device, added up over reactors; see ``struct bdev_stats``."""

    def __init__(self) -> None:
        self.ops = [0] * len(Op)
        self.bytes = [0] * len(Op)
        self.ticks = [0] * len(Op)
        self.extremes: dict[Op, tuple[int, int]] = {}

    def add(self, stats: CData) -> None:
        """Add what a slot says."""
        for op in Op:
            self.ops[op] += stats.ops[op]
            self.bytes[op] += stats.bytes[op]
            self.ticks[op] += stats.ticks[op]
        for op in (Op.READ, Op.WRITE, Op.UNMAP):
            low, high = stats.min_ticks[op], stats.max_ticks[op]
            if low:
                known = self.extremes.get(op, (low, high))
                self.extremes[op] = (min(low, known[0]), max(high, known[1]))

    def subtract(self, earlier: "Totals") -> None:
        """Count from an earlier point of time on."""
        for op in Op:
            self.ops[op] -= earlier.ops[op]
            self.bytes[op] -= earlier.bytes[op]
            self.ticks[op] -= earlier.ticks[op]

    def to_wire(self) -> dict[str, Any]:
        """Return SPDK's members."""
        wire: dict[str, Any] = {}
        for moved, count, op in _COUNTED.values():
            wire[moved] = 0 if op is None else self.bytes[op]
            wire[count] = 0 if op is None else self.ops[op]
        for verb, (_, _, op) in _COUNTED.items():
            low, high = (0, 0) if op is None else self.extremes.get(op, (0, 0))
            wire[f"{verb}_latency_ticks"] = 0 if op is None else self.ticks[op]
            wire[f"max_{verb}_latency_ticks"] = high
            wire[f"min_{verb}_latency_ticks"] = low
        wire["io_error"] = {}
        return wire


@provider
class InfoOperations:
    """``bdev_get_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        # Reactors alone write their counters, so counting afresh is subtracting what was there.
        self._earlier: dict[tuple[int, str], Totals] = {}

    @operation(aliases=["get_bdevs"])
    async def bdev_get_bdevs(
        self,
        name: str | None = None,
        timeout: int = 0,
    ) -> list[dict[str, Any]]:
        """Describe all devices, or one, waiting up to ``timeout`` ms for its creation."""
        if name is None:
            return [describe(bdev) for bdev in self._registry]
        return [describe(await self._registry.wait_for(name, timeout / 1000))]

    @operation(aliases=["get_bdevs_iostat"])
    def bdev_get_iostat(
        self,
        names: list[str] | None = None,
        name: str | None = None,
        per_channel: bool = False,
        reset_mode: ResetMode = ResetMode.NONE,
    ) -> dict[str, Any]:
        """Return what was done to all devices, or to some, in all reactors or in each of them."""
        wanted = ([] if names is None else names) + ([] if name is None else [name])
        bdevs = [self._registry.find(one) for one in wanted] or list(self._registry)
        entries = []
        for bdev in bdevs:
            channels = [(reactor, self._read(bdev, [reactor])) for reactor in self._reactors()]
            if per_channel:
                entries.append(
                    {
                        "name": bdev.name,
                        "channels": [
                            {"thread": reactor.name, **totals.to_wire()}
                            for reactor, totals in channels
                        ],
                    }
                )
            else:
                entries.append({"name": bdev.name, **self._read(bdev, self._reactors()).to_wire()})
            self._reset(bdev, reset_mode)
        return {
            "tick_rate": lib.reactor_tick_rate(),
            "ticks": lib.reactor_ticks(),
            "bdevs": entries,
        }

    def _reactors(self) -> Iterable[Reactor]:
        return self._registry.cluster.everyone

    def _read(self, bdev: Bdev, reactors: Iterable[Reactor]) -> Totals:
        totals = Totals()
        for reactor in reactors:
            totals.add(reactor.stats.slot(bdev.slot, "struct bdev_stats"))
            earlier = self._earlier.get((bdev.id, reactor.name))
            if earlier is not None:
                totals.subtract(earlier)
        return totals

    def _reset(self, bdev: Bdev, mode: ResetMode) -> None:
        if mode is ResetMode.NONE:
            return
        for reactor in self._reactors():
            stats = reactor.stats.slot(bdev.slot, "struct bdev_stats")
            if mode is ResetMode.ALL:
                self._earlier[bdev.id, reactor.name] = totals = Totals()
                totals.add(stats)
            for op in range(len(stats.min_ticks)):
                stats.min_ticks[op] = stats.max_ticks[op] = 0
