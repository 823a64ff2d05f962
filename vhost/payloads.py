"""The structures that vhost-user messages carry, each with its validator.

Facts are from "Vhost-user Protocol" (docs/interop/vhost-user.rst of QEMU); numbers are in the
machine's byte order. ``from_bytes`` judges the size, ``check`` the values, both only by what can be
told from the structure alone: whether it makes sense now is the session's question.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

MAX_PAYLOAD = 4096  # bytes; the largest message that we know of has about 1 KiB
MAX_QUEUES = 1024  # of one device, as many as front-ends have
MAX_FD_QUEUES = 256  # that SET_VRING_KICK, _CALL and _ERR can name: eight bits for the index
MAX_QUEUE_SIZE = 32768  # virtio 1.2, sections 2.7 and 2.8.10.1
MAX_TABLE_REGIONS = 32  # of SET_MEM_TABLE: the specification draws 8, some front-ends send more

_U64_END = 1 << 64


class ProtocolError(Exception):
    """A peer broke a rule: says in which message, which field, which value, and what is allowed.

    When ``fatal`` is false, the request is answered by a failure and the connection goes on.
    """

    def __init__(
        self, message: str, field: str, value: object, allowed: str, *, fatal: bool = True
    ) -> None:
        super().__init__(f"{message}: {field} is {value}: {allowed}")
        self.message = message
        self.field = field
        self.value = value
        self.allowed = allowed
        self.fatal = fatal


def wire(layout: str, size: int) -> struct.Struct:
    """Return the structure; AssertionError unless it has the size that the specification gives."""
    made = struct.Struct("=" + layout)
    if made.size != size:
        raise AssertionError(f"{layout} has {made.size} bytes, not {size}")
    return made


@dataclass(frozen=True, slots=True)
class Payload:
    """A structure whose fields are those of ``WIRE``, in order."""

    WIRE: ClassVar[struct.Struct]

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return self.WIRE.pack(*(getattr(self, entry.name) for entry in fields(self)))

    @classmethod
    def from_bytes(cls, data: bytes, message: str) -> Self:
        """Return what ``data`` says; raise ProtocolError, about ``message``, for a wrong size."""
        return cls(*_unpack(cls.WIRE, data, message))

    def check(self, message: str) -> None:
        """Raise ProtocolError, about ``message``, if a field has a value that it never may."""


def _unpack(layout: struct.Struct, data: bytes, message: str) -> tuple[Any, ...]:
    if len(data) != layout.size:
        raise ProtocolError(message, "size", len(data), f"the payload has {layout.size} bytes")
    return layout.unpack(data)


@dataclass(frozen=True, slots=True)
class NoPayload(Payload):
    """Nothing, as a reply that brings a descriptor only."""

    WIRE: ClassVar = wire("", 0)


@dataclass(frozen=True, slots=True)
class U64(Payload):
    """A single 64-bit integer."""

    value: int

    WIRE: ClassVar = wire("Q", 8)


@dataclass(frozen=True, slots=True)
class VringFd(Payload):
    """The u64 of SET_VRING_KICK, _CALL and _ERR: bits 0 to 7 the index, bit 8 "no descriptor"."""

    index: int
    no_fd: bool = False

    WIRE: ClassVar = wire("Q", 8)
    NO_FD: ClassVar = 1 << 8

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return self.WIRE.pack(self.index | (self.NO_FD if self.no_fd else 0))

    @classmethod
    def from_bytes(cls, data: bytes, message: str) -> Self:
        """See Payload; bits that mean nothing must be zero."""
        (value,) = _unpack(cls.WIRE, data, message)
        if value >> 9:
            raise ProtocolError(message, "payload", hex(value), "bits 9 to 63 are zero")
        return cls(value & 0xFF, bool(value & cls.NO_FD))


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """A vring index and a number that depends on the message: size, base, or on and off."""

    index: int
    num: int

    WIRE: ClassVar = wire("II", 8)

    def check(self, message: str) -> None:
        """See Payload; what ``num`` may be depends on the message and is not checked here."""
        check_index(self.index, message)


@dataclass(frozen=True, slots=True)
class VringAddr(Payload):
    """Where a vring's parts are, in the front-end's address space; ``log`` is guest-physical."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    WIRE: ClassVar = wire("IIQQQQ", 40)
    F_LOG: ClassVar = 1  # VHOST_VRING_F_LOG

    def check(self, message: str) -> None:
        """See Payload; alignments are the least of virtio 1.2, sections 2.7 and 2.8."""
        check_index(self.index, message)
        if self.flags & ~self.F_LOG:
            raise ProtocolError(message, "flags", hex(self.flags), "only bit 0 is known")
        for name, alignment in (("desc", 16), ("used", 4), ("avail", 2)):
            value = getattr(self, name)
            if value % alignment:
                raise ProtocolError(message, name, hex(value), f"a multiple of {alignment}")


