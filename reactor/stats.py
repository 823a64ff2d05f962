"""Statistics in shared memory: written by one reactor, mapped by the control process.

An area is a memfd: ``struct reactor_counters``, then slots of 512 bytes whose meaning belongs to
whoever allocated the slot's number (``struct bdev_stats``, ``struct queue_stats``), then an annex
of 24 KiB for each slot (``struct bdev_histograms``). A slot has the same number in every reactor,
so that the reader can sum over them. The area outlives the reactor.
"""

from __future__ import annotations

import heapq
import mmap
import os

from reactor.native import CData, ffi, lib

DEFAULT_SLOTS = 16384


class SlotAllocator:
    """Hands out slot numbers, the lowest free one first."""

    def __init__(self, slots: int = DEFAULT_SLOTS) -> None:
        self.slots = slots
        self._next = 0
        self._free: list[int] = []

    def allocate(self) -> int:
        """Return a free number; OSError(ENOSPC) when there is none."""
        if self._free:
            return heapq.heappop(self._free)
        if self._next == self.slots:
            raise OSError(28, f"all {self.slots} statistics slots are in use")
        self._next += 1
        return self._next - 1

    def free(self, slot: int) -> None:
        """Give a number back."""
        heapq.heappush(self._free, slot)


class StatsArea:
    """One reactor's area, as its writer or a reader maps it."""

    def __init__(self, fd: int) -> None:
        """Map the area behind ``fd``, which becomes ours to close."""
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        each = lib.REACTOR_SLOT_SIZE + lib.REACTOR_ANNEX_SIZE
        self.slots = (len(self._map) - lib.REACTOR_SLOTS_OFFSET) // each
        self._annexes = lib.reactor_annexes_offset(self.slots)
        self.address: CData = ffi.from_buffer("char[]", self._map)
        self._counters = ffi.cast("struct reactor_counters *", self.address)

    @classmethod
    def create(cls, slots: int = DEFAULT_SLOTS) -> StatsArea:
        """Make a new area; its pages take memory only once they are written."""
        fd = os.memfd_create("reactor-stats", os.MFD_CLOEXEC)
        os.ftruncate(fd, lib.reactor_annexes_offset(slots) + slots * lib.REACTOR_ANNEX_SIZE)
        return cls(fd)

    @property
    def counters(self) -> dict[str, int]:
        """The reactor's own counters by name; times are in ticks, ``tick_rate`` a second."""
        fields = ffi.typeof("struct reactor_counters").fields or []
        return {name: getattr(self._counters, name) for name, _ in fields}

    def slot(self, index: int, ctype: str) -> CData:
        """Return slot ``index`` as a pointer to ``ctype``, e.g. ``"struct bdev_stats"``."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of {self.slots}")
        offset = lib.REACTOR_SLOTS_OFFSET + index * lib.REACTOR_SLOT_SIZE
        return ffi.cast(f"{ctype} *", self.address + offset)

    def annex(self, index: int, ctype: str) -> CData:
        """Return the annex of slot ``index``, e.g. ``"struct bdev_histograms"``."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of {self.slots}")
        offset = self._annexes + index * lib.REACTOR_ANNEX_SIZE
        return ffi.cast(f"{ctype} *", self.address + offset)

    def clear_slot(self, index: int) -> None:
        """Zero a slot and its annex, whose memory goes back, before they get another meaning."""
        ffi.memmove(self.slot(index, "char"), bytes(lib.REACTOR_SLOT_SIZE), lib.REACTOR_SLOT_SIZE)
        annex = self._annexes + index * lib.REACTOR_ANNEX_SIZE
        self._map.madvise(mmap.MADV_REMOVE, annex, lib.REACTOR_ANNEX_SIZE)

    def close(self) -> None:
        """Unmap the area and close its descriptor."""
        self._counters = ffi.NULL
        ffi.release(self.address)
        self._map.close()
        os.close(self.fd)
