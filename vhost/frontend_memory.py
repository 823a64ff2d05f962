"""The memory that a front-end shares with its back-end, and the virtqueues in it.

Addresses are guest-physical unless a name says otherwise. The front-end's virtual addresses are
those of its own mappings, as for a virtual machine monitor.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Self

from reactor.errors import check
from reactor.native import CData, ffi, lib
from vhost.frontend_link import FrontendError
from vhost.payloads import Region, VringAddr

GUEST_BASE = 1 << 30  # not 0, so that an address that was left out is outside of memory
HOLE = 1 << 20  # bytes between regions, so that running past the end of one is seen
PAGE = mmap.PAGESIZE

_UNIT = 64  # bytes

Buffer = tuple[int, int, bool]  # address, bytes, whether the device writes it


class FrontendMemory:
    """Regions of shared memory, each a file's, and an allocator over them.

    ``size`` bytes in all, divided among ``regions``, with ``hole`` bytes of guest-physical
    addresses between them: 0 makes them adjacent, so that a buffer may cross from one into the
    next. ``backing`` returns a descriptor and where in its file a region of so many bytes begins,
    by default a new memfd; the descriptor is the memory's from then on.
    """

    def __init__(
        self,
        size: int,
        *,
        regions: int = 1,
        hole: int = HOLE,
        backing: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        each = -(-size // (regions * PAGE)) * PAGE
        self.regions: list[Region] = []
        self.fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._free: list[tuple[int, int]] = []
        self._backing = backing or new_memfd
        try:
            for place in range(regions):
                self._add_region(GUEST_BASE + place * (each + hole), each)
        except BaseException:
            self.close()
            raise

    def _add_region(self, guest: int, size: int) -> None:
        fd, offset = self._backing(size)
        self.fds.append(fd)
        mapped = mmap.mmap(fd, size, offset=offset)
        with suppress(OSError):  # fewer TLB misses, where the kernel does that for shared memory
            mapped.madvise(mmap.MADV_HUGEPAGE)
        self._maps.append(mapped)
        user = int(ffi.cast("uintptr_t", ffi.from_buffer(mapped)))
        self.regions.append(Region(guest, size, user, offset))
        self._free.append((guest, size))

    def close(self) -> None:
        """Give the memory back. No queue may use it any more."""
        for mapped in self._maps:
            mapped.close()
        for fd in self.fds:
            os.close(fd)
        self._maps.clear()
        self.fds.clear()
        self.regions.clear()

    def allocate(self, size: int, alignment: int = 64) -> int:
        """Return the address of ``size`` bytes in one region; MemoryError if there is no room."""
        size = _rounded(size)
        for place, (start, room) in enumerate(self._free):
            address = -(-start // alignment) * alignment
            end = address + size
            if end <= start + room:
                rest = [(start, address - start), (end, start + room - end)]
                self._free[place : place + 1] = [part for part in rest if part[1]]
                return address
        free = sum(room for _start, room in self._free)
        raise MemoryError(
            f"guest memory: no {size} bytes in one piece, {free} are free: ask for more memory"
        )

    def free(self, address: int, size: int) -> None:
        """Give back what allocate() returned."""
        size = _rounded(size)
        place = first = bisect(self._free, (address, size))
        last = place
        if (
            place
            and sum(self._free[place - 1]) == address
            and self._same_region(address - 1, address)
        ):
            first = place - 1
        if place < len(self._free) and self._free[place][0] == address + size:
            last = place + int(self._same_region(address, address + size))
        joined = [*self._free[first:place], (address, size), *self._free[place:last]]
        self._free[first:last] = [(joined[0][0], sum(room for _, room in joined))]

    def _same_region(self, one: int, other: int) -> bool:
        return self._find(one) == self._find(other)

    def _find(self, address: int) -> int:
        for place, region in enumerate(self.regions):
            if region.guest <= address < region.guest + region.size:
                return place
        raise ValueError(f"{address:#x} is not in guest memory")

    def _pieces(self, address: int, size: int) -> Iterator[tuple[mmap.mmap, int, int]]:
        """Yield map, offset and bytes of each region's part of a range."""
        while size:
            place = self._find(address)
            region = self.regions[place]
            offset = address - region.guest
            length = min(size, region.size - offset)
            yield self._maps[place], offset, length
            address += length
            size -= length

    def read(self, address: int, size: int) -> bytes:
        """Return bytes; ValueError outside of memory."""
        return b"".join(
            mapped[offset : offset + length]
            for mapped, offset, length in self._pieces(address, size)
        )

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes; ValueError outside of memory."""
        view = memoryview(data).cast("B")
        for mapped, offset, length in self._pieces(address, len(view)):
            mapped[offset : offset + length] = bytes(view[:length])
            view = view[length:]

    def user(self, address: int) -> int:
        """Return the front-end's virtual address; ValueError outside of memory."""
        region = self.regions[self._find(address)]
        return address - region.guest + region.user

    def pointer(self, address: int) -> CData:
        """Return a ``void *`` for C; the caller keeps to what it allocated."""
        return ffi.cast("void *", self.user(address))


