"""Passthru: a device that hands everything on to another one; the template of stacked kinds.

A stacked kind is a subclass of :class:`bdev.stacked.LayerBdev` (on one base) or
:class:`bdev.stacked.StackedBdev` (on several), operations that create and delete it, and an opener
that finds the handles of the bases in ``context.bases``.
"""

from typing import Any

from bdev.kind import OpenContext, opener, provider
from bdev.registry import BdevRegistry
from bdev.stacked import LayerBdev
from reactor.native import CData, lib
from reactor.operations import operation


class PassthruBdev(LayerBdev):
    """Another device under another name."""

    kind = "passthru"
    product_name = "passthru"

    def driver_specific(self) -> dict[str, Any]:
        """Return both names."""
        return {"passthru": {"name": self.name, "base_bdev_name": self.bases[0].name}}

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device."""
        return {
            "method": "bdev_passthru_create",
            "params": {
                "name": self.name,
                "base_bdev_name": self.bases[0].name,
                "uuid": self.uuid,
            },
        }


@provider
class PassthruOperations:
    """``bdev_passthru_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation(aliases=["construct_passthru_bdev"], touches=True)
    async def bdev_passthru_create(
        self, name: str, base_bdev_name: str, uuid: str | None = None
    ) -> str:
        """Create a device that hands everything on to ``base_bdev_name``, and return its name."""
        base = self._registry.find(base_bdev_name)
        await self._registry.register(PassthruBdev(name, base, uuid=uuid or ""))
        return name

    @operation(aliases=["delete_passthru_bdev"], touches=True)
    async def bdev_passthru_delete(self, name: str) -> bool:
        """Delete a passthru device; its base stays."""
        await self._registry.remove(name, kind="passthru")
        return True


@opener("passthru")
def open_passthru(context: OpenContext) -> CData:
    """Open a passthru device in a reactor."""
    return lib.passthru_bdev_open(
        context.id,
        context.slot,
        context.args["num_blocks"],
        context.bases[0],
    )
