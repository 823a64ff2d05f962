"""The driver's side of one virtqueue, byte by byte, in the process of the device.

Tests use it to write rings that no real driver would, and to look at what the device did to them.
The device is the real ``struct blk_queue``, polled by hand through ``reactor_poll()``.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reactor.native import CData, ffi, lib

NEXT, WRITE, INDIRECT = 1, 2, 4
EVENT_IDX, INDIRECT_DESC, VERSION_1 = 1 << 29, 1 << 28, 1 << 32
RING_PACKED, IN_ORDER, NOTIFY_ON_EMPTY = 1 << 34, 1 << 35, 1 << 24
PACKED_AVAIL, PACKED_USED = 1 << 7, 1 << 15
EVENTS_ENABLE, EVENTS_DISABLE, EVENTS_DESC = 0, 1, 2

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2

USER_BASE = 0x7000_0000_0000  # where the front-end pretends to have its memory
DATA = 0x20000  # offsets in memory below this are the rings'


@dataclass
class Buffer:
    """One descriptor: ``writable`` by the device or readable."""

    addr: int
    len: int
    writable: bool = False


@dataclass
class Notices:
    """What the device said."""

    broken: list[str] = field(default_factory=list)
    drained: int = 0
    log: list[str] = field(default_factory=list)


class Driver:
    """Guest memory, one ring in it, and a device that serves it from ``bdev``."""

    def __init__(
        self,
        reactor: CData,
        bdev: CData,
        *,
        size: int = 16,
        features: int = VERSION_1 | INDIRECT_DESC,
        memory: int = 1 << 20,
        regions: Sequence[tuple[int, int, int]] | None = None,
        readonly: bool = False,
        write_through: bool = False,
        log_used: bool = False,
        start: bool = True,
    ) -> None:
        self.reactor, self.bdev, self.size, self.features = reactor, bdev, size, features
        self.log_used = log_used
        self.readonly, self.write_through = readonly, write_through
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, memory)
        self.mem = mmap.mmap(self.fd, memory)
        self.log_size = lib.vq_inflight_size(size)
        self.log_fd = os.memfd_create("log")
        os.ftruncate(self.log_fd, self.log_size)
        self.log = mmap.mmap(self.log_fd, self.log_size)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kick, self.call, self.error = (os.eventfd(0, flags) for _ in range(3))
        self.desc, self.avail, self.used = 0, 0x10000, 0x18000
        self.avail_idx = self.seen_used = 0
        self.notices = Notices()
        self.table = self.map_memory(regions or [(0, memory, 0)])
        self.queue: CData | None = None
        if start:
            self.start()

    def map_memory(self, regions: Iterable[tuple[int, int, int]]) -> CData:
        """Map (guest address, size, file offset) regions; user address = USER_BASE + offset."""
        items = [(guest, size, USER_BASE + off, off, self.fd) for guest, size, off in regions]
        table = lib.guest_memory_create(ffi.new("struct guest_region[]", items), len(items))
        if table == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return table

    def start(self, *, base: int = 0, recover: bool = False, **changes: int) -> None:
        """Attach the device to the ring; OSError when it refuses."""
        setup = {
            "id": 1,
            "size": self.size,
            "base": base,
            "features": self.features,
            "desc": USER_BASE + self.desc,
            "avail": USER_BASE + self.avail,
            "used": USER_BASE + self.used,
            "log_used": self.log_used,
            "used_log": self.used,
            "kick_fd": self.kick,
            "call_fd": self.call,
            "error_fd": self.error,
            "inflight_fd": self.log_fd,
            "inflight_offset": 0,
            "inflight_size": self.log_size,
            "recover": recover,
        } | changes
        blk = {
            "slot": 0,
            "readonly": self.readonly,
            "write_through": self.write_through,
            "discard": True,
            "write_zeroes": True,
            "max_discard_sectors": 1 << 20,
            "max_discard_segments": 8,
            "serial": b"serial-of-the-disk",
        }
        queue = lib.blk_queue_start(
            self.reactor,
            self.table,
            self.bdev,
            ffi.new("struct vq_setup *", setup),
            ffi.new("struct blk_setup *", blk),
        )
        if queue == ffi.NULL:
            error = ffi.errno
            self.poll()
            raise OSError(error, os.strerror(error))
        self.queue = queue

    def stop(self) -> int:
        """Drain and detach; returns the base, as GET_VRING_BASE would."""
        assert self.queue is not None
        lib.queue_stop(self.queue)
        before = self.notices.drained
        for _ in range(1000):
            self.poll()
            if self.notices.drained > before:
                break
        assert self.notices.drained == before + 1
        base = lib.queue_base(self.queue)
        lib.queue_free(self.queue)
        self.queue = None
        return int(base)

    def kill(self) -> None:
        """Free the device as if its process were gone: nothing more is written to ring or log."""
        ring, log = bytes(self.mem), bytes(self.log)
        self.stop()
        self.mem[:], self.log[:] = ring, log

    def close(self) -> None:
        """Detach, and give everything back."""
        if self.queue is not None:
            self.stop()
        assert lib.guest_memory_references(self.table) == 1
        lib.guest_memory_put(self.table)
        self.mem.close()
        self.log.close()
        for fd in (self.fd, self.log_fd, self.kick, self.call, self.error):
            os.close(fd)

    def poll(self, turns: int = 3) -> None:
        """Let the device work for some turns."""
        events = ffi.new("struct reactor_event[1]")
        notice = ffi.new("struct reactor_notice *")
        for _ in range(turns):
            assert lib.reactor_poll(self.reactor, 0, events, 1) >= 0
            while lib.reactor_next_notice(self.reactor, notice):
                text = ffi.string(notice.text).decode()
                if notice.kind == lib.NOTICE_BROKEN:
                    self.notices.broken.append(text)
                elif notice.kind == lib.NOTICE_DRAINED:
                    self.notices.drained += 1
                else:
                    self.notices.log.append(text)

    # --- the ring ---------------------------------------------------------------------------------

    def put_desc(
        self, index: int, addr: int, length: int, flags: int = 0, nxt: int = 0, table: int = 0
    ) -> None:
        """Write one descriptor of the table at guest address ``table``."""
        struct.pack_into("<QIHH", self.mem, table + 16 * index, addr, length, flags, nxt)

    def put_chain(self, first: int, buffers: Sequence[Buffer], table: int = 0) -> None:
        """Write a chain of consecutive descriptors that begins at ``first``."""
        for i, buffer in enumerate(buffers):
            last = i == len(buffers) - 1
            flags = (WRITE if buffer.writable else 0) | (0 if last else NEXT)
            self.put_desc(first + i, buffer.addr, buffer.len, flags, first + i + 1, table)

    def offer(self, *heads: int) -> None:
        """Make heads available and kick if the device asks for it."""
        for head in heads:
            slot = self.avail + 4 + 2 * (self.avail_idx % self.size)
            struct.pack_into("<H", self.mem, slot, head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        struct.pack_into("<H", self.mem, self.avail + 2, self.avail_idx)
        if self.wants_kick(len(heads)):
            os.eventfd_write(self.kick, 1)

    def send(self, buffers: Sequence[Buffer], head: int = 0, *, table: int | None = None) -> None:
        """Offer a chain that begins at ``head``, or stands in an indirect table."""
        if table is None:
            self.put_chain(head, buffers)
        else:
            self.put_chain(0, buffers, table)
            self.put_desc(head, table, 16 * len(buffers), INDIRECT)
        self.offer(head)

    def wants_kick(self, count: int) -> bool:
        """Has the device asked for a kick for the last ``count`` entries?"""
        if self.features & EVENT_IDX:
            event = struct.unpack_from("<H", self.mem, self.used + 4 + 8 * self.size)[0]
            return (self.avail_idx - event - 1) & 0xFFFF < count
        return struct.unpack_from("<H", self.mem, self.used)[0] == 0

    def completed(self) -> list[tuple[int, int]]:
        """Return (head, length) of the used entries that are new."""
        idx = struct.unpack_from("<H", self.mem, self.used + 2)[0]
        found = []
        while self.seen_used != idx:
            slot = self.used + 4 + 8 * (self.seen_used % self.size)
            found.append(struct.unpack_from("<II", self.mem, slot))
            self.seen_used = (self.seen_used + 1) & 0xFFFF
        return found

    def calls(self) -> int:
        """Return how often the device has signalled since the last time."""
        try:
            return os.eventfd_read(self.call)
        except BlockingIOError:
            return 0

    # --- requests ---------------------------------------------------------------------------------

    def put_header(self, addr: int, kind: int, sector: int = 0) -> None:
        """Write a request's header."""
        struct.pack_into("<IIQ", self.mem, addr, kind, 0, sector)

    def request(
        self,
        kind: int,
        sector: int = 0,
        out: bytes = b"",
        into: int = 0,
        *,
        cut: Sequence[int] = (),
        indirect: bool = False,
    ) -> tuple[int, int, bytes]:
        """Carry out one request. Returns (status, used length, data read).

        ``cut`` lists offsets at which the stream of readable, then writable bytes is cut into
        further descriptors, whatever they separate.
        """
        header, status = DATA, DATA + 16 + len(out) + into
        self.put_header(header, kind, sector)
        self.mem[header + 16 : header + 16 + len(out)] = out
        self.mem[status : status + 1] = b"\xff"
        readable = 16 + len(out)
        total = readable + into + 1
        # The default: header, data and status each in its own.
        edges = {0, readable, total}
        edges |= set(cut) if cut else {16, total - 1}
        places = sorted(edge for edge in edges if 0 <= edge <= total)
        buffers = [
            Buffer(header + a, b - a, writable=a >= readable) for a, b in itertools.pairwise(places)
        ]
        self.send(buffers, table=DATA + 0x80000 if indirect else None)
        self.poll()
        done = self.completed()
        assert len(done) == 1, (done, self.notices)
        assert done[0][0] == 0
        return self.mem[status], done[0][1], bytes(self.mem[header + readable : status])


