"""What is known of the block devices: SPDK's ``bdev_get_bdevs``."""

from typing import Any

from bdev.kind import Bdev, Op, provider
from bdev.limits import UNITS
from bdev.registry import BdevRegistry
from reactor.operations import operation

# SPDK's names of I/O types, in its order. None: there is no such operation here.
_IO_TYPES: dict[str, Op | None] = {
    "read": Op.READ,
    "write": Op.WRITE,
    "unmap": Op.UNMAP,
    "flush": Op.FLUSH,
    "reset": Op.RESET,
    "nvme_admin": None,
    "nvme_io": None,
    "nvme_io_md": None,
    "write_zeroes": Op.WRITE_ZEROES,
    "zcopy": None,
    "get_zone_info": None,
    "zone_management": None,
    "zone_append": None,
    "compare": Op.COMPARE,
    "compare_and_write": Op.COMPARE_AND_WRITE,
    "abort": None,
    "seek_hole": None,
    "seek_data": None,
    "copy": Op.COPY,
    "nvme_iov_md": None,
    "nvme_nssr": None,
    "write_uncorrectable": None,
}


def describe(bdev: Bdev) -> dict[str, Any]:
    """Return a device's entry in ``bdev_get_bdevs``."""
    return {
        "name": bdev.name,
        "aliases": [bdev.uuid],
        "product_name": bdev.product_name,
        "block_size": bdev.block_size,
        "num_blocks": bdev.num_blocks,
        "preferred_write_alignment": 0,
        "preferred_write_granularity": 0,
        "optimal_write_size": 0,
        "preferred_unmap_alignment": 0,
        "preferred_unmap_granularity": 0,
        "uuid": bdev.uuid,
        **bdev.describe(),
        "assigned_rate_limits": bdev.limits.rates.describe()
        if bdev.limits
        else dict.fromkeys(UNITS, 0),
        "claimed": bool(bdev.claims),
        "zoned": False,
        "supported_io_types": {name: op in bdev.supported for name, op in _IO_TYPES.items()},
        "driver_specific": bdev.driver_specific(),
    }


@provider
class InfoOperations:
    """``bdev_get_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation(aliases=["get_bdevs"])
    async def bdev_get_bdevs(
        self,
        name: str | None = None,
        timeout: int = 0,
    ) -> list[dict[str, Any]]:
        """Describe all devices, or one, waiting up to ``timeout`` ms for its creation."""
        if name is None:
            return [describe(bdev) for bdev in self._registry]
        return [describe(await self._registry.wait_for(name, timeout / 1000))]
