"""Raid: one device made of several, one after another (concat), in turn (raid0), or alike (raid1).

Mirrors are a kind of their own, :mod:`bdev.mirror`, under the same operations.
"""

import errno
from typing import Any, Literal

from bdev.kind import (
    EINVAL,
    Bdev,
    OpenContext,
    check_name,
    check_uuid,
    opener,
    provider,
    refuse_unsupported,
)
from bdev.mirror import MirrorBdev
from bdev.mirror_assembly import check_distinct, create_mirror
from bdev.mirror_super import MAX_LEGS
from bdev.mirror_super import READ_SIZE as SUPER_SIZE
from bdev.registry import BdevRegistry
from bdev.stacked import StackedBdev
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib
from reactor.operations import operation

MAX_BASES = 255
MAX_STRIP_KB = 1 << 20

Level = Literal["concat", "raid0", "0", "raid1", "1", "raid5f", "5f"]
Category = Literal["all", "online", "configuring", "offline"]


class RaidBdev(StackedBdev):
    """``bases`` as one device; ``strip_kb`` (KiB) is 0 for a concatenation."""

    kind = "raid"
    product_name = "Raid Volume"

    def __init__(self, name: str, bases: list[Bdev], *, strip_kb: int, uuid: str) -> None:
        self.strip_kb = strip_kb
        self.base_blocks = usable_blocks(bases, strip_kb * 1024)
        super().__init__(name, bases, num_blocks=sum(self.base_blocks), uuid=uuid)

    @property
    def level(self) -> str:
        """Return SPDK's word."""
        return "raid0" if self.strip_kb else "concat"

    def blocks_now(self) -> int:
        """Return the size it was made with: more room in a base has no place in the order."""
        return self.num_blocks

    def open_args(self) -> dict[str, Any]:
        """Add the layout."""
        return {
            **super().open_args(),
            "strip_blocks": self.strip_kb * 1024 // self.block_size,
            "base_blocks": self.base_blocks,
        }

    def describe(self) -> dict[str, Any]:
        """Return the boundary over which requests are cut."""
        boundary = self.strip_kb * 1024 // self.block_size
        return {"optimal_io_boundary": boundary} if boundary else {}

    def summary(self) -> dict[str, Any]:
        """Return SPDK's description of it."""
        return {
            "uuid": self.uuid,
            "strip_size_kb": self.strip_kb,
            "state": "online",
            "raid_level": self.level,
            "superblock": False,
            "num_base_bdevs": len(self.bases),
            "num_base_bdevs_discovered": len(self.bases),
            "num_base_bdevs_operational": len(self.bases),
            "base_bdevs_list": [
                {
                    "name": base.name,
                    "uuid": base.uuid,
                    "is_configured": True,
                    "data_offset": 0,
                    "data_size": blocks,
                }
                for base, blocks in zip(self.bases, self.base_blocks, strict=True)
            ],
        }

    def driver_specific(self) -> dict[str, Any]:
        """Return the layout."""
        return {"raid": self.summary()}

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device."""
        return {
            "method": "bdev_raid_create",
            "params": {
                "name": self.name,
                "raid_level": self.level,
                "strip_size_kb": self.strip_kb,
                "base_bdevs": [base.name for base in self.bases],
                "uuid": self.uuid,
            },
        }


def usable_blocks(bases: list[Bdev], strip: int) -> list[int]:
    """Return how many blocks of each base are used: all, or as many strips as the smallest has.

    ``strip`` is in bytes, 0 for a concatenation. OperationError(-22) if that is nothing.
    """
    if not strip:
        return [base.num_blocks for base in bases]
    smallest = min(bases, key=lambda base: base.size)
    if smallest.size < strip:
        raise OperationError(
            EINVAL,
            f"bdev {smallest.name}: has {smallest.size} bytes, less than a strip of {strip}",
        )
    return [smallest.size // strip * strip // base.block_size for base in bases]


def check_strip(level: str, strip_kb: int, block_size: int) -> int:
    """Return the strip (KiB) for ``level``, 0 for a concatenation; OperationError(-22)."""
    if level == "concat":
        return 0
    if strip_kb < 1 or strip_kb > MAX_STRIP_KB or strip_kb & (strip_kb - 1):
        raise OperationError(
            EINVAL, f"strip_size_kb {strip_kb}: must be a power of two, 1 to {MAX_STRIP_KB}"
        )
    if strip_kb * 1024 < block_size:
        raise OperationError(
            EINVAL, f"strip_size_kb {strip_kb}: is less than a block of {block_size} bytes"
        )
    return strip_kb


@provider
class RaidOperations:
    """``bdev_raid_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation
    async def bdev_raid_create(
        self,
        name: str,
        raid_level: Level,
        base_bdevs: list[str],
        strip_size_kb: int = 0,
        uuid: str | None = None,
        superblock: bool = False,
    ) -> bool:
        """Make one device of ``base_bdevs``: ``concat``, ``raid0`` in strips of KiB, or ``raid1``.

        A raid1 always has superblocks, asked for or not. Legs that have been one already are made
        it again, as they were left.
        """
        if raid_level in ("raid5f", "5f"):
            raise OperationError(EINVAL, f"raid_level {raid_level}: must be concat, raid0 or raid1")
        mirror = raid_level in ("raid1", "1")
        most = MAX_LEGS if mirror else MAX_BASES
        if not 1 <= len(base_bdevs) <= most:
            raise OperationError(EINVAL, f"base_bdevs: must be 1 to {most}")
        if mirror:
            refuse_unsupported(strip_size_kb=strip_size_kb)
            self._registry.check_unused(check_name(name), check_uuid(uuid or ""))
            await create_mirror(self._registry, name, base_bdevs, check_uuid(uuid or ""))
            return True
        bases = [self._registry.find(base) for base in base_bdevs]
        check_distinct(bases)
        refuse_unsupported(superblock=superblock)
        strip = check_strip(raid_level, strip_size_kb, bases[0].block_size)
        await self._registry.register(RaidBdev(name, bases, strip_kb=strip, uuid=uuid or ""))
        return True

    @operation
    async def bdev_raid_delete(self, name: str, clear_sb: bool = False) -> bool:
        """Delete a raid device; its bases stay, with their contents.

        With ``clear_sb`` those of a raid1 lose their superblocks: they are no legs any more.
        """
        bdev = self._registry.find(name)
        if not isinstance(bdev, MirrorBdev):
            await self._registry.remove(name, kind="raid")
            return True
        self._registry.check_free(bdev.name)
        await bdev.settle()
        await bdev.stop()
        await self._registry.remove(bdev.name)
        if clear_sb:
            for base in bdev.bases:
                await self._registry.write(base, 0, bytes(SUPER_SIZE))
        return True

    @operation
    async def bdev_raid_add_base_bdev(
        self, raid_bdev: str, base_bdev: str, full: bool = False
    ) -> bool:
        """Have a raid1 that lacks a leg use ``base_bdev``, and rebuild onto it.

        A leg that comes back gets what was written without it; all of the disk with ``full``.
        """
        mirror = self._registry.find_as(raid_bdev, MirrorBdev)
        await mirror.add(self._registry.find(base_bdev), full=full)
        return True

    @operation
    async def bdev_raid_remove_base_bdev(self, name: str) -> bool:
        """Have the raid1 that has ``name`` as a leg do without it."""
        base = self._registry.find(name)
        for bdev in self._registry:
            if isinstance(bdev, MirrorBdev) and base in bdev.legs:
                await bdev.remove_leg(base)
                return True
        raise OperationError(-errno.ENODEV, f"bdev {name}: is not a leg of any raid1")

    @operation
    def bdev_raid_get_bdevs(self, category: Category = "all") -> list[dict[str, Any]]:
        """Describe all raid devices of a category; each is online as long as it exists."""
        if category not in ("all", "online"):
            return []
        return [
            {"name": bdev.name, **bdev.summary()}
            for bdev in self._registry
            if isinstance(bdev, RaidBdev | MirrorBdev)
        ]


@opener("raid")
def open_raid(context: OpenContext) -> CData:
    """Open a raid device in a reactor."""
    bases = ffi.new("struct bdev *[]", list(context.bases))
    blocks = ffi.new("uint64_t[]", context.args["base_blocks"])
    setup = ffi.new(
        "struct raid_setup *",
        {
            "base_count": len(context.bases),
            "strip_blocks": context.args["strip_blocks"],
            "bases": bases,
            "base_blocks": blocks,
        },
    )
    return lib.raid_bdev_open(context.reactor, context.id, context.slot, setup)
