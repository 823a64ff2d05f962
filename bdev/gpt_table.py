"""The GUID partition table (UEFI specification 2.10, section 5.3), read and checked.

Everything in it is hostile: whoever had the disk before may have written it.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

SIGNATURE = b"EFI PART"
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")  # table 5-5, without what is reserved after it
_ENTRY = struct.Struct("<16s16sQQQ72s")  # table 5-6
_MAX_TABLE = 1 << 18  # bytes; usual are 16 KiB
UNUSED = UUID(int=0)

Read = Callable[[int, int], Awaitable[bytes]]  # offset and length, in blocks


class TableError(Exception):
    """There is a table, and it cannot be believed."""


@dataclass(frozen=True)
class Partition:
    """One used entry; blocks ``first`` to ``last``, both included."""

    index: int  # from 1, as everybody counts
    type: UUID
    uuid: UUID
    first: int
    last: int
    name: str

    @property
    def num_blocks(self) -> int:
        """Return how many blocks it has."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class _Header:
    first_usable: int
    last_usable: int
    entries_at: int
    entries: int
    entry_size: int
    entries_crc: int


def _parse_header(block: bytes, here: int, num_blocks: int) -> _Header | None:
    """Return the header in the block at ``here``; None if there is none. TableError if damaged."""
    if not block.startswith(SIGNATURE):
        return None
    (
        _,
        _,
        size,
        crc,
        _,
        my_block,
        _,
        first_usable,
        last_usable,
        _,
        at,
        entries,
        entry_size,
        sum_,
    ) = _HEADER.unpack_from(block)
    if not _HEADER.size <= size <= len(block):
        raise TableError(f"header of {size} bytes")
    if zlib.crc32(block[:16] + bytes(4) + block[20:size]) != crc:
        raise TableError("checksum of the header is wrong")
    if my_block != here:
        raise TableError(f"header at block {here} says it is at {my_block}")
    if entry_size < _ENTRY.size or entry_size % 8 or entries * entry_size > _MAX_TABLE:
        raise TableError(f"{entries} entries of {entry_size} bytes")
    blocks = -(-entries * entry_size // len(block))
    if at >= num_blocks or blocks > num_blocks - at:
        raise TableError(f"entries at block {at} are beyond the end")
    if first_usable > last_usable or last_usable >= num_blocks:
        raise TableError(f"usable blocks {first_usable} to {last_usable} of {num_blocks}")
    return _Header(first_usable, last_usable, at, entries, entry_size, sum_)


def _parse_entries(header: _Header, table: bytes) -> list[Partition]:
    """Return the used entries; TableError if they are damaged, or overlap."""
    table = table[: header.entries * header.entry_size]
    if zlib.crc32(table) != header.entries_crc:
        raise TableError("checksum of the entries is wrong")
    partitions = []
    for index in range(header.entries):
        kind, own, first, last, _, name = _ENTRY.unpack_from(table, index * header.entry_size)
        if UUID(bytes_le=kind) == UNUSED:
            continue
        if not header.first_usable <= first <= last <= header.last_usable:
            raise TableError(f"partition {index + 1}: blocks {first} to {last}")
        text = name.decode("utf-16-le", "replace").partition("\0")[0]
        partitions.append(
            Partition(index + 1, UUID(bytes_le=kind), UUID(bytes_le=own), first, last, text)
        )
    in_place = sorted(partitions, key=lambda partition: partition.first)
    for one, other in itertools.pairwise(in_place):
        if other.first <= one.last:
            raise TableError(f"partitions {one.index} and {other.index} overlap")
    return partitions


async def _read_at(
    read: Read, here: int, num_blocks: int, block_size: int
) -> list[Partition] | None:
    header = _parse_header(await read(here, 1), here, num_blocks)
    if header is None:
        return None
    blocks = -(-header.entries * header.entry_size // block_size)
    return _parse_entries(header, await read(header.entries_at, blocks) if blocks else b"")


async def read_table(read: Read, num_blocks: int, block_size: int) -> list[Partition]:
    """Return the partitions of a disk, [] if it has no table.

    The backup, in the last block, stands in where the first table is damaged; TableError if it does
    not help. Whatever ``read`` raises passes.
    """
    if num_blocks < 3:
        return []
    try:
        return await _read_at(read, 1, num_blocks, block_size) or []
    except TableError:
        backup = await _read_at(read, num_blocks - 1, num_blocks, block_size)
        if backup is None:
            raise
        return backup
