"""Statistics of the block devices: SPDK's ``bdev_get_iostat``, and latency histograms.

Reactors count in shared memory (bdev/bdev.h), and only they write there, but for the extremes; so
to count afresh is to remember what was there, and to subtract it.
"""

import enum
import errno
from collections.abc import Iterable
from typing import Any, Literal

from bdev.histogram import Histogram
from bdev.kind import Bdev, Op, provider
from bdev.queue_depth import DepthSampler
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.interfaces import Reactor
from reactor.native import CData, lib
from reactor.operations import operation

PERCENTILES = (50, 90, 99, 99.9, 99.99)
_MICROSECONDS = 1_000_000
MAX_PERIOD = 3600 * _MICROSECONDS  # between samples of queue depths

Opc = Literal[
    "read",
    "write",
    "flush",
    "unmap",
    "write_zeroes",
    "reset",
    "compare",
    "compare_and_write",
    "copy",
    "verify",
]

# SPDK's words for what it counts, in its order.
_COUNTED: dict[str, tuple[str, str, Op]] = {
    "read": ("bytes_read", "num_read_ops", Op.READ),
    "write": ("bytes_written", "num_write_ops", Op.WRITE),
    "unmap": ("bytes_unmapped", "num_unmap_ops", Op.UNMAP),
    "copy": ("bytes_copied", "num_copy_ops", Op.COPY),
}


class ResetMode(enum.Enum):
    """What is counted afresh; errors are not counted by their kind."""

    NONE = "none"
    MAXMIN = "maxmin"
    ALL = "all"
    ERROR = "error"


def in_flight(stats: CData) -> int:
    """Return how many requests have begun and not ended, by a ``struct bdev_stats``."""
    ended: int = sum(stats.ops)  # first: what ends in between must not be missing
    return int(stats.begun) - ended


class Totals:
    """The statistics of one device, added up over reactors; see ``struct bdev_stats``.

    What is in flight is added by who knows that it still is.
    """

    def __init__(self) -> None:
        self.ops = [0] * len(Op)
        self.bytes = [0] * len(Op)
        self.ticks = [0] * len(Op)
        self.extremes: dict[Op, tuple[int, int]] = {}
        self.in_flight = 0

    def add(self, stats: CData) -> None:
        """Add what a slot says."""
        for op in Op:
            self.ops[op] += stats.ops[op]
            self.bytes[op] += stats.bytes[op]
            self.ticks[op] += stats.ticks[op]
        for op in Op:
            low, high = stats.min_ticks[op], stats.max_ticks[op]
            if low:
                known = self.extremes.get(op, (low, high))
                self.extremes[op] = (min(low, known[0]), max(high, known[1]))

    def add_totals(self, other: "Totals") -> None:
        """Add what was added up elsewhere."""
        for op in Op:
            self.ops[op] += other.ops[op]
            self.bytes[op] += other.bytes[op]
            self.ticks[op] += other.ticks[op]
        self.in_flight += other.in_flight
        for op, (low, high) in other.extremes.items():
            known = self.extremes.get(op, (low, high))
            self.extremes[op] = (min(low, known[0]), max(high, known[1]))

    def subtract(self, earlier: "Totals") -> None:
        """Count from an earlier point of time on."""
        for op in Op:
            self.ops[op] -= earlier.ops[op]
            self.bytes[op] -= earlier.bytes[op]
            self.ticks[op] -= earlier.ticks[op]

    def to_wire(self) -> dict[str, Any]:
        """Return SPDK's members, and how many requests are in flight."""
        wire: dict[str, Any] = {}
        for moved, count, op in _COUNTED.values():
            wire[moved] = self.bytes[op]
            wire[count] = self.ops[op]
        for verb, (_, _, op) in _COUNTED.items():
            low, high = self.extremes.get(op, (0, 0))
            wire[f"{verb}_latency_ticks"] = self.ticks[op]
            wire[f"max_{verb}_latency_ticks"] = high
            wire[f"min_{verb}_latency_ticks"] = low
        wire["io_error"] = {}
        wire["queue_depth"] = self.in_flight
        return wire


