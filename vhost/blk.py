"""The virtio-blk device (virtio 1.2, section 5.2) as front-ends see it: features and configuration.

Its requests are served by vhost/blk.c.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from bdev.kind import Bdev, Op
from reactor.errors import OperationError
from vhost.messages import MAX_QUEUES, Feature, ProtocolError
from vhost.virtio_blk import SECTOR, BlkConfig, BlkFeature

SEG_MAX = 126  # buffers of data in one request; with header and status they fill a queue of 128
# Bytes a buffer. SeaBIOS keeps SEG_MAX * SIZE_MAX in blocks in 16 bits: with a product that has
# zeroes there it asks for nothing, for ever, and the machine does not boot.
SIZE_MAX = 256 << 10
MAX_DISCARD_SECTORS = (64 << 20) // SECTOR  # a segment: bounds how long one can hold a reactor
MAX_DISCARD_SEGMENTS = 16
SERIAL_LENGTH = 20  # bytes, section 5.2.6


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
        """Return the configuration space."""
        sectors_a_block = self.block_size // SECTOR
        config = BlkConfig(
            capacity=self.num_blocks * sectors_a_block,
            size_max=SIZE_MAX,
            seg_max=SEG_MAX,
            cylinders=0,
            heads=0,
            sectors=0,
            blk_size=self.block_size,
            physical_block_exp=max(1, self.physical_block_size // self.block_size).bit_length() - 1,
            alignment_offset=0,
            min_io_size=1,
            opt_io_size=0,
            writeback=1,  # a completed write is durable only after a flush
            unused0=0,
            num_queues=MAX_QUEUES,
            max_discard_sectors=MAX_DISCARD_SECTORS if self.discard else 0,
            max_discard_seg=MAX_DISCARD_SEGMENTS if self.discard else 0,
            discard_sector_alignment=sectors_a_block if self.discard else 0,
            max_write_zeroes_sectors=MAX_DISCARD_SECTORS if self.write_zeroes else 0,
            max_write_zeroes_seg=MAX_DISCARD_SEGMENTS if self.write_zeroes else 0,
            write_zeroes_may_unmap=int(self.write_zeroes and self.discard),
        )
        return config.to_bytes()


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
