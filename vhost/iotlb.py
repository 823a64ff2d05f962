"""What a front-end's IOMMU has told of itself: from I/O virtual addresses to its own addresses.

Plain data, a part of the session's record. Reactors have copies: vhost/iotlb.h.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vhost.payloads import IotlbMessage, Region

MAX_ENTRIES = 16384  # IOTLB_ENTRIES of vhost/iotlb.h: 64 MiB even of pages of 4 KiB

READ, WRITE = IotlbMessage.READ, IotlbMessage.WRITE


@dataclass(frozen=True, slots=True)
class Translation:
    """``size`` bytes at ``iova`` are at the front-end's ``user`` address, for ``access``."""

    iova: int
    size: int
    user: int
    access: int

    @property
    def last(self) -> int:
        """The last address."""
        return self.iova + self.size - 1

    def as_list(self) -> list[int]:
        """Return vhost.worker.TranslationArgs."""
        return [self.iova, self.size, self.user, self.access]


class Iotlb:
    """A cache of translations, of which no two overlap: anything in it may be forgotten.

    Whoever asks for what is not there has to ask the front-end (vhost.translation).
    """

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._limit = limit
        self._entries: dict[int, Translation] = {}  # by IOVA, the oldest first
        self._order: list[int] = []  # the IOVAs, sorted

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Sequence[Translation]:
        """Return all, the oldest first."""
        return list(self._entries.values())

    def add(self, entry: Translation) -> list[Translation]:
        """Learn a translation; return those forgotten for it: what it overlaps, or the oldest."""
        forgotten = self.remove(entry.iova, entry.last)
        if len(self._entries) >= self._limit:
            oldest = next(iter(self._entries.values()))
            forgotten += self.remove(oldest.iova, oldest.last)
        self._entries[entry.iova] = entry
        insort(self._order, entry.iova)
        return forgotten

    def remove(self, first: int, last: int) -> list[Translation]:
        """Forget and return every entry that has an address of ``first`` to ``last``."""
        begin = end = self._first_after(first)
        while end < len(self._order) and self._order[end] <= last:
            end += 1
        removed = [self._entries.pop(iova) for iova in self._order[begin:end]]
        del self._order[begin:end]
        return removed

    def keep(self, regions: Iterable[Region]) -> None:
        """Forget what is not in one of ``regions``."""
        table = list(regions)
        for entry in self.entries():
            if not any(region.holds(entry.user, entry.size) for region in table):
                self.remove(entry.iova, entry.last)

    def missing(self, iova: int, size: int, access: int) -> int | None:
        """Return the first address of a range that is not known for ``access``, None if all is."""
        end = iova + size
        while iova < end:
            entry = self._find(iova)
            if entry is None or entry.access & access != access:
                return iova
            iova = entry.last + 1
        return None

    def translate(self, iova: int, size: int, access: int) -> int | None:
        """Return the front-end's address of a range, None if there is not one for all of it."""
        first = self._find(iova)
        if first is None or self.missing(iova, size, access) is not None:
            return None
        distance = first.user - first.iova
        entry = first
        while entry.last < iova + size - 1:
            following = self._find(entry.last + 1)
            if following is None or following.user - following.iova != distance:
                return None
            entry = following
        return iova + distance

    def _first_after(self, iova: int) -> int:
        """Return the place of the first entry that ends at ``iova`` or later."""
        place = bisect_left(self._order, iova)
        if place and self._entries[self._order[place - 1]].last >= iova:
            return place - 1
        return place

    def _find(self, iova: int) -> Translation | None:
        place = self._first_after(iova)
        if place == len(self._order) or self._order[place] > iova:
            return None
        return self._entries[self._order[place]]
