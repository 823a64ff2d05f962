"""Delay: a device that takes longer than the one it stands on."""

import random
from typing import Any, Literal

from bdev.kind import EINVAL, Bdev, OpenContext, command, opener, provider
from bdev.registry import BdevRegistry
from bdev.stacked import LayerBdev
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib
from reactor.operations import operation

MAX_LATENCY = 3600 * 10**6  # microseconds

LatencyType = Literal["avg_read", "p99_read", "avg_write", "p99_write"]


def check_latency(name: str, latency: int) -> int:
    """Return ``latency`` (microseconds); OperationError(-22) if it cannot be one."""
    if not 0 <= latency <= MAX_LATENCY:
        raise OperationError(EINVAL, f"{name} {latency}: must be 0 to {MAX_LATENCY} microseconds")
    return latency


class DelayBdev(LayerBdev):
    """A device with four latencies (microseconds), which come on top of the base's own."""

    kind = "delay"
    product_name = "delay"

    def __init__(
        self, name: str, base: Bdev, *, latencies: dict[LatencyType, int], uuid: str
    ) -> None:
        super().__init__(name, base, uuid=uuid)
        self.latencies = latencies

    def nanoseconds(self) -> dict[str, int]:
        """Return the latencies as the opener and the command take them."""
        return {name: latency * 1000 for name, latency in self.latencies.items()}

    def open_args(self) -> dict[str, Any]:
        """Add the latencies, and a seed for a chance of its own in every reactor."""
        return {
            **super().open_args(),
            "latency": self.nanoseconds(),
            "seed": random.getrandbits(32),
        }

    def _params(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "base_bdev_name": self.bases[0].name,
            **{f"{which}_latency": latency for which, latency in self.latencies.items()},
        }

    def driver_specific(self) -> dict[str, Any]:
        """Return base and latencies."""
        return {"delay": self._params()}

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device."""
        return {"method": "bdev_delay_create", "params": {**self._params(), "uuid": self.uuid}}


@provider
class DelayOperations:
    """``bdev_delay_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation
    async def bdev_delay_create(
        self,
        name: str,
        base_bdev_name: str,
        avg_read_latency: int,
        p99_read_latency: int,
        avg_write_latency: int,
        p99_write_latency: int,
        uuid: str | None = None,
    ) -> str:
        """Create a device that takes so many microseconds longer, and return its name.

        One request in a hundred gets the p99 latency of its direction, the others the average.
        """
        latencies: dict[LatencyType, int] = {
            "avg_read": avg_read_latency,
            "p99_read": p99_read_latency,
            "avg_write": avg_write_latency,
            "p99_write": p99_write_latency,
        }
        for which, latency in latencies.items():
            check_latency(f"{which}_latency", latency)
        base = self._registry.find(base_bdev_name)
        await self._registry.register(DelayBdev(name, base, latencies=latencies, uuid=uuid or ""))
        return name

    @operation
    async def bdev_delay_update_latency(
        self, delay_bdev_name: str, latency_type: LatencyType, latency_us: int
    ) -> bool:
        """Change one latency, for requests that end from now on."""
        disk = self._registry.find_as(delay_bdev_name, DelayBdev)
        disk.latencies[latency_type] = check_latency("latency_us", latency_us)
        await self._registry.command(disk, disk.nanoseconds())
        return True

    @operation
    async def bdev_delay_delete(self, name: str) -> bool:
        """Delete a delay device; its base stays."""
        await self._registry.remove(name, kind="delay")
        return True


@opener("delay")
def open_delay(context: OpenContext) -> CData:
    """Open a delay device in a reactor."""
    return lib.delay_bdev_open(
        context.id,
        context.slot,
        context.args["num_blocks"],
        context.bases[0],
        ffi.new("struct delay_latency *", context.args["latency"]),
        context.args["seed"],
    )


@command("delay")
def set_latency(handle: CData, args: dict[str, Any]) -> None:
    """Have a handle use other latencies."""
    lib.delay_bdev_set_latency(handle, ffi.new("struct delay_latency *", args))
