"""Null disks: writes vanish, reads answer at once. For measuring everything but the disk."""

from typing import Any

from bdev.kind import (
    Bdev,
    OpenContext,
    blocks_of,
    check_physical_block_size,
    opener,
    provider,
    refuse_unsupported,
)
from bdev.registry import BdevRegistry
from reactor.native import CData, lib
from reactor.operations import operation


class NullBdev(Bdev):
    """A disk of nothing; ``hints`` are reported as they were given."""

    kind = "null"
    product_name = "Null disk"

    def __init__(
        self,
        name: str,
        *,
        block_size: int,
        num_blocks: int,
        uuid: str,
        physical_block_size: int,
        hints: dict[str, int],
    ) -> None:
        super().__init__(name, block_size=block_size, num_blocks=num_blocks, uuid=uuid)
        self.physical_block_size = check_physical_block_size(physical_block_size, block_size)
        self.hints = hints

    def describe(self) -> dict[str, Any]:
        """Return the hints."""
        return self.hints

    def config(self) -> dict[str, Any]:
        """Return the call that would create this disk."""
        return {
            "method": "bdev_null_create",
            "params": {
                "name": self.name,
                "num_blocks": self.num_blocks,
                "block_size": self.block_size,
                "physical_block_size": self.physical_block_size,
                "uuid": self.uuid,
                **self.hints,
            },
        }


@provider
class NullOperations:
    """``bdev_null_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation(aliases=["construct_null_bdev"], touches=True)
    async def bdev_null_create(
        self,
        name: str,
        block_size: int,
        num_blocks: int,
        uuid: str | None = None,
        physical_block_size: int = 0,
        md_size: int = 0,
        dif_type: int = 0,
        dif_pi_format: int = 0,
        dif_is_head_of_md: bool = False,
        preferred_write_granularity: int = 0,
        preferred_write_alignment: int = 0,
        optimal_write_size: int = 0,
        preferred_unmap_granularity: int = 0,
        preferred_unmap_alignment: int = 0,
    ) -> str:
        """Create a disk of nothing and return its name."""
        refuse_unsupported(
            md_size=md_size,
            dif_type=dif_type,
            dif_pi_format=dif_pi_format,
            dif_is_head_of_md=dif_is_head_of_md,
        )
        disk = NullBdev(
            name,
            block_size=block_size,
            num_blocks=num_blocks,
            uuid=uuid or "",
            physical_block_size=physical_block_size,
            hints={
                "preferred_write_granularity": preferred_write_granularity,
                "preferred_write_alignment": preferred_write_alignment,
                "optimal_write_size": optimal_write_size,
                "preferred_unmap_granularity": preferred_unmap_granularity,
                "preferred_unmap_alignment": preferred_unmap_alignment,
            },
        )
        await self._registry.register(disk)
        return name

    @operation
    async def bdev_null_resize(self, name: str, new_size: int) -> bool:
        """Give a disk ``new_size`` MiB, and let guests know."""
        disk = self._registry.find_as(name, NullBdev)
        await self._registry.resize(disk, blocks_of(new_size, disk.block_size))
        return True

    @operation(aliases=["delete_null_bdev"], touches=True)
    async def bdev_null_delete(self, name: str) -> bool:
        """Delete a null disk."""
        await self._registry.remove(name, kind="null")
        return True


@opener("null")
def open_null(context: OpenContext) -> CData:
    """Open a null disk in a reactor."""
    return lib.null_bdev_open(
        context.reactor,
        context.id,
        context.slot,
        context.args["block_size"],
        context.args["num_blocks"],
    )