@provider
class StatisticsOperations:
    """``bdev_*_iostat``, ``bdev_*_histogram``, ``bdev_get_latency``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._earlier: dict[tuple[int, str], Totals] = {}
        # What the histograms had when somebody enabled SPDK's, and of which operations it is.
        self._enabled: dict[int, tuple[Histogram, tuple[Op, ...]]] = {}
        self._latency_since: dict[int, dict[Op, Histogram]] = {}
        self._samplers: dict[int, DepthSampler] = {}
        registry.on_forgotten(self._forget)
        registry.add_settings(self._settings, last=True)
        registry.at_end(self._stop_sampling)

    # --- counters

    @operation(aliases=["get_bdevs_iostat"])
    def bdev_get_iostat(
        self,
        names: list[str] | None = None,
        name: str | None = None,
        per_channel: bool = False,
        reset_mode: ResetMode = ResetMode.NONE,
    ) -> dict[str, Any]:
        """Return what was done to all devices, or to some, in all reactors or in each of them."""
        entries = []
        for bdev in self._find(names, name):
            entries.append({"name": bdev.name, **self._describe(bdev, per_channel)})
            self._reset(bdev, reset_mode)
        return {
            "tick_rate": lib.reactor_tick_rate(),
            "ticks": lib.reactor_ticks(),
            "bdevs": entries,
        }

    @operation
    def bdev_reset_iostat(self, name: str | None = None, mode: ResetMode = ResetMode.ALL) -> bool:
        """Count afresh, for all devices or one: everything, or the extremes of latency."""
        for bdev in self._find(None, name):
            self._reset(bdev, mode)
        return True

    def _find(self, names: list[str] | None, name: str | None) -> list[Bdev]:
        wanted = ([] if names is None else names) + ([] if name is None else [name])
        return [self._registry.find(one) for one in wanted] or list(self._registry)

    def _describe(self, bdev: Bdev, per_channel: bool) -> dict[str, Any]:
        if not per_channel:
            sampler = self._samplers.get(bdev.id)
            sampled = {} if sampler is None else sampler.to_wire()
            return self._read(bdev, self._reactors()).to_wire() | sampled
        channels = [
            {"thread": reactor.name, **self._read(bdev, [reactor]).to_wire()}
            for reactor in self._reactors()
        ]
        return {"channels": channels}

    def _reactors(self) -> Iterable[Reactor]:
        return self._registry.cluster.counting

    def _read(self, bdev: Bdev, reactors: Iterable[Reactor]) -> Totals:
        totals = Totals()
        for reactor in reactors:
            counted = reactor.stats.slot(bdev.slot, "struct bdev_stats")
            totals.add(counted)
            if reactor.alive:  # else it has gone with its process
                totals.in_flight += in_flight(counted)
            earlier = self._earlier.get((bdev.id, reactor.name))
            if earlier is not None:
                totals.subtract(earlier)
        return totals

    def _reset(self, bdev: Bdev, mode: ResetMode) -> None:
        if mode in (ResetMode.NONE, ResetMode.ERROR):
            return
        for reactor in self._reactors():
            stats = reactor.stats.slot(bdev.slot, "struct bdev_stats")
            if mode is ResetMode.ALL:
                self._earlier[bdev.id, reactor.name] = totals = Totals()
                totals.add(stats)
            for op in Op:
                stats.min_ticks[op] = stats.max_ticks[op] = 0
        if mode is ResetMode.ALL:
            self._latency_since[bdev.id] = {op: self._histogram(bdev, [op]) for op in Op}

    # --- queue depths

    @operation(aliases=["set_bdev_qd_sampling_period"])
    def bdev_set_qd_sampling_period(self, name: str, period: int) -> bool:
        """Sample how many requests are in flight, every ``period`` microseconds; 0 ends it.

        ``bdev_get_iostat`` then tells how long there were any. Samples are at least a millisecond
        apart, each counts for the time since the last one.
        """
        if not 0 <= period <= MAX_PERIOD:
            text = f"period {period}: must be 0 (none) to {MAX_PERIOD} microseconds"
            raise OperationError(-errno.EINVAL, text)
        bdev = self._registry.find(name)
        self._stop_sampling(bdev)
        if period:
            self._samplers[bdev.id] = DepthSampler(
                period, lambda: self._read(bdev, self._reactors()).in_flight
            )
        return True

    def _stop_sampling(self, *bdevs: Bdev) -> None:
        """Of these devices, or of all."""
        for number in [bdev.id for bdev in bdevs] or list(self._samplers):
            sampler = self._samplers.pop(number, None)
            if sampler is not None:
                sampler.stop()

    def _settings(self) -> list[dict[str, Any]]:
        return [
            {
                "method": "bdev_set_qd_sampling_period",
                "params": {"name": bdev.name, "period": self._samplers[bdev.id].period},
            }
            for bdev in self._registry
            if bdev.id in self._samplers
        ]

    # --- latencies

    def _histogram(self, bdev: Bdev, ops: Iterable[Op]) -> Histogram:
        total = Histogram()
        for reactor in self._reactors():
            shown = reactor.stats.annex(bdev.slot, "struct bdev_histograms")
            for op in ops:
                if reactor.stats.slot(bdev.slot, "struct bdev_stats").ops[op]:
                    total.add(shown.bucket[op])
        return total

    @operation(aliases=["enable_bdev_histogram"])
    def bdev_enable_histogram(
        self,
        name: str,
        enable: bool,
        opc: Opc | None = None,
        granularity: int | None = None,
        min_nsec: int | None = None,
        max_nsec: int | None = None,
    ) -> bool:
        """Have ``bdev_get_histogram`` count from now on, all operations or those of ``opc``.

        Reactors always count; the buckets are theirs, so that their size and ends cannot be chosen.
        """
        for parameter, value in (
            ("granularity", None if granularity == lib.BDEV_HISTOGRAM_BITS else granularity),
            ("min_nsec", min_nsec),
            ("max_nsec", max_nsec),
        ):
            if value:
                text = f"{parameter} {value}: buckets are fixed, 8 to a power of two; leave it out"
                raise OperationError(-errno.EINVAL, text)
        bdev = self._registry.find(name)
        if enable:
            ops = tuple(Op) if opc is None else (Op[opc.upper()],)
            self._enabled[bdev.id] = self._histogram(bdev, ops), ops
        else:
            self._enabled.pop(bdev.id, None)
        return True

    @operation(aliases=["get_bdev_histogram"])
    def bdev_get_histogram(self, name: str) -> dict[str, Any]:
        """Return the latencies since ``bdev_enable_histogram``."""
        return self._enabled_histogram(name).to_wire()

    @operation
    def bdev_get_histogram_borders(self, name: str, borders: list[int]) -> dict[str, Any]:
        """Return how many latencies were below each of these microseconds, and how many in all.

        Those since ``bdev_enable_histogram``, by whole buckets; ``borders`` are ascending.
        """
        if not borders or borders != sorted(set(borders)) or borders[0] < 0:
            text = f"borders {borders!s:.80}: must be microseconds, at least one, ascending"
            raise OperationError(-errno.EINVAL, text)
        histogram = self._enabled_histogram(name)
        ticks = [border * lib.reactor_tick_rate() // _MICROSECONDS for border in borders]
        return {"borders_count": [*map(histogram.below, ticks), histogram.total]}

    def _enabled_histogram(self, name: str) -> Histogram:
        bdev = self._registry.find(name)
        if bdev.id not in self._enabled:
            text = f"bdev {name}: no histogram; bdev_enable_histogram begins one"
            raise OperationError(-errno.EFAULT, text)
        earlier, ops = self._enabled[bdev.id]
        return self._histogram(bdev, ops).since(earlier)

    @operation
    def bdev_get_latency(
        self, name: str | None = None, percentiles: list[float] | None = None
    ) -> list[dict[str, Any]]:
        """Return latencies in microseconds, by operation: percentiles, mean and extremes.

        Of all devices or one, since they were created or ``bdev_reset_iostat``. A percentile is
        the upper end of a bucket: at most an eighth more than the latency itself.
        """
        wanted = PERCENTILES if percentiles is None else tuple(percentiles)
        for percent in wanted:
            if not 0 < percent <= 100:
                text = f"percentiles {percent:g}: must be more than 0 and at most 100"
                raise OperationError(-errno.EINVAL, text)
        return [
            {"name": bdev.name, "operations": self._latencies(bdev, wanted)}
            for bdev in self._find(None, name)
        ]

    def _latencies(self, bdev: Bdev, percentiles: Iterable[float]) -> dict[str, Any]:
        tick = _MICROSECONDS / lib.reactor_tick_rate()
        totals = self._read(bdev, self._reactors())
        since = self._latency_since.get(bdev.id, {})
        described = {}
        for op in Op:
            counted = self._histogram(bdev, [op]).since(since.get(op, Histogram()))
            if not counted.total:
                continue
            low, high = totals.extremes.get(op, (0, 0))
            described[op.name.lower()] = {
                "count": counted.total,
                "mean_us": round(totals.ticks[op] / max(totals.ops[op], 1) * tick, 3),
                "min_us": round(low * tick, 3),
                "max_us": round(high * tick, 3),
                "percentiles_us": {
                    f"{percent:g}": round(counted.percentile(percent) * tick, 3)
                    for percent in percentiles
                },
            }
        return described

    def _forget(self, bdev: Bdev) -> None:
        self._stop_sampling(bdev)
        self._enabled.pop(bdev.id, None)
        self._latency_since.pop(bdev.id, None)
        for key in [key for key in self._earlier if key[0] == bdev.id]:
            del self._earlier[key]