@dataclass(frozen=True, slots=True)
class Region(Payload):
    """``size`` bytes at ``guest`` (guest-physical) and ``user`` (front-end virtual) address.

    ``offset`` is where the first byte is in the file that came with the region.
    """

    guest: int
    size: int
    user: int
    offset: int

    WIRE: ClassVar = wire("QQQQ", 32)

    def check(self, message: str, name: str = "region") -> None:
        """See Payload; the end can be told in 64 bits in all three address spaces."""
        if self.size == 0:
            raise ProtocolError(message, f"{name}.size", 0, "more than 0")
        for axis in ("guest", "user", "offset"):
            check_range(getattr(self, axis), self.size, message, f"{name}.{axis}")

    def overlaps(self, other: Region) -> bool:
        """Tell whether both have a guest-physical or a user address in common."""
        return any(
            getattr(self, axis) < getattr(other, axis) + other.size
            and getattr(other, axis) < getattr(self, axis) + self.size
            for axis in ("guest", "user")
        )

    def holds(self, user: int, length: int) -> bool:
        """Tell whether ``length`` bytes at user address ``user`` are all in this region."""
        return self.user <= user and user + length <= self.user + self.size


@dataclass(frozen=True, slots=True)
class MemoryTable(Payload):
    """The regions of SET_MEM_TABLE, in the order of the descriptors that come with them."""

    regions: tuple[Region, ...]

    WIRE: ClassVar = wire("II", 8)

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        head = self.WIRE.pack(len(self.regions), 0)
        return head + b"".join(region.to_bytes() for region in self.regions)

    @classmethod
    def from_bytes(cls, data: bytes, message: str) -> Self:
        """See Payload; front-ends may send room for more regions than there are."""
        if len(data) < cls.WIRE.size:
            raise ProtocolError(message, "size", len(data), f"at least {cls.WIRE.size} bytes")
        count, _padding = cls.WIRE.unpack_from(data)
        if count > MAX_TABLE_REGIONS:
            raise ProtocolError(message, "num regions", count, f"at most {MAX_TABLE_REGIONS}")
        end = cls.WIRE.size + count * Region.WIRE.size
        if len(data) < end or (len(data) - end) % Region.WIRE.size:
            raise ProtocolError(message, "size", len(data), f"{count} regions need {end} bytes")
        found = Region.WIRE.iter_unpack(data[cls.WIRE.size : end])
        return cls(tuple(Region(*each) for each in found))

    def check(self, message: str) -> None:
        """See Payload; no two regions overlap."""
        for place, region in enumerate(self.regions):
            region.check(message, f"region {place}")
            check_overlap(region, self.regions[:place], message, f"region {place}")


@dataclass(frozen=True, slots=True)
class SingleRegion(Payload):
    """The region of ADD_MEM_REG and REM_MEM_REG."""

    region: Region

    WIRE: ClassVar = wire("QQQQQ", 40)

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return bytes(8) + self.region.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, message: str) -> Self:
        """See Payload."""
        _padding, *found = _unpack(cls.WIRE, data, message)
        return cls(Region(*found))

    def check(self, message: str) -> None:
        """See Payload."""
        self.region.check(message)


@dataclass(frozen=True, slots=True)
class Log(Payload):
    """Size and offset of the dirty log, in bytes."""

    size: int
    offset: int

    WIRE: ClassVar = wire("QQ", 16)

    def check(self, message: str) -> None:
        """See Payload."""
        if self.size == 0:
            raise ProtocolError(message, "log size", 0, "more than 0")
        check_range(self.offset, self.size, message, "log offset")


@dataclass(frozen=True, slots=True)
class StateTransfer(Payload):
    """Which way the device's state goes ("Device state transfer parameters"), and when."""

    direction: int
    phase: int

    WIRE: ClassVar = wire("II", 8)
    SAVE: ClassVar = 0  # to the front-end
    LOAD: ClassVar = 1
    STOPPED: ClassVar = 0  # the only phase that there is

    def check(self, message: str) -> None:
        """See Payload."""
        if self.direction not in (self.SAVE, self.LOAD):
            raise ProtocolError(message, "direction", self.direction, "0 (save) or 1 (load)")
        if self.phase != self.STOPPED:
            raise ProtocolError(message, "phase", self.phase, "0: all rings are stopped")


