"""Guest memory in a reactor: what it is told, and struct guest_memory, which is made of it."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence

import msgspec

from bdev.memory import RegisteredMemory
from reactor.errors import check
from reactor.native import CData, ffi, lib

_POLL = 0.001  # seconds between looks whether requests still use memory that was replaced


class RegionArgs(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    """One region of guest memory: see struct guest_region."""

    guest: int
    size: int
    user: int
    offset: int
    iova: int = 0


class TranslationArgs(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    """One entry of an IOTLB: see iotlb_add()."""

    iova: int
    size: int
    user: int
    access: int


class LogArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The dirty log that comes after the regions: its file, and (``event``) an eventfd."""

    offset: int
    size: int
    event: bool


def open_log(memory: CData, log: LogArgs, fds: Sequence[int]) -> None:
    """Have a new struct guest_memory log what is written to it; raise OSError without it."""
    event = fds[1] if log.event else -1
    try:
        check(lib.guest_memory_log(memory, fds[0], log.offset, log.size, event), "a dirty log")
    except OSError:
        lib.guest_memory_put(memory)
        raise


def open_iotlb(memory: CData, entries: list[TranslationArgs]) -> None:
    """Give a new struct guest_memory an IOTLB; raise OSError without it."""
    try:
        check(lib.iotlb_create(memory), "an IOTLB")
        learn_translations(memory, entries)
    except OSError:
        lib.guest_memory_put(memory)
        raise


def learn_translations(memory: CData, entries: list[TranslationArgs]) -> None:
    """Add to an IOTLB; raise OSError."""
    for entry in entries:
        rc = lib.iotlb_add(memory, entry.iova, entry.size, entry.user, entry.access)
        check(rc, f"a translation of {entry.iova:#x} + {entry.size:#x}")


async def settle_iotlb(memory: CData) -> None:
    """Wait until no request uses what an IOTLB has forgotten; raise OSError."""
    check(lib.iotlb_settle(memory), "requests of an earlier invalidation")
    while not lib.iotlb_settled(memory):  # noqa: ASYNC110 - C gives no event
        await asyncio.sleep(_POLL)


def map_memory(regions: list[RegionArgs], fds: Sequence[int]) -> CData:
    """Return a new struct guest_memory; raise OSError."""
    table = ffi.new("struct guest_region[]", len(regions))
    for place, (region, fd) in enumerate(zip(regions, fds, strict=True)):
        table[place] = (region.guest, region.size, region.user, region.offset, fd, region.iova)
    memory = lib.guest_memory_create(table, len(regions))
    if memory == ffi.NULL:
        raise OSError(
            ffi.errno, f"{os.strerror(ffi.errno)}: {len(regions)} regions of guest memory"
        )
    return memory


def memory_regions(memory: CData) -> Iterator[tuple[CData, int]]:
    """Yield address and bytes of each region of a struct guest_memory, as it is mapped here."""
    size = ffi.new("uint64_t *")
    for index in itertools.count():
        address = lib.guest_memory_region(memory, index, size)
        if address == ffi.NULL:
            return
        yield address, size[0]


async def release_memory(memory: CData, registered: RegisteredMemory | None) -> None:
    """Wait until nobody else uses a struct guest_memory, and unmap it."""
    if memory == ffi.NULL:
        return
    while lib.guest_memory_references(memory) > 1:  # noqa: ASYNC110 - C gives no event
        await asyncio.sleep(_POLL)
    if registered is not None:
        registered.remove()
    lib.guest_memory_put(memory)
