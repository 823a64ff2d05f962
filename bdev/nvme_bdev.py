"""One namespace of an NVMe controller as a bdev, and what clients are told of both."""

import errno
from typing import Any

from bdev.kind import Bdev
from bdev.nvme_controller import NvmeController
from bdev.nvme_identify import Namespace
from reactor.errors import OperationError


class NvmeBdev(Bdev):
    """One namespace."""

    kind = "nvme"
    product_name = "NVMe disk"

    def __init__(
        self, controller: NvmeController, namespace: Namespace, attach: dict[str, Any]
    ) -> None:
        super().__init__(
            f"{controller.name}n{namespace.nsid}",
            block_size=namespace.block_size,
            num_blocks=namespace.num_blocks,
            uuid=namespace.uuid,
            readonly=namespace.readonly,
            unmap=controller.identity.unmap,
        )
        self.controller = controller
        self.namespace = namespace
        self._attach = attach

    async def lend(self, reactor: Any) -> tuple[dict[str, Any], list[int]]:
        """Give the reactor its queue pair, which it shares between the controller's namespaces."""
        if self.controller.failed:
            raise OperationError(-errno.ENODEV, f"{self.controller.name}: {self.controller.failed}")
        pair = await self.controller.queues.lend(reactor)
        return self.controller.setup(pair, self.namespace)

    async def take_back(self, reactor: Any) -> None:
        """Delete the reactor's queue pair after its last handle."""
        await self.controller.queues.give_back(reactor)

    async def fence(self, reactor: Any) -> None:
        """Delete the queue pair of a reactor that died, which ends its commands."""
        await self.controller.fence(reactor)

    def config(self) -> dict[str, Any]:
        """Return the call that attaches the whole controller."""
        return {"method": "bdev_nvme_attach_controller", "params": self._attach}

    def driver_specific(self) -> dict[str, Any]:
        """Return what SPDK says of such a disk."""
        identity, address = self.controller.identity, self.controller.transport.address
        version = identity.version
        return {
            "nvme": [
                {
                    "pci_address": address,
                    "trid": {"trtype": "PCIe", "traddr": address},
                    "ctrlr_data": {
                        "cntlid": identity.controller_id,
                        "vendor_id": f"0x{identity.vendor:04x}",
                        "model_number": identity.model,
                        "serial_number": identity.serial,
                        "firmware_revision": identity.firmware,
                        "subnqn": identity.subnqn,
                    },
                    "vs": {"nvme_version": f"{version >> 16}.{version >> 8 & 0xFF}"},
                    "ns_data": {"id": self.namespace.nsid, "can_share": self.namespace.shared},
                }
            ]
        }


class Attached:
    """A controller, and the devices that its namespaces are."""

    def __init__(self, controller: NvmeController, attach: dict[str, Any]) -> None:
        self.controller = controller
        self.attach = attach
        self.bdevs: dict[int, NvmeBdev] = {}


def describe(attached: Attached) -> dict[str, Any]:
    """Return what ``bdev_nvme_get_controllers`` says of a controller."""
    controller = attached.controller
    address = controller.transport.address
    entry = {
        "state": "failed" if controller.failed else "enabled",
        "trid": {"trtype": "PCIe", "traddr": address},
        "cntlid": controller.identity.controller_id,
        "host": {"nqn": "", "addr": "", "svcid": ""},
        "numa_id": -1,
        "bdevs": [bdev.name for bdev in attached.bdevs.values()],
        "refused": [
            {"nsid": nsid, "reason": reason} for nsid, reason in controller.refused.items()
        ],
        "resets": controller.resets,
        "queues": [
            {
                "qid": pair.qid,
                "reactor": pair.reactor.name,
                "depth": pair.depth,
                "interrupt": pair.interrupt >= 0,
                "commands": pair.watch.commands,
                "completions": pair.watch.completions,
                "submission_doorbells": pair.watch.submission_doorbells,
                "completion_doorbells": pair.watch.completion_doorbells,
                "bounced": pair.watch.bounced,
                "retries": pair.watch.retries,
                "waits": pair.watch.waits,
            }
            for pair in controller.queues
        ],
    }
    if controller.failed:
        entry["reason"] = controller.failed
    return {"name": controller.name, "ctrlrs": [entry]}
