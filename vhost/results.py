"""What a workload did: counts, latencies, and data that were wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Data read that was not what had been written: eight bytes at ``offset`` of the device."""

    offset: int
    expected: bytes
    got: bytes


@dataclass(slots=True)
class Direction:
    """Results of reads or of writes. Latencies are in seconds."""

    ops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    latency_sum: float = 0.0
    latency_min: float = math.inf
    latency_max: float = 0.0
    histogram: dict[float, int] = field(default_factory=dict)

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.ops / self.seconds if self.seconds else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def mean(self) -> float:
        """Mean latency."""
        return self.latency_sum / self.ops if self.ops else 0.0

    def percentile(self, percent: float) -> float:
        """Return a latency that ``percent`` of the requests did not exceed, to within 1.6 %."""
        wanted = math.ceil(self.ops * percent / 100)
        seen = 0
        for latency in sorted(self.histogram):
            seen += self.histogram[latency]
            if seen >= wanted:
                return min(latency, self.latency_max)
        return self.latency_max

    def add(self, other: Direction) -> None:
        """Count another queue's results to these."""
        self.ops += other.ops
        self.bytes += other.bytes
        self.seconds = max(self.seconds, other.seconds)
        self.latency_sum += other.latency_sum
        self.latency_min = min(self.latency_min, other.latency_min)
        self.latency_max = max(self.latency_max, other.latency_max)
        for latency, count in other.histogram.items():
            self.histogram[latency] = self.histogram.get(latency, 0) + count

    def to_json(self) -> dict[str, Any]:
        """Return figures in units that people compare: µs, IOPS, bytes a second."""
        return {
            "ops": self.ops,
            "bytes": self.bytes,
            "iops": self.iops,
            "bandwidth": self.bandwidth,
            "latency_us": {
                "min": self.latency_min * 1e6 if self.ops else 0.0,
                "mean": self.mean * 1e6,
                "max": self.latency_max * 1e6,
                **{f"p{percent:g}": self.percentile(percent) * 1e6 for percent in PERCENTILES},
            },
        }


@dataclass(slots=True)
class Results:
    """What a workload did."""

    read: Direction = field(default_factory=Direction)
    write: Direction = field(default_factory=Direction)
    seconds: float = 0.0
    errors: int = 0
    first_error: str = ""
    verified: int = 0
    unwritten: int = 0
    mismatches: int = 0
    mismatch: list[Mismatch] = field(default_factory=list)
    kicks: int = 0

    @property
    def total(self) -> Direction:
        """Reads and writes together."""
        both = Direction()
        both.add(self.read)
        both.add(self.write)
        return both

    @property
    def good(self) -> bool:
        """Whether every request succeeded and all data were right."""
        return not self.errors and not self.mismatches

    def add(self, other: Results) -> None:
        """Count another queue's results to these."""
        self.read.add(other.read)
        self.write.add(other.write)
        self.seconds = max(self.seconds, other.seconds)
        self.errors += other.errors
        self.first_error = self.first_error or other.first_error
        self.verified += other.verified
        self.unwritten += other.unwritten
        self.mismatches += other.mismatches
        self.mismatch += other.mismatch
        self.kicks += other.kicks

    def to_json(self) -> dict[str, Any]:
        """Return everything but the histograms."""
        return {
            "seconds": self.seconds,
            "read": self.read.to_json(),
            "write": self.write.to_json(),
            "total": self.total.to_json(),
            "errors": self.errors,
            "first_error": self.first_error,
            "verified_blocks": self.verified,
            "unwritten_sectors": self.unwritten,
            "mismatches": self.mismatches,
            "mismatch": [
                {"offset": m.offset, "expected": m.expected.hex(), "got": m.got.hex()}
                for m in self.mismatch
            ],
            "kicks": self.kicks,
        }
