"""Latency histograms, as reactors count them (bdev/bdev.h) and as SPDK's clients read them."""

import base64
import struct
from collections.abc import Iterable
from typing import Any

from reactor.native import CData, ffi, lib

_FIRST = 1 << lib.BDEV_HISTOGRAM_BITS  # buckets of a range


class Histogram:
    """How often a latency was in each of the buckets of ``struct bdev_histograms``."""

    def __init__(self, counts: Iterable[int] = ()) -> None:
        self.counts = list(counts) or [0] * lib.BDEV_HISTOGRAM_BUCKETS

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def add(self, bucket: CData) -> None:
        """Add the counts that a reactor shows."""
        shown = ffi.unpack(bucket, lib.BDEV_HISTOGRAM_BUCKETS)
        self.counts = [mine + its for mine, its in zip(self.counts, shown, strict=True)]

    def since(self, earlier: "Histogram") -> "Histogram":
        """Return what has been counted since ``earlier``."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Histogram(now - then for now, then in pairs)

    def percentile(self, percent: float) -> int:
        """Return the upper end, in ticks, of the bucket that ``percent`` end in; 0: none."""
        wanted = self.total * percent / 100
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return bucket_end(index)
        return 0

    def below(self, ticks: int) -> int:
        """Return how many are in buckets that end before ``ticks``."""
        return sum(n for index, n in enumerate(self.counts) if n and bucket_end(index) < ticks)

    def to_wire(self) -> dict[str, Any]:
        """Return SPDK's members: ranges of buckets, as numbers of 64 bits in base64."""
        packed = struct.pack(f"<{len(self.counts)}Q", *self.counts)
        return {
            "histogram": base64.b64encode(packed).decode(),
            "granularity": lib.BDEV_HISTOGRAM_BITS,
            "min_range": 0,
            "max_range": lib.BDEV_HISTOGRAM_RANGES - 1,
            "tsc_rate": lib.reactor_tick_rate(),
        }


def bucket_end(index: int) -> int:
    """Return the largest number of ticks that is counted in a bucket."""
    if index < 2 * _FIRST:
        return index
    shift = index // _FIRST - 1
    return ((index % _FIRST + _FIRST + 1) << shift) - 1
