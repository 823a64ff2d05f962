"""The kind ``virtio``: disks of other vhost-user servers, virtio-blk and virtio-scsi.

It lives here, above bdev/, because it speaks vhost-user: vhost.service imports it in the control
process, and vhost.worker vhost.initiator_worker in reactors, which registers it.
"""

from __future__ import annotations

import errno
import uuid as uuids
from collections.abc import Iterable
from typing import Any, Literal

from bdev.kind import DEVICE_OPS, EINVAL, Bdev, provider
from bdev.parameters import BLOCK_SIZES, check_name
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import lib
from reactor.operations import operation
from vhost import initiator_worker as initiator_worker  # the reactor's side
from vhost.initiator_controller import InitiatorController, socket_path
from vhost.initiator_session import MAX_QUEUES, Disk

QUEUE_SIZE = 256
QUEUE_SIZES = range(4, 1025)


class VirtioBdev(Bdev):
    """One disk of a server."""

    kind = "virtio"
    product_name = "Virtio Disk"

    def __init__(
        self, name: str, controller: InitiatorController, disk: Disk, attach: dict[str, Any]
    ) -> None:
        super().__init__(
            name,
            block_size=disk.block_size,
            num_blocks=disk.num_blocks,
            uuid=str(uuids.uuid5(uuids.NAMESPACE_URL, f"vhost-user://{controller.path}#{name}")),
            readonly=disk.readonly,
            unmap=disk.max_unmap > 0,
        )
        self.controller = controller
        self.disk = disk
        self._attach = attach

    async def lend(self, reactor: Any) -> tuple[dict[str, Any], list[int]]:
        """Give a reactor a queue."""
        disk = self.disk
        key, link, fds = await self.controller.lend(self, reactor)
        setup = {
            "key": key,
            "kind": lib.INITIATOR_SCSI if self.controller.kind == "scsi" else lib.INITIATOR_BLK,
            "queue_size": self.controller.queue_size,
            "block_size": self.block_size,
            "block_count": self.num_blocks,
            "supported": sum(1 << op for op in self.supported & DEVICE_OPS),
            "readonly": self.readonly,
            "flush": disk.flush,
            "write_zeroes": disk.max_zeroes > 0,
            "max_unmap": disk.max_unmap,
            "max_zeroes": disk.max_zeroes,
            "target": disk.target,
            "lun": disk.lun,
        }
        return {"setup": setup, "link": link}, fds

    async def opened(self, cluster: Any, reactor: Any) -> None:
        """Tell the handle whether the server has gone or come meanwhile."""
        del cluster
        await self.controller.opened(self, reactor)

    async def take_back(self, reactor: Any) -> None:
        """Stop the queue of a reactor."""
        await self.controller.take_back(self, reactor)

    async def fence(self, reactor: Any) -> None:
        """Stop the queue of a dead reactor: the server answers when nothing is in flight."""
        await self.controller.take_back(self, reactor)

    @property
    def has_history(self) -> bool:
        """Return that the server's disk is older than this device."""
        return True

    def driver_specific(self) -> dict[str, Any]:
        """Return where the disk is."""
        return {"virtio": describe(self.controller)}

    def config(self) -> dict[str, Any]:
        """Return the call that attaches the server with all of its disks."""
        return {"method": "bdev_virtio_attach_controller", "params": self._attach}


def describe(controller: InitiatorController) -> dict[str, Any]:
    """Return what is known of a server."""
    return {
        "name": controller.name,
        "trtype": "user",
        "traddr": controller.path,
        "dev_type": controller.kind,
        "vq_count": controller.queue_count,
        "vq_size": controller.queue_size,
        "state": "connected" if controller.connected else "reconnecting",
        "reconnects": controller.reconnects,
    }


class Attached:
    """A server and its disks."""

    def __init__(self, controller: InitiatorController) -> None:
        self.controller = controller
        self.bdevs: list[VirtioBdev] = []


