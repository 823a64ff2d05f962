"""The virtio-blk device (virtio 1.2, section 5.2) as front-ends see it: features and configuration.

Its requests are served by vhost/blk.c.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from bdev.kind import Bdev, Op
from reactor.errors import OperationError
from vhost.messages import MAX_QUEUES, Feature, ProtocolError

SECTOR = 512  # bytes: the unit of the configuration, whatever the block size
SEG_MAX = 126  # buffers of data in one request; with header and status they fill a queue of 128
SIZE_MAX = 16 << 20  # bytes a buffer; SEG_MAX of them stay below the 2 GiB of one system call
MAX_DISCARD_SECTORS = (64 << 20) // SECTOR  # a segment: bounds how long one can hold a reactor
MAX_DISCARD_SEGMENTS = 16
SERIAL_LENGTH = 20  # bytes, section 5.2.6


class BlkFeature(enum.IntFlag):
    """Feature bits, section 5.2.3."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


# Section 5.2.4, little-endian, up to write_zeroes_may_unmap and its padding: capacity, size_max,
# seg_max, geometry (3), blk_size, topology (4), writeback, unused, num_queues, discard (3), write
# zeroes (3).
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
CONFIG_SIZE = 60
if _CONFIG.size != CONFIG_SIZE:
    raise AssertionError(f"struct virtio_blk_config has {_CONFIG.size} bytes")

