"""Disks with a GUID partition table, written as UEFI 2.10 section 5.3 has it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from uuid import UUID

LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
ENTRIES, ENTRY = 128, 128

Part = tuple[int, int, str]  # first and last block, name


def part_uuid(index: int) -> UUID:
    """Return the unique GUID of partition ``index``, from 1."""
    return UUID(int=0xABC0000 + index)


def gpt_disk(parts: Sequence[Part], *, blocks: int = 2048, block_size: int = 512) -> bytearray:
    """Return a disk whose contents are zeroes but for both tables."""
    disk = bytearray(blocks * block_size)
    entries = bytearray(ENTRIES * ENTRY)
    for index, (first, last, name) in enumerate(parts):
        struct.pack_into(
            "<16s16sQQQ72s",
            *(entries, index * ENTRY, LINUX.bytes_le, part_uuid(index + 1).bytes_le, first, last),
            *(0, name.encode("utf-16-le")),
        )
    table = len(entries) // block_size
    for here, other, at in ((1, blocks - 1, 2), (blocks - 1, 1, blocks - 1 - table)):
        usable = (2 + table, blocks - 2 - table)
        fields = (b"EFI PART", 0x10000, 92, 0, 0, here, other, *usable, bytes(16), at)
        tail = (ENTRIES, ENTRY, zlib.crc32(entries))
        header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", *fields, *tail))
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        disk[here * block_size : here * block_size + 92] = header
        disk[at * block_size : at * block_size + len(entries)] = entries
    return disk