@provider
class VirtioOperations:
    """``bdev_virtio_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._attached: dict[str, Attached] = {}
        self._names: set[str] = set()  # being attached as well
        registry.at_end(self._close_all)

    @operation(aliases=["construct_virtio_dev"])
    async def bdev_virtio_attach_controller(
        self,
        name: str,
        trtype: str,
        traddr: str,
        dev_type: Literal["blk", "scsi"],
        vq_count: int | None = None,
        vq_size: int | None = None,
    ) -> list[str]:
        """Connect to the server at ``traddr`` and return the names of its disks' devices.

        Each reactor takes one queue for each disk: there are ``vq_count``, or as many as the
        server has, of ``vq_size`` entries.
        """
        check_name(name)
        if trtype.lower() != "user":
            raise OperationError(EINVAL, f"trtype {trtype!r:.20}: must be user")
        if vq_count is not None and not 1 <= vq_count <= MAX_QUEUES:
            raise OperationError(EINVAL, f"vq_count {vq_count}: must be 1 to {MAX_QUEUES}")
        size = QUEUE_SIZE if vq_size is None else vq_size
        if size not in QUEUE_SIZES or size & (size - 1):
            raise OperationError(
                EINVAL,
                f"vq_size {size}: must be a power of two, {QUEUE_SIZES[0]} to {QUEUE_SIZES[-1]}",
            )
        path = socket_path(traddr)
        if name in self._names:
            raise OperationError(-errno.EEXIST, f"File exists: virtio controller {name!r:.80}")
        attach: dict[str, Any] = {"name": name, "trtype": "user", "traddr": path}
        attach |= {"dev_type": dev_type, "vq_size": size}
        if vq_count is not None:
            attach["vq_count"] = vq_count

        async def changed(disks: Iterable[Disk]) -> None:
            await self._changed(name, disks)

        controller = InitiatorController(
            name,
            path,
            dev_type,
            queues=vq_count,
            queue_size=size,
            cluster=self._registry.cluster,
            changed=changed,
        )
        self._names.add(name)
        try:
            await controller.start()
        except BaseException:
            self._names.discard(name)
            raise
        attached = self._attached[name] = Attached(controller)
        try:
            for disk in controller.disks:
                bdev = VirtioBdev(_name_of(name, dev_type, disk), controller, disk, attach)
                await self._registry.register(bdev)
                attached.bdevs.append(bdev)
        except BaseException:
            await self._detach(attached)
            raise
        return [bdev.name for bdev in attached.bdevs]

    async def _changed(self, name: str, disks: Iterable[Disk]) -> None:
        """Follow the sizes that a server tells."""
        attached = self._attached.get(name)
        for bdev in attached.bdevs if attached else ():
            for disk in disks:
                if (disk.target, disk.lun) == (bdev.disk.target, bdev.disk.lun):
                    await self._registry.resize(bdev, max(disk.num_blocks, 1))

    @operation(aliases=["remove_virtio_bdev"])
    async def bdev_virtio_detach_controller(self, name: str) -> bool:
        """Drain and remove the disks of a server, and disconnect.

        Requests that the server has not answered after 30 s fail.
        """
        await self._detach(self._find(name))
        return True

    async def _detach(self, attached: Attached) -> None:
        for bdev in list(attached.bdevs):
            try:
                await self._registry.remove(bdev.name)
            except OperationError as error:
                if error.code != -errno.ETIMEDOUT:
                    raise
                await attached.controller.lose()
                await self._registry.remove(bdev.name)
            attached.bdevs.remove(bdev)
        await attached.controller.close()
        self._attached.pop(attached.controller.name, None)
        self._names.discard(attached.controller.name)

    @operation
    def bdev_virtio_get_controllers(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the servers that are attached, or one."""
        chosen = list(self._attached.values()) if name is None else [self._find(name)]
        return [
            {**describe(one.controller), "bdevs": [bdev.name for bdev in one.bdevs]}
            for one in chosen
        ]

    @operation(aliases=["get_virtio_scsi_devs"])
    def bdev_virtio_scsi_get_devices(self) -> list[dict[str, Any]]:
        """Return the servers that are SCSI hosts."""
        return [
            {"name": name, "virtio": describe(one.controller)}
            for name, one in self._attached.items()
            if one.controller.kind == "scsi"
        ]

    def _find(self, name: str) -> Attached:
        if name not in self._attached:
            raise OperationError(-errno.ENODEV, f"No such device: virtio controller {name!r:.80}")
        return self._attached[name]

    def _close_all(self) -> None:
        for attached in self._attached.values():
            attached.controller.close_now()
        self._attached.clear()


def _name_of(name: str, kind: str, disk: Disk) -> str:
    """Return SPDK's name of a disk; it knows of one unit a target only."""
    if disk.block_size not in BLOCK_SIZES:
        raise OperationError(
            EINVAL, f"{name}: target {disk.target} has blocks of {disk.block_size} bytes"
        )
    if kind == "blk":
        return name
    return f"{name}t{disk.target}" + (f"l{disk.lun}" if disk.lun else "")