ALWAYS = (
    Feature.VERSION_1
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.BLK_SIZE
    | BlkFeature.TOPOLOGY
    | BlkFeature.MQ
)


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What a guest is told of a disk. It outlives the bdev: a guest keeps what it was told."""

    block_size: int  # bytes
    num_blocks: int
    physical_block_size: int  # bytes
    readonly: bool
    flush: bool
    discard: bool
    write_zeroes: bool

    @classmethod
    def of(cls, bdev: Bdev, *, readonly: bool) -> DiskFacts:
        """Return the facts of a bdev, served read-only if it is or if that is asked for."""
        readonly = readonly or bdev.readonly
        return cls(
            block_size=bdev.block_size,
            num_blocks=bdev.num_blocks,
            physical_block_size=getattr(bdev, "physical_block_size", 0) or bdev.block_size,
            readonly=readonly,
            flush=Op.FLUSH in bdev.supported,
            discard=Op.UNMAP in bdev.supported and not readonly,
            write_zeroes=Op.WRITE_ZEROES in bdev.supported and not readonly,
        )

    def features(self) -> int:
        """Return the feature bits to offer."""
        wanted = {
            BlkFeature.RO: self.readonly,
            BlkFeature.FLUSH: self.flush,
            BlkFeature.DISCARD: self.discard,
            BlkFeature.WRITE_ZEROES: self.write_zeroes,
        }
        return int(ALWAYS) | sum(int(bit) for bit, on in wanted.items() if on)

    def config(self) -> bytes:
        """Return struct virtio_blk_config."""
        sectors_a_block = self.block_size // SECTOR
        # What a block device would have to read and write again for less than one of its own.
        exponent = (self.physical_block_size // self.block_size).bit_length() - 1
        discard = (MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, sectors_a_block)
        zeroes = (MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, int(self.discard))
        return _CONFIG.pack(
            self.num_blocks * sectors_a_block,
            SIZE_MAX,
            SEG_MAX,
            *(0, 0, 0),
            self.block_size,
            *(exponent, 0, 1, 0),
            1,  # writeback: completed writes are durable only after a flush
            0,
            MAX_QUEUES,
            *(discard if self.discard else (0, 0, 0)),
            *(zeroes if self.write_zeroes else (0, 0, 0)),
        )


class Bdevs(Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    async def open(self, bdev: Bdev, reactor: Any) -> None:
        """Make sure that ``reactor`` has a handle, and count one more user of it."""

    async def close(self, bdev: Bdev, reactor: Any) -> None:
        """Count one user less."""

    def on_removed(self, bdev: Bdev, callback: Callable[[Bdev], Awaitable[None]]) -> None:
        """Await the callback when the device has been drained, before it is closed."""

    def on_resized(self, bdev: Bdev, callback: Callable[[Bdev], Awaitable[None]]) -> None:
        """Await the callback when the size has changed."""

    def forget_callbacks(self, bdev: Bdev, *callbacks: Callable[[Bdev], Awaitable[None]]) -> None:
        """Call these no more."""


class BlkDevice:
    """A bdev as a virtio-blk device: a Device and a ServedDevice (vhost.interfaces).

    ``on_lost`` is awaited when the bdev is removed: after that no queue may use it.
    """

    def __init__(
        self,
        bdevs: Bdevs,
        bdev: Bdev,
        cpus: Collection[int],
        *,
        readonly: bool,
        packed_ring: bool,
        serial: str,
        on_lost: Callable[[], Awaitable[None]],
    ) -> None:
        self.bdev: Bdev | None = bdev
        self.cpus = cpus
        self.readonly = readonly
        self.packed_ring = packed_ring
        self.serial = serial
        self._bdevs = bdevs
        self._on_lost = on_lost
        self._facts = DiskFacts.of(bdev, readonly=readonly)
        self._opened: dict[int, Bdev] = {bdev.id: bdev}
        bdevs.on_removed(bdev, self._removed)
        bdevs.on_resized(bdev, self._resized)

    @property
    def features(self) -> int:
        """See Device."""
        return self._facts.features() | (Feature.RING_PACKED if self.packed_ring else 0)

    def config(self) -> bytes:
        """See Device."""
        return self._facts.config()

    def set_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """See Device; no field can be written, since CONFIG_WCE is not offered."""
        where = f"{offset} + {len(data)}"
        if migration and self.config()[offset : offset + len(data)] == data:
            return  # the source of a migration tells us what we know
        raise ProtocolError("SET_CONFIG", "range", where, "no field is writable", fatal=False)

    async def open(self, reactor: Any) -> int | None:
        """See ServedDevice; without a bdev, queues are served and their requests fail."""
        bdev = self.bdev
        if bdev is None:
            return None
        try:
            await self._bdevs.open(bdev, reactor)
        except OperationError as error:
            if error.code == -errno.ENODEV:
                return None  # it is being removed
            raise
        return bdev.id

    async def close(self, reactor: Any, handle: int) -> None:
        """See ServedDevice."""
        await self._bdevs.close(self._opened[handle], reactor)

    def queue_args(self, features: int, slot: int, handle: int | None) -> dict[str, Any]:
        """See ServedDevice."""
        return {
            "bdev": handle,
            "blk": {
                "slot": slot,
                "readonly": self._facts.readonly,
                "discard": bool(features & BlkFeature.DISCARD),
                "write_zeroes": bool(features & BlkFeature.WRITE_ZEROES),
                "max_discard_sectors": MAX_DISCARD_SECTORS,
                "max_discard_segments": MAX_DISCARD_SEGMENTS,
                "serial": self.serial,
            },
        }

    def release(self) -> None:
        """Have no more to do with the bdev; no queue is served."""
        if self.bdev is not None:
            self._bdevs.forget_callbacks(self.bdev, self._removed, self._resized)
            self.bdev = None

    async def _removed(self, _: Bdev) -> None:
        self.bdev = None
        await self._on_lost()

    async def _resized(self, bdev: Bdev) -> None:
        self._facts = DiskFacts.of(bdev, readonly=self.readonly)


def check_serial(serial: str, default: str) -> str:
    """Return what GET_ID answers: ``serial``, or as much of ``default`` as fits if that is empty.

    Raises ValueError for a serial number that has more than 20 bytes or is not ASCII.
    """
    if not serial:
        return default.encode("ascii", "replace")[:SERIAL_LENGTH].decode()
    if not serial.isascii() or not serial.isprintable() or len(serial) > SERIAL_LENGTH:
        raise ValueError(
            f"serial {serial[:40]!r}: must have at most {SERIAL_LENGTH} printable ASCII characters"
        )
    return serial