def new_memfd(size: int) -> tuple[int, int]:
    """Return a memfd of ``size`` bytes, and 0."""
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd, 0


def _rounded(size: int) -> int:
    """Return the bytes that are taken for ``size``: no slivers that would fit nothing."""
    return max(1, -(-size // _UNIT)) * _UNIT


PACKED_BASE = 0x8000_8000  # index 0 and a wrap counter of 1, for what is available and what is used


class DriverQueue:
    """The driver's side of one virtqueue in ``memory``, split or ``packed``; owns its eventfds.

    Normal use is ``add``, ``publish``, ``wait``, ``reap``. ``write_descriptor`` puts anything into
    the ring, as do ``add_head`` and ``set_avail_idx`` with a split one. ``avail`` and ``used`` are
    the areas of those rings; of a packed one the event suppression of driver and device.
    """

    def __init__(
        self,
        memory: FrontendMemory,
        index: int,
        size: int,
        *,
        event_idx: bool = False,
        packed: bool = False,
    ) -> None:
        self.memory = memory
        self.index = index
        self.size = size
        self.packed = packed
        self.stopped_at = PACKED_BASE
        """Of a packed ring: where the device stood when it last said so (SET_VRING_BASE)."""
        avail, used = (4, 4) if packed else (6 + 2 * size, 6 + 8 * size)
        self._parts = [(16 * size, 16), (avail, 64), (used, 64)]
        addresses = [memory.allocate(length, alignment) for length, alignment in self._parts]
        self.desc, self.avail, self.used = addresses
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kick_fd, self.call_fd, self.error_fd = (os.eventfd(0, flags) for _ in range(3))
        for address, (length, _alignment) in zip(addresses, self._parts, strict=True):
            memory.write(address, bytes(length))
        desc, avail, used = (memory.pointer(address) for address in addresses)
        self.native = lib.front_queue_create(
            desc, avail, used, size, event_idx, packed, self.kick_fd, self.call_fd
        )
        if self.native == ffi.NULL:
            error = ffi.errno
            self.close()
            kind = "at most 32768" if packed else "a power of two to 32768"
            raise ValueError(f"queue size {size}: {os.strerror(error)}: {kind}")
        self._used = ffi.new("struct front_used[]", size)
        self._tables: dict[int, tuple[int, int]] = {}

    def close(self) -> None:
        """Free everything; the back-end must have let go of the queue."""
        if self.native is not None:
            lib.front_queue_destroy(self.native)
            self.native = None
            for fd in (self.kick_fd, self.call_fd, self.error_fd):
                os.close(fd)
            addresses = (self.desc, self.avail, self.used)
            for address, (length, _alignment) in zip(addresses, self._parts, strict=True):
                self.memory.free(address, length)

    def addresses(self) -> VringAddr:
        """Return what SET_VRING_ADDR says."""
        user = self.memory.user
        return VringAddr(self.index, 0, user(self.desc), user(self.used), user(self.avail), 0)

    def add(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Make a chain available, unpublished; returns its head.

        Raises OSError: ENOSPC when there are too few free descriptors.
        """
        native = ffi.new("struct front_buffer[]", [tuple(buffer) for buffer in buffers])
        address, length = 0, 16 * len(buffers)
        table = ffi.NULL
        if indirect:
            address = self.memory.allocate(length, 16)
            table = self.memory.pointer(address)
        rc = lib.front_queue_add(self.native, native, len(buffers), table, address)
        if indirect:
            if rc < 0:
                self.memory.free(address, length)
            else:
                self._tables[rc] = (address, length)
        return check(rc, "front_queue_add")

    def publish(self) -> None:
        """Let the device see what was added, and kick it if it wants to be."""
        check(lib.front_queue_publish(self.native), "kick")

    def kick(self) -> None:
        """Kick the device whether it wants that or not."""
        check(lib.front_queue_kick(self.native), "kick")

    def reap(self) -> list[tuple[int, int]]:
        """Return (head, bytes written) of the chains that came back, in order."""
        count = lib.front_queue_reap(self.native, self._used, self.size)
        if count == -errno.EPROTO:
            raise FrontendError(
                f"queue {self.index}: the back-end put an entry into the used ring for a chain "
                "that it does not have"
            )
        found = [(self._used[i].head, self._used[i].written) for i in range(count)]
        for head, _written in found:
            if head in self._tables:
                self.memory.free(*self._tables.pop(head))
        return found

    def wait(self, timeout: float, spin: float = 50e-6) -> bool:
        """Wait until a chain comes back, polling for ``spin`` seconds; False after ``timeout``."""
        end = time.monotonic() + timeout
        while True:
            left = max(0, int((end - time.monotonic()) * 1e9))
            rc = lib.front_queue_wait(self.native, left, int(min(spin, timeout) * 1e9))
            if rc != -errno.EINTR:
                return check(rc, "poll") > 0

    def broken(self) -> bool:
        """Tell whether the back-end signalled the error eventfd since the last call."""
        try:
            return os.eventfd_read(self.error_fd) > 0
        except BlockingIOError:
            return False

    @property
    def pending(self) -> int:
        """How many chains the device has."""
        return int(lib.front_queue_pending(self.native))

    @property
    def kicks(self) -> int:
        """How many kicks were sent."""
        return int(lib.front_queue_kicks(self.native))

    @property
    def base(self) -> int:
        """Where the device goes on, as SET_VRING_BASE says it.

        What was made available and not used is the device's to take (again). A packed ring does
        not show where the device stands: the device says it when it stops, or its in-flight log.
        """
        return self.stopped_at if self.packed else self.used_idx

    @property
    def used_idx(self) -> int:
        """The device's index of a split ring, as it stands in memory."""
        return int(struct.unpack("<H", self.memory.read(self.used + 2, 2))[0])

    def used_entry(self, place: int) -> tuple[int, int]:
        """Return (id, len) of an entry of the used ring."""
        raw = self.memory.read(self.used + 4 + 8 * (place % self.size), 8)
        head, written = struct.unpack("<II", raw)
        return head, written

    def write_descriptor(
        self, place: int, addr: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Write any descriptor, of ``add``'s or not: ``add`` takes them from 0 upwards.

        Of a packed ring ``following`` is the identifier.
        """
        last = (following, flags) if self.packed else (flags, following)
        raw = struct.pack("<QIHH", addr, length, *last)
        self.memory.write(self.desc + 16 * place, raw)

    def add_head(self, head: int) -> None:
        """Make a head available, unpublished, whatever stands there."""
        lib.front_queue_add_head(self.native, head)

    def set_avail_idx(self, value: int) -> None:
        """Let the device see an index of the avail ring that add() did not make."""
        self.memory.write(self.avail + 2, struct.pack("<H", value & 0xFFFF))

    def forget(self) -> None:
        """Take what the device has as lost: its descriptors are free again."""
        lib.front_queue_reset(self.native)
        for table in self._tables.values():
            self.memory.free(*table)
        self._tables.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