@dataclass(frozen=True, slots=True)
class IotlbMessage(Payload):
    """struct vhost_iotlb_msg of linux/vhost_types.h: ``size`` bytes at an I/O virtual address.

    ``user`` is where they are in the front-end's address space, ``access`` bits READ and WRITE of
    the device. The size of an INVALIDATE at 0 may be 0: everything. C pads the structure.
    """

    iova: int
    size: int
    user: int
    access: int
    kind: int

    WIRE: ClassVar = wire("QQQBB6x", 32)
    MISS: ClassVar = 1
    UPDATE: ClassVar = 2
    INVALIDATE: ClassVar = 3
    ACCESS_FAIL: ClassVar = 4
    READ: ClassVar = 1  # VHOST_ACCESS_RO
    WRITE: ClassVar = 2  # VHOST_ACCESS_WO

    @property
    def last(self) -> int:
        """The last address."""
        return (self.iova + self.size - 1) % _U64_END

    def check(self, message: str) -> None:
        """See Payload; of a front-end's message, since a back-end sends the two other kinds."""
        if self.kind not in (self.UPDATE, self.INVALIDATE):
            raise ProtocolError(message, "type", self.kind, "UPDATE (2) or INVALIDATE (3)")
        if self.last < self.iova:
            text = f"{self.iova:#x} + {self.size:#x}"
            raise ProtocolError(message, "iova", text, "some bytes that end within 64 bits")
        if self.kind == self.INVALIDATE:
            return
        if self.size == 0:
            raise ProtocolError(message, "size", 0, "more than 0")
        check_range(self.user, self.size, message, "uaddr")
        if self.access not in (self.READ, self.WRITE, self.READ | self.WRITE):
            raise ProtocolError(message, "perm", self.access, "1 to 3")


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """``size`` bytes of the device's configuration space from ``offset``.

    The bytes of a request to read say nothing and may be missing. There may be more bytes than
    ``size``, since some front-ends always send a whole structure: the rest is dropped.
    """

    offset: int
    size: int
    flags: int = 0
    data: bytes = b""

    WIRE: ClassVar = wire("III", 12)
    MIGRATION: ClassVar = 1  # flags: written for live migration, not by the guest

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return self.WIRE.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def from_bytes(cls, data: bytes, message: str) -> Self:
        """See Payload."""
        if len(data) < cls.WIRE.size:
            raise ProtocolError(message, "size", len(data), f"at least {cls.WIRE.size} bytes")
        offset, size, flags = cls.WIRE.unpack_from(data)
        body = data[cls.WIRE.size :]
        if body and len(body) < size:
            raise ProtocolError(message, "size", len(data), f"{cls.WIRE.size} and {size} bytes")
        return cls(offset, size, flags, body[:size])

    def check(self, message: str) -> None:
        """See Payload; an answer with as many bytes fits in a message."""
        limit = MAX_PAYLOAD - self.WIRE.size
        if not 0 < self.size <= limit:
            raise ProtocolError(message, "config size", self.size, f"1 to {limit} bytes")
        if self.offset > MAX_PAYLOAD:
            raise ProtocolError(message, "offset", self.offset, f"at most {MAX_PAYLOAD}")


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """Where the in-flight logs of ``num_queues`` queues of ``queue_size`` entries are in a file.

    QEMU sends the structure with the padding that C puts at its end, rust-vmm without: ``padded``
    remembers which, so that an answer has the size that is expected.
    """

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    padded: bool = field(default=True, compare=False)

    WIRE: ClassVar = wire("QQHH", 20)
    PADDING: ClassVar = 4

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        packed = self.WIRE.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return packed + bytes(self.PADDING if self.padded else 0)

    @classmethod
    def from_bytes(cls, data: bytes, message: str) -> Self:
        """See Payload."""
        padded = len(data) == cls.WIRE.size + cls.PADDING
        body = data[: cls.WIRE.size] if padded else data
        size, offset, queues, entries = _unpack(cls.WIRE, body, message)
        return cls(size, offset, queues, entries, padded)

    def check(self, message: str) -> None:
        """See Payload."""
        if not 0 < self.num_queues <= MAX_QUEUES:
            raise ProtocolError(message, "num queues", self.num_queues, f"1 to {MAX_QUEUES}")
        check_queue_size(self.queue_size, message, "queue size")
        check_range(self.mmap_offset, self.mmap_size, message, "mmap offset")


def check_index(index: int, message: str) -> None:
    """Raise ProtocolError unless ``index`` can be a queue's."""
    if index >= MAX_QUEUES:
        raise ProtocolError(message, "index", index, f"less than {MAX_QUEUES}")


def check_queue_size(size: int, message: str, name: str) -> None:
    """Raise ProtocolError unless a ring, split or packed, can have ``size`` entries."""
    if not 0 < size <= MAX_QUEUE_SIZE:
        raise ProtocolError(message, name, size, f"1 to {MAX_QUEUE_SIZE} entries")


def check_range(start: int, size: int, message: str, name: str) -> None:
    """Raise ProtocolError unless the end of a range can be told in 64 bits."""
    if start + size >= _U64_END:
        raise ProtocolError(message, name, f"{start:#x} + {size:#x}", "it ends within 64 bits")


def check_overlap(region: Region, others: tuple[Region, ...], message: str, name: str) -> None:
    """Raise ProtocolError if ``region`` has addresses in common with one of ``others``."""
    for other in others:
        if region.overlaps(other):
            text = f"{region.guest:#x} + {region.size:#x}"
            raise ProtocolError(message, name, text, f"no overlap with that at {other.guest:#x}")
