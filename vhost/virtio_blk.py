"""What virtio-blk looks like to both sides: virtio 1.2, section 5.2."""

from __future__ import annotations

import enum
import struct
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

WRITEBACK = 32  # offset of the cache mode in the configuration space
SECTOR = 512  # bytes: the unit of requests and of the capacity, whatever the block size


class BlkFeature(enum.IntFlag):
    """Feature bits of virtio-blk, section 5.2.3."""

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


class BlkRequest(enum.IntEnum):
    """Request types, section 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


STATUS_NAMES = {0: "OK", 1: "IOERR", 2: "UNSUPP"}


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """The configuration space, section 5.2.4; what it says counts only with the feature bit."""

    capacity: int
    """Sectors of 512 bytes."""
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    unused0: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    WIRE: ClassVar = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return what the first 60 bytes of the configuration space say."""
        return cls(*cls.WIRE.unpack_from(data))

    def to_bytes(self) -> bytes:
        """Return the wire form, 60 bytes."""
        return self.WIRE.pack(*astuple(self))
