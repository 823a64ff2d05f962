"""The superblocks of a mirror's legs: what they say together, and what becomes of it.

A leg begins with its superblock (``struct mirror_super``) and the write-intent log; the data begin
at ``DATA_OFFSET``. Each superblock says which legs were current when it was written; the newest one
is right, unless another leg was written to without it.
"""

import errno
import struct
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdev.kind import EINVAL, Bdev
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib

MAGIC = b"VR-RAID1"
LOG_OFFSET = 4096
DATA_OFFSET = 1 << 20
READ_SIZE = 4096  # bytes that are read of a leg to look for a superblock
REGION_SIZE = 1 << 20  # bytes; more where there would be too many
MAX_REGIONS = 1 << 22  # their bits fit between LOG_OFFSET and DATA_OFFSET
MAX_LEGS = lib.MIRROR_LEGS
_SIZE = ffi.sizeof("struct mirror_super")
_CHECKED = ffi.offsetof("struct mirror_super", "version")


@dataclass(frozen=True)
class Super:
    """One leg's superblock."""

    native: Any  # struct mirror_super *

    @property
    def uuid(self) -> uuids.UUID:
        """Return the UUID of the mirror."""
        return uuids.UUID(bytes=bytes(ffi.buffer(self.native.uuid)))

    @property
    def place(self) -> int:
        """Return which leg this is."""
        return int(self.native.place)

    def member(self, place: int) -> uuids.UUID:
        """Return the UUID of the leg at ``place``."""
        return uuids.UUID(bytes=bytes(ffi.buffer(self.native.member[place].uuid)))

    def state(self, place: int) -> int:
        """Return what it says of the leg at ``place``: enum mirror_state."""
        return int(self.native.member[place].state)


@dataclass(frozen=True)
class Plan:
    """How a mirror is to be made of its legs."""

    native: Any  # struct mirror_super *, for mirror_shared_init()
    places: dict[int, Bdev]
    active: tuple[int, ...]
    rebuilding: tuple[int, ...]
    returning: tuple[int, ...]  # of those, which lack nothing but what the log says
    new: bool


def parse(base: Bdev, block: bytes) -> Super | None:
    """Return the superblock that a leg begins with, None if there is none.

    OperationError: -74 if it is damaged, -22 if it is of another version.
    """
    if not block.startswith(MAGIC):
        return None
    native: Any = ffi.new("struct mirror_super *")
    ffi.memmove(native, block, _SIZE)
    if native.version != lib.MIRROR_VERSION:
        raise OperationError(
            EINVAL,
            f"bdev {base.name}: its superblock has version {native.version}, "
            f"not {lib.MIRROR_VERSION}",
        )
    at = ffi.cast("char *", native) + _CHECKED
    if lib.bitmap_checksum(at, _SIZE - _CHECKED) != native.checksum or not _is_possible(native):
        raise OperationError(
            -errno.EBADMSG,
            f"bdev {base.name}: its superblock is damaged; create the mirror of its other legs, "
            "clear the first 4096 bytes of this one, and add it with bdev_raid_add_base_bdev",
        )
    return Super(native)


def _is_possible(native: Any) -> bool:
    size, region = native.num_blocks * native.block_size, native.region_size
    return (
        1 <= native.legs <= MAX_LEGS
        and native.place < native.legs
        and native.block_size in (512, 4096)
        and region >= REGION_SIZE
        and region & (region - 1) == 0
        and 0 < size <= region * MAX_REGIONS
        and (native.log_offset, native.data_offset) == (LOG_OFFSET, DATA_OFFSET)
    )


def room(base: Bdev) -> int:
    """Return how many blocks of data a leg has room for; OperationError(-22) if none."""
    blocks = (base.size - DATA_OFFSET) // base.block_size
    if blocks < 1:
        raise OperationError(
            EINVAL,
            f"bdev {base.name}: has {base.size} bytes, and superblock and log of a mirror take "
            f"{DATA_OFFSET}",
        )
    return blocks


