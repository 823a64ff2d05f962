"""``bdev_set_qos_limit``."""

from bdev.kind import provider
from bdev.limits import check_limits
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.operations import operation


@provider
class QosOperations:
    """Limits on any device, at any time."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation(aliases=["set_bdev_qos_limit"])
    async def bdev_set_qos_limit(
        self,
        name: str,
        rw_ios_per_sec: int | None = None,
        rw_mbytes_per_sec: int | None = None,
        r_mbytes_per_sec: int | None = None,
        w_mbytes_per_sec: int | None = None,
    ) -> bool:
        """Limit reads and writes a second, and MiB a second; 0 ends a limit, absent ones stay."""
        given = {
            "rw_ios_per_sec": rw_ios_per_sec,
            "rw_mbytes_per_sec": rw_mbytes_per_sec,
            "r_mbytes_per_sec": r_mbytes_per_sec,
            "w_mbytes_per_sec": w_mbytes_per_sec,
        }
        limits = check_limits({key: value for key, value in given.items() if value is not None})
        if not limits:
            raise OperationError(-22, f"no limit given: {', '.join(given)}")
        await self._registry.limit(self._registry.find(name), limits)
        return True
