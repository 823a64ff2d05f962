"""Operations that change a controller while guests use it, without their noticing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

from bdev.kind import Bdev
from bdev.limits import LimitParameters, check_limits
from reactor.cpumask import format_mask
from reactor.errors import OperationError
from reactor.operations import operation
from vhost.service import BlkController, VhostService, invalid


class VhostManagement:
    """Disconnecting, moving and swapping, for the controllers of a VhostService.

    ``save`` keeps the configuration as it is now for the next control process, or raises OSError.
    """

    def __init__(self, vhost: VhostService) -> None:
        self.save: Callable[[], None] = lambda: None
        self._vhost = vhost

    @operation(touches=True)
    async def vhost_controller_disconnect(self, ctrlr: str) -> int:
        """Close the connections of all front-ends once their I/O is done; return how many.

        The socket stays, and they may connect again.
        """
        return await self._vhost.find(ctrlr).disconnect()

    @operation
    async def vhost_controller_move(self, ctrlr: str, cpumask: str) -> list[dict[str, Any]]:
        """Have other reactors serve a controller, from now on and after a restart.

        Queues that are where they may be stay there. Returns where each queue is now.
        """
        controller = self._vhost.find(ctrlr)
        cpus = self._vhost.parse_cpumask(cpumask)
        if not cpus:
            raise invalid(errno.EINVAL, f"cpumask {cpumask!r:.40}: no reactor is left")
        await controller.move(cpus)
        if isinstance(controller, BlkController):
            controller.params["cpumask"] = format_mask(cpus)
        return controller.places()

    @operation(touches=True)
    async def vhost_controller_set_qos_limit(
        self,
        ctrlr: str,
        **limits: Unpack[LimitParameters],
    ) -> bool:
        """Limit what all queues of a controller together are served a second, from any disk.

        Parameters are those of bdev_set_qos_limit: 0 ends a limit, absent ones stay. Limits of the
        bdevs hold besides.
        """
        try:
            changes = check_limits(limits)
        except OperationError as error:
            raise invalid(errno.EINVAL, error.message) from None
        await self._vhost.find(ctrlr).set_limits(changes)
        return True

    @operation
    async def vhost_blk_controller_set_bdev(self, ctrlr: str, dev_name: str) -> bool:
        """Serve another bdev under the guests that use a controller.

        It takes the place of the one before at a moment when no request is in flight; that the
        contents are the same is the caller's to see to. It must be as large or larger, with blocks
        of the same size and whatever the guests were told that they can do. A controller whose bdev
        was removed comes to life again.

        Every reactor has it open before any serves it: if one cannot, nothing changes.
        The configuration names the new one before any queue is served by it, and after the last
        was served by the other: if this process dies meanwhile, no write of a guest is forgotten.
        """
        controller = self._vhost.find(ctrlr)
        if not isinstance(controller, BlkController):
            raise invalid(errno.ENOTSUP, f"controller {ctrlr}: is none of virtio-blk")
        bdev = self._vhost.find_bdev(dev_name, controller.endpoint)
        if bdev is controller.device.bdev:
            return True
        check_replacement(controller, bdev)

        def replace() -> None:
            # Another operation may have deleted or claimed it while requests were waited for.
            check_replacement(controller, self._vhost.find_bdev(bdev.uuid, controller.endpoint))
            self._serve(controller, bdev)

        device = controller.device
        await controller.exchange(device.hold, partial(device.hold_other, bdev), replace)
        return True

    def _serve(self, controller: BlkController, bdev: Bdev) -> None:
        """Be another bdev, while no queue is served; OperationError if that cannot be saved."""
        device, name = controller.device, controller.params["dev_name"]
        former = device.bdev
        device.set_bdev(bdev)
        controller.params["dev_name"] = bdev.name
        try:
            self.save()
        except OSError as error:
            device.set_bdev(former)
            controller.params["dev_name"] = name
            detail = (
                f"controller {controller.name}: bdev not changed, for it cannot be saved: {error}"
            )
            raise invalid(error.errno or errno.EIO, detail) from None


def check_replacement(controller: BlkController, bdev: Bdev) -> None:
    """Raise OperationError unless guests that know one bdev can go on with another."""
    device = controller.device
    told, new = device.facts, device.facts_of(bdev)
    if bdev.claims and not device.readonly:
        raise invalid(errno.EPERM, f"bdev {bdev.name} is claimed by {bdev.claims[0]}")
    if new.block_size != told.block_size:
        detail = f"blocks of {new.block_size} bytes, where guests know {told.block_size}"
        raise invalid(errno.EINVAL, f"bdev {bdev.name}: {detail}")
    if new.num_blocks < told.num_blocks:
        detail = f"has {new.num_blocks} blocks, where guests know {told.num_blocks}"
        raise invalid(errno.EINVAL, f"bdev {bdev.name}: {detail}")
    missing = [
        name
        for name in ("flush", "discard", "write_zeroes")
        if getattr(told, name) and not getattr(new, name)
    ]
    if new.readonly != told.readonly:
        missing.insert(0, "being read-only" if told.readonly else "being writable")
    if missing:
        detail = f"lacks what guests know: {', '.join(missing)}"
        raise invalid(errno.EINVAL, f"bdev {bdev.name}: {detail}")
