"""The overlay file of a copy-on-write disk: a header, the map, and the clusters.

    0            header, in the first block
    4096         map: blocks of ``struct bitmap_block``, a bit for each cluster
    data_offset  cluster i at data_offset + i * cluster_size; what was never written is a hole

A cluster whose bit is set is here, the others are in the base. The control process makes the file
and reads it when a disk is made of it; from then on reactors write the map (bdev/cow_copy.h).
"""

import contextlib
import errno
import os
import struct
import uuid as uuids
import zlib
from dataclasses import dataclass
from pathlib import Path

from bdev.kind import EINVAL, Bdev
from bdev.parameters import BLOCK_SIZES
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib

MAGIC = b"VR-COW\r\n"  # a transfer that changes line ends shows
VERSION = 1
MAP_OFFSET = 4096
CLUSTER_SIZES = tuple(1 << n for n in range(12, 22))  # 4 KiB to 2 MiB
DEFAULT_CLUSTER_SIZE = 64 << 10
MAX_CLUSTERS = 1 << 26  # each takes two bytes of memory while it is copied, and a bit always
_HEAD = struct.Struct("<8sI")  # magic, checksum of the rest of the block
_BODY = struct.Struct("<IIIQQQQ16s16s")


@dataclass(frozen=True)
class Layout:
    """What an overlay is: sizes in bytes, but for those in blocks."""

    cluster_size: int
    block_size: int
    num_blocks: int
    base_blocks: int
    base_uuid: uuids.UUID
    uuid: uuids.UUID

    @property
    def size(self) -> int:
        """Return the bytes of the disk."""
        return self.num_blocks * self.block_size

    @property
    def clusters(self) -> int:
        """Return how many clusters it has; the last one may be shorter."""
        return -(-self.size // self.cluster_size)

    @property
    def base_clusters(self) -> int:
        """Return how many of them the base has something of."""
        return -(-self.base_blocks * self.block_size // self.cluster_size)

    @property
    def map_blocks(self) -> int:
        """Return how many blocks the map has."""
        return -(-self.clusters // int(lib.bitmap_bits(self.block_size)))

    @property
    def data_offset(self) -> int:
        """Return where cluster 0 is."""
        end = MAP_OFFSET + self.map_blocks * self.block_size
        return -(-end // self.cluster_size) * self.cluster_size

    @property
    def file_size(self) -> int:
        """Return how long the file is."""
        return self.data_offset + self.size

    def header(self) -> bytes:
        """Return the first block."""
        body = _BODY.pack(
            VERSION,
            self.cluster_size,
            self.block_size,
            self.num_blocks,
            self.base_blocks,
            MAP_OFFSET,
            self.data_offset,
            self.base_uuid.bytes,
            self.uuid.bytes,
        )
        rest = body + bytes(self.block_size - _HEAD.size - len(body))
        return _HEAD.pack(MAGIC, zlib.crc32(rest)) + rest


def _damaged(path: str, what: str) -> OperationError:
    return OperationError(
        -errno.EBADMSG,
        f"overlay {path}: {what}; restore the file from a copy (its base is unharmed)",
    )


def check_layout(layout: Layout) -> Layout:
    """Return ``layout``; OperationError(-22) if it cannot be one."""
    if layout.cluster_size not in CLUSTER_SIZES:
        raise OperationError(
            EINVAL,
            f"cluster_size {layout.cluster_size}: must be a power of two, "
            f"{CLUSTER_SIZES[0]} to {CLUSTER_SIZES[-1]}",
        )
    if layout.num_blocks < layout.base_blocks:
        raise OperationError(
            EINVAL,
            f"num_blocks {layout.num_blocks}: is less than the {layout.base_blocks} of the base",
        )
    if layout.clusters > MAX_CLUSTERS:
        raise OperationError(
            EINVAL,
            f"cluster_size {layout.cluster_size}: {layout.clusters} clusters are more than "
            f"{MAX_CLUSTERS}; use larger ones",
        )
    return layout


def parse_header(path: str, start: bytes) -> Layout:
    """Return what the first ``MAP_OFFSET`` bytes of an overlay say.

    OperationError: -22 if it is no overlay, or one of another version; -74 if it is damaged.
    """
    if len(start) < MAP_OFFSET or start[:8] != MAGIC:
        raise OperationError(
            EINVAL, f"{path}: is not the overlay of a copy-on-write disk; name one, or a new file"
        )
    (
        version,
        cluster_size,
        block_size,
        num_blocks,
        base_blocks,
        map_offset,
        data_offset,
        base,
        own,
    ) = _BODY.unpack_from(start, _HEAD.size)
    if version != VERSION:
        raise OperationError(EINVAL, f"overlay {path}: has version {version}, not {VERSION}")
    known = block_size in BLOCK_SIZES and cluster_size in CLUSTER_SIZES
    if not known or zlib.crc32(start[_HEAD.size : block_size]) != _HEAD.unpack_from(start)[1]:
        raise _damaged(path, "its header is damaged")
    layout = Layout(
        cluster_size,
        block_size,
        num_blocks,
        base_blocks,
        uuids.UUID(bytes=base),
        uuids.UUID(bytes=own),
    )
    if (map_offset, data_offset) != (MAP_OFFSET, layout.data_offset):
        raise _damaged(path, "its header contradicts itself")
    return check_layout(layout)


def check_base(path: str, layout: Layout, base: Bdev) -> None:
    """OperationError(-22) if the overlay was made on something else than ``base``."""
    if str(layout.base_uuid) != base.uuid:
        raise OperationError(
            EINVAL,
            f"overlay {path}: was made on the base {layout.base_uuid}, "
            f"and bdev {base.name} is {base.uuid}",
        )
    if (layout.base_blocks, layout.block_size) != (base.num_blocks, base.block_size):
        raise OperationError(
            EINVAL,
            f"overlay {path}: was made on {layout.base_blocks} blocks of {layout.block_size} "
            f"bytes, and bdev {base.name} has {base.num_blocks} of {base.block_size}",
        )


def create(path: str, layout: Layout) -> None:
    """Make an empty overlay; FileExistsError if there is something under this name.

    It appears under its name when it is complete.
    """
    folder = Path(path).absolute().parent
    temporary = f"{path}.new-{os.getpid()}"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.closing(os.fdopen(fd, "wb")) as file:
            file.write(layout.header().ljust(MAP_OFFSET, b"\0"))
            for index in range(layout.map_blocks):  # really there: the map never lacks room
                rest = struct.pack("<I", index) + bytes(layout.block_size - 8)
                file.write(struct.pack("<I", zlib.crc32(rest)) + rest)
            file.truncate(layout.file_size)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    directory = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: str) -> tuple[Layout, bytes]:
    """Read header and map: the layout, and the words of the map as ``struct cow_map`` has them.

    OperationError: -22 if it is none, -74 if it is damaged; OSError.
    """
    with open(path, "rb") as file:
        layout = parse_header(path, file.read(MAP_OFFSET))
        size = os.fstat(file.fileno()).st_size
        if size < layout.file_size:
            raise _damaged(path, f"it has {size} bytes of {layout.file_size}")
        blocks = file.read(layout.map_blocks * layout.block_size)
    words = []
    for index in range(layout.map_blocks):
        block = blocks[index * layout.block_size : (index + 1) * layout.block_size]
        checksum, place = struct.unpack_from("<II", block)
        if checksum != zlib.crc32(block[4:]) or place != index:
            raise _damaged(path, f"block {index} of its map is damaged")
        words.append(block[8:])
    bits = b"".join(words)
    if int.from_bytes(bits, "little") >> layout.clusters:
        raise _damaged(path, f"its map has clusters after the last one, {layout.clusters - 1}")
    return layout, bits


def to_native(layout: Layout) -> CData:
    """Return the layout as ``struct cow_layout *``."""
    return ffi.new(
        "struct cow_layout *",
        {
            "clusters": layout.clusters,
            "map_offset": MAP_OFFSET,
            "data_offset": layout.data_offset,
            "cluster_size": layout.cluster_size,
            "block_size": layout.block_size,
        },
    )