class PackedDriver(Driver):
    """The same with a packed ring (virtio 1.2, section 2.8); a chain is known by its identifier."""

    def __init__(
        self, *args: Any, features: int = VERSION_1 | INDIRECT_DESC, **options: Any
    ) -> None:
        self.place, self.wrap = 0, True
        self.used_place, self.used_wrap = 0, True
        self.lengths: dict[int, int] = {}  # descriptors of each chain in flight
        super().__init__(*args, features=features | RING_PACKED, **options)

    def start(self, *, base: int = 0x8000_8000, recover: bool = False, **changes: int) -> None:
        """Attach the device; the base says index 0 and both wrap counters 1."""
        super().start(base=base, recover=recover, **changes)

    def put_packed(self, place: int, addr: int, length: int, ident: int, flags: int) -> None:
        """Write one descriptor of the ring."""
        struct.pack_into("<QIHH", self.mem, self.desc + 16 * place, addr, length, ident, flags)

    def flags(self) -> int:
        """Return the flags that make a descriptor available now."""
        return PACKED_AVAIL if self.wrap else PACKED_USED

    def send(self, buffers: Sequence[Buffer], head: int = 0, *, table: int | None = None) -> None:
        """Offer a chain under the identifier ``head``."""
        descs = [(b.addr, b.len, WRITE if b.writable else 0) for b in buffers]
        if table is not None:
            for index, (addr, length, flags) in enumerate(descs):
                struct.pack_into("<QIHH", self.mem, table + 16 * index, addr, length, 0, flags)
            descs = [(table, 16 * len(buffers), INDIRECT)]
        self.send_raw(descs, head)

    def send_raw(self, descs: Sequence[tuple[int, int, int]], ident: int) -> None:
        """Write (address, length, flags) descriptors as a chain, the first one last, and kick."""
        first, first_flags = self.place, 0
        for index, (addr, length, extra) in enumerate(descs):
            flags = self.flags() | extra | (NEXT if index + 1 < len(descs) else 0)
            # The identifier counts in the last descriptor of a chain only.
            last = index + 1 == len(descs)
            self.put_packed(
                self.place, addr, length, ident if last else 0xDEAD, 0 if index == 0 else flags
            )
            first_flags = flags if index == 0 else first_flags
            self.place = (self.place + 1) % self.size
            self.wrap ^= self.place == 0
        struct.pack_into("<H", self.mem, self.desc + 16 * first + 14, first_flags)
        self.lengths[ident] = len(descs)
        if self.wants_kick(1):
            os.eventfd_write(self.kick, 1)

    def wants_kick(self, count: int) -> bool:  # noqa: ARG002
        """Has the device asked for kicks?"""
        return bool(struct.unpack_from("<H", self.mem, self.used + 2)[0] != EVENTS_DISABLE)

    def ask_signals(self, flags: int, place: int = 0, wrap: bool = True) -> None:
        """Write the driver's event suppression."""
        struct.pack_into("<HH", self.mem, self.avail, place | wrap << 15, flags)

    def completed(self) -> list[tuple[int, int]]:
        """Return (identifier, length) of the used descriptors that are new."""
        found = []
        while True:
            _, length, ident, flags = struct.unpack_from(
                "<QIHH", self.mem, self.desc + 16 * self.used_place
            )
            if (
                bool(flags & PACKED_AVAIL) != self.used_wrap
                or bool(flags & PACKED_USED) != self.used_wrap
            ):
                return found
            found.append((ident, length))
            self.used_place += self.lengths.pop(ident)
            if self.used_place >= self.size:
                self.used_place -= self.size
                self.used_wrap = not self.used_wrap
