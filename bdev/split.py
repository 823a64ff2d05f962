"""Split: a device cut into equal parts."""

from typing import Any

from bdev.kind import EINVAL, Bdev, opener, provider
from bdev.part import PartBdev, open_part
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.operations import operation

MIB = 1 << 20
MAX_PARTS = 1024


class SplitBdev(PartBdev):
    """Part ``index`` of so many; the call that made them all is what each saves."""

    kind = "split"
    product_name = "Split Disk"

    def __init__(self, base: Bdev, index: int, num_blocks: int, call: dict[str, Any]) -> None:
        super().__init__(
            f"{base.name}p{index}", base, first=index * num_blocks, num_blocks=num_blocks
        )
        self._call = call

    def driver_specific(self) -> dict[str, Any]:
        """Return where it lies."""
        return {"split": {"base_bdev": self.bases[0].name, "offset_blocks": self.first}}

    def config(self) -> dict[str, Any]:
        """Return the call that would create all parts."""
        return {"method": "bdev_split_create", "params": self._call}


def blocks_a_part(base: Bdev, count: int, size_mb: int) -> int:
    """Return how many blocks each of ``count`` parts gets; OperationError(-22) if they don't fit.

    ``size_mb`` is in MiB; 0 divides all of the base.
    """
    if not 1 <= count <= MAX_PARTS:
        raise OperationError(EINVAL, f"split_count {count}: must be 1 to {MAX_PARTS}")
    if size_mb < 0:
        raise OperationError(EINVAL, f"split_size_mb {size_mb}: must be 0 (as large as can be) up")
    blocks = size_mb * MIB // base.block_size if size_mb else base.num_blocks // count
    if blocks == 0 or blocks * count > base.num_blocks:
        raise OperationError(
            EINVAL,
            f"{count} parts of {f'{size_mb} MiB' if size_mb else 'a block'} do not fit in bdev "
            f"{base.name}, which has {base.size} bytes",
        )
    return blocks


@provider
class SplitOperations:
    """``bdev_split_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    def _parts(self, base: Bdev) -> list[str]:
        above = self._registry.above(base)
        return [bdev.name for bdev in above if isinstance(bdev, SplitBdev)]

    @operation(aliases=["construct_split_vbdev"])
    async def bdev_split_create(
        self, base_bdev: str, split_count: int, split_size_mb: int = 0
    ) -> list[str]:
        """Cut ``base_bdev`` into parts ``base_bdevp0``, ``base_bdevp1`` ... and return their names.

        ``split_size_mb`` is in MiB; 0 divides all of the base.
        """
        base = self._registry.find(base_bdev)
        if self._parts(base):
            raise OperationError(-17, f"File exists: bdev {base.name} is split already")
        blocks = blocks_a_part(base, split_count, split_size_mb)
        call = {
            "base_bdev": base.name,
            "split_count": split_count,
            "split_size_mb": split_size_mb,
        }
        try:
            for index in range(split_count):
                await self._registry.register(SplitBdev(base, index, blocks, call))
        except BaseException:
            for name in self._parts(base):
                await self._registry.remove(name, kind="split")
            raise
        return self._parts(base)

    @operation(aliases=["destruct_split_vbdev"])
    async def bdev_split_delete(self, base_bdev: str) -> bool:
        """Delete all parts of ``base_bdev``, none if something stands on one; the base stays."""
        base = self._registry.find(base_bdev)
        parts = self._parts(base)
        if not parts:
            raise OperationError(-19, f"No such device: bdev {base.name} is not split")
        for name in parts:
            self._registry.check_free(name)
        for name in parts:
            await self._registry.remove(name, kind="split")
        return True


opener("split")(open_part)