def plan_new(bases: Sequence[Bdev], uuid: str) -> Plan:
    """Return the plan of a mirror that has not existed."""
    if len(bases) < 2:
        raise OperationError(EINVAL, f"base_bdevs: a new mirror has 2 to {MAX_LEGS}")
    native: Any = ffi.new("struct mirror_super *")
    ffi.memmove(native.magic, MAGIC, len(MAGIC))
    native.version = lib.MIRROR_VERSION
    set_uuid(native.uuid, uuids.UUID(uuid) if uuid else uuids.uuid4())
    native.events = 1
    native.block_size = bases[0].block_size
    native.num_blocks = min(map(room, bases))
    native.region_size = REGION_SIZE
    while native.num_blocks * native.block_size > native.region_size * MAX_REGIONS:
        native.region_size *= 2
    native.log_offset, native.data_offset = LOG_OFFSET, DATA_OFFSET
    native.legs = len(bases)
    for member in native.member[0 : len(bases)]:
        set_uuid(member.uuid, uuids.uuid4())
    places = dict(enumerate(bases))
    return Plan(native, places, tuple(places), (), (), new=True)


def set_uuid(field: CData, uuid: uuids.UUID) -> None:
    """Store a UUID in a member of a structure."""
    ffi.memmove(field, uuid.bytes, 16)


def plan(legs: Sequence[tuple[Bdev, Super | None]], uuid: str) -> Plan:
    """Return how a mirror is made of ``legs``; OperationError(-22) if they do not go together."""
    known = [(base, found) for base, found in legs if found is not None]
    if not known:
        return plan_new([base for base, _ in legs], uuid)
    newest_base, newest = max(known, key=lambda leg: int(leg[1].native.events))
    for base, found in legs:
        if found is None:
            raise OperationError(
                EINVAL,
                f"bdev {base.name}: has no superblock, and bdev {newest_base.name} belongs to the "
                f"mirror {newest.uuid}; create that without it, then bdev_raid_add_base_bdev",
            )
        if found.uuid != newest.uuid:
            raise OperationError(
                EINVAL,
                f"bdev {base.name} belongs to the mirror {found.uuid}, bdev {newest_base.name} to "
                f"{newest.uuid}: they are not one",
            )
    if uuid and uuid != str(newest.uuid):
        raise OperationError(EINVAL, f"uuid {uuid}: the legs belong to the mirror {newest.uuid}")
    return _plan_known(known, newest_base, newest)


def _plan_known(known: Sequence[tuple[Bdev, Super]], newest_base: Bdev, newest: Super) -> Plan:
    places: dict[int, Bdev] = {}
    active, rebuilding = [], []
    for base, found in known:
        place = found.place
        if place in places:
            raise OperationError(
                EINVAL,
                f"bdev {base.name} and bdev {places[place].name} are the same leg of a mirror: one "
                "is a copy of the other; leave it out",
            )
        if room(base) < newest.native.num_blocks or base.block_size != newest.native.block_size:
            raise OperationError(
                EINVAL,
                f"bdev {base.name}: has room for {room(base)} blocks of {base.block_size} bytes, "
                f"and the mirror has {newest.native.num_blocks} of {newest.native.block_size}",
            )
        places[place] = base
        same = found.member(place) == newest.member(place)
        if same and newest.state(place) == lib.MIRROR_ACTIVE:
            active.append(place)
            continue
        if found.state(place) == lib.MIRROR_ACTIVE and (
            found.state(newest.place) == lib.MIRROR_MISSING
        ):
            raise OperationError(
                EINVAL,
                f"bdev {base.name} and bdev {newest_base.name} were each written to without the "
                "other; create the mirror of the one that is right, then add the other with "
                "bdev_raid_add_base_bdev",
            )
        rebuilding.append(place)
    if not active:
        raise OperationError(
            EINVAL, f"bdev {newest_base.name}: is no complete leg; name those that are, too"
        )
    returning = [
        found.place
        for _, found in known
        if found.place in rebuilding and is_prefix(found, newest.native, active)
    ]
    return Plan(
        newest.native, places, tuple(active), tuple(rebuilding), tuple(returning), new=False
    )


def is_prefix(found: Super, native: Any, active: Sequence[int]) -> bool:
    """Whether a leg is as the mirror has been: it lacks writes, but has none of its own.

    It was active, is the same since the last rebuild, and so is a leg that is active now, of which
    it does not know that it was missing: nothing was written to one without the other before that
    was on record.
    """
    ours = Super(native)

    def together(place: int) -> bool:
        return found.state(place) == lib.MIRROR_ACTIVE and found.member(place) == ours.member(place)

    return together(found.place) and any(map(together, active))


def parse_log_block(block: bytes, index: int) -> bytes | None:
    """Return the words of a block of the log, None if it is damaged."""
    checksum, place = struct.unpack_from("<II", block)
    data = ffi.from_buffer(block)
    if place != index or lib.bitmap_checksum(data + 4, len(block) - 4) != checksum:
        return None
    return block[8:]
