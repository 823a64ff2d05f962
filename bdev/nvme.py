"""NVMe drives: the kind ``nvme``, one device for each namespace of a controller of ours."""

import asyncio
import errno
import itertools
import logging
from collections.abc import Callable
from typing import Any, Literal

from bdev.kind import EINVAL, provider
from bdev.nvme_bdev import Attached, NvmeBdev, describe
from bdev.nvme_controller import NvmeController, Options
from bdev.nvme_hotplug import DEFAULT_PERIOD_US, LONGEST_PERIOD_US, Hotplug
from bdev.nvme_transport import Transport
from bdev.parameters import check_name, refuse_unsupported
from bdev.pci import PciDevice, Sysfs, normal_address
from bdev.registry import BdevRegistry
from bdev.vfio import open_device
from reactor.errors import OperationError
from reactor.operations import operation

log = logging.getLogger(__name__)

# How a controller is reached, by ``trtype``: the function gets ``traddr``.
TRANSPORTS: dict[str, Callable[[str], Transport]] = {"PCIe": open_device}


@provider
class NvmeOperations:
    """``bdev_nvme_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._options = Options()
        self._attached: dict[str, Attached] = {}
        self._names: set[str] = set()  # being attached as well
        self.sysfs = Sysfs()
        self._hotplug = Hotplug(self._attach_plugged, self._addresses, lambda: self.sysfs)
        registry.at_end(self._close_all)
        registry.add_settings(self._settings)
        registry.add_settings(self._last_settings, last=True)

    def _find(self, name: str) -> Attached:
        try:
            return self._attached[name]
        except KeyError:
            raise OperationError(
                -errno.ENODEV, f"No such device: NVMe controller {name!r:.80}"
            ) from None

    @operation(aliases=["construct_nvme_bdev"])
    async def bdev_nvme_attach_controller(
        self,
        name: str,
        trtype: str,
        traddr: str,
        adrfam: str | None = None,
        trsvcid: str | None = None,
        priority: str | None = None,
        subnqn: str | None = None,
        hostnqn: str | None = None,
        hostaddr: str | None = None,
        hostsvcid: str | None = None,
        prchk_reftag: bool = False,
        prchk_guard: bool = False,
        multipath: str | None = None,
        num_io_queues: int | None = None,
        max_bdevs: int | None = None,
        dma: Literal["guest", "bounce"] = "guest",
        interrupts: bool = True,
    ) -> list[str]:
        """Take a drive over and return the names of its namespaces' devices.

        ``dma``: data moves straight to and from memory of guests, which pins it, or by way of
        buffers. ``interrupts``: false has reactors poll while anything is in flight.
        """
        del adrfam, trsvcid, hostnqn, multipath
        refuse_unsupported(
            priority=bool(priority),
            subnqn=bool(subnqn),
            hostaddr=bool(hostaddr),
            hostsvcid=bool(hostsvcid),
            prchk_reftag=prchk_reftag,
            prchk_guard=prchk_guard,
            max_bdevs=max_bdevs,
        )
        check_name(name)
        open_transport = next(
            (f for t, f in TRANSPORTS.items() if t.lower() == trtype.lower()), None
        )
        if open_transport is None:
            raise OperationError(EINVAL, f"trtype {trtype!r:.20}: must be PCIe")
        traddr = normal_address(traddr)
        if num_io_queues is not None and num_io_queues < 1:
            raise OperationError(EINVAL, f"num_io_queues {num_io_queues}: must be 1 or more")
        if name in self._names:
            raise OperationError(-errno.EEXIST, f"File exists: NVMe controller {name!r:.80}")
        attach: dict[str, Any] = {"name": name, "trtype": "PCIe", "traddr": traddr}
        if num_io_queues is not None:
            attach["num_io_queues"] = num_io_queues
        if dma != "guest":
            attach["dma"] = dma
        if not interrupts:
            attach["interrupts"] = False
        self._names.add(name)
        try:
            return await self._start(attach, open_transport)
        except BaseException:
            self._names.discard(name)
            raise

    async def _start(
        self, attach: dict[str, Any], open_transport: Callable[[str], Transport]
    ) -> list[str]:
        name = attach["name"]
        transport = open_transport(attach["traddr"])
        try:
            controller = NvmeController(
                name,
                transport,
                self._registry.cluster,
                self._options,
                self._changed,
                queues=attach.get("num_io_queues", max(len(self._registry.cluster.reactors), 1)),
                interrupts=attach.get("interrupts", True),
                direct=attach.get("dma", "guest") == "guest",
            )
        except BaseException:
            transport.close()
            raise
        await controller.start()
        if controller.direct:
            try:
                await self._registry.guest_dma.use(transport.dma)
            except BaseException:
                await controller.close()
                raise
        attached = Attached(controller, attach)
        try:
            await self._register(attached)
        except BaseException:
            await self._detach(attached)
            raise
        self._attached[name] = attached
        return [bdev.name for bdev in attached.bdevs.values()]

    async def _register(self, attached: Attached) -> None:
        """Make a device of each namespace that has none."""
        for nsid, namespace in attached.controller.namespaces.items():
            if nsid not in attached.bdevs:
                bdev = NvmeBdev(attached.controller, namespace, attached.attach)
                await self._registry.register(bdev)
                attached.bdevs[nsid] = bdev

    async def _changed(self, controller: NvmeController) -> None:
        """Follow what a controller says of its namespaces; forget one that was pulled out."""
        attached = self._attached.get(controller.name)
        if attached is None or attached.controller is not controller:
            return
        if controller.gone:
            await self._detach(attached)
            return
        for nsid, bdev in list(attached.bdevs.items()):
            now = controller.namespaces.get(nsid)
            if now is None or now.block_size != bdev.block_size:
                del attached.bdevs[nsid]
                await self._registry.remove(bdev.name)
            else:
                bdev.namespace = now
                await self._registry.resize(bdev, now.num_blocks)
        await self._register(attached)

    async def _detach(self, attached: Attached) -> None:
        name = attached.controller.name
        self._attached.pop(name, None)
        self._hotplug.leave(attached.controller.transport.address)
        try:
            for nsid, bdev in list(attached.bdevs.items()):
                if bdev in list(self._registry):  # it may have been removed by itself
                    await self._registry.remove(bdev.name)
                del attached.bdevs[nsid]
        except BaseException:
            self._attached[name] = attached  # requests are in flight still: to be detached again
            raise
        if attached.controller.direct:
            await self._registry.guest_dma.drop()
        await attached.controller.close()
        self._names.discard(name)

    def _addresses(self) -> set[str]:
        return {attached.controller.transport.address for attached in self._attached.values()}

    async def _attach_plugged(self, address: str) -> None:
        """Attach a drive that was plugged in, under a name as SPDK gives it."""
        number = next(i for i in itertools.count() if f"HotInNvme{i}" not in self._names)
        bdevs = await self.bdev_nvme_attach_controller(f"HotInNvme{number}", "PCIe", address)
        log.info("%s was plugged in: %s", address, ", ".join(bdevs))

    @operation(aliases=["set_bdev_nvme_hotplug"])
    def bdev_nvme_set_hotplug(self, enable: bool, period_us: int | None = None) -> bool:
        """Attach drives that vfio-pci is given from now on, looking every ``period_us``.

        They are named HotInNvme0 and so on. Those that are pulled out are removed in any case.
        """
        period = period_us or DEFAULT_PERIOD_US
        if not 0 < period <= LONGEST_PERIOD_US:
            raise OperationError(EINVAL, f"period_us {period}: must be 0 to {LONGEST_PERIOD_US}")
        if enable:
            self._hotplug.start(period)
        else:
            self._hotplug.stop()
        return True

    def _close_all(self) -> None:
        self._hotplug.stop()
        for attached in self._attached.values():
            attached.controller.close_now()
        self._attached.clear()

    @operation(aliases=["delete_nvme_controller"])
    async def bdev_nvme_detach_controller(
        self,
        name: str,
        trtype: str | None = None,
        traddr: str | None = None,
        restore: bool = False,
    ) -> bool:
        """Drain and remove the devices of a controller, shut it down, and let go of the drive.

        ``restore`` gives it back to the kernel's driver.
        """
        attached = self._find(name)
        address = attached.controller.transport.address
        if (traddr and normal_address(traddr) != address) or (trtype and trtype.lower() != "pcie"):
            raise OperationError(-errno.ENODEV, f"{name}: is PCIe {address}, not {trtype} {traddr}")
        await self._detach(attached)
        if restore:
            await asyncio.to_thread(self.sysfs.find(address).unbind)
        return True

    @operation(aliases=["get_nvme_controllers"])
    def bdev_nvme_get_controllers(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the attached controllers, or one."""
        chosen = list(self._attached.values()) if name is None else [self._find(name)]
        return [describe(attached) for attached in chosen]

    @operation
    def framework_get_pci_devices(self) -> list[dict[str, str]]:
        """Return the PCI devices that are attached, with their configuration space in hex."""
        devices = [
            PciDevice(self.sysfs, a.controller.transport.address) for a in self._attached.values()
        ]
        return [
            {"address": device.address, "config_space": device.config_space().hex()}
            for device in devices
        ]

    @operation
    async def bdev_nvme_reset_controller(self, name: str, cntlid: int | None = None) -> bool:
        """Reset a controller; what is in flight is submitted again afterwards."""
        controller = self._find(name).controller
        if cntlid is not None and cntlid != controller.identity.controller_id:
            raise OperationError(-errno.ENODEV, f"{name}: no controller {cntlid}")
        await controller.reset("asked for")
        return True

    @operation
    async def bdev_nvme_get_controller_health_info(self, name: str) -> dict[str, Any]:
        """Return a controller's SMART / Health Information log."""
        controller = self._find(name).controller
        health = await controller.health()
        return {
            "model_number": controller.identity.model,
            "serial_number": controller.identity.serial,
            "firmware_revision": controller.identity.firmware,
            "traddr": controller.transport.address,
            **health,
        }

    @operation
    def bdev_nvme_set_options(
        self,
        action_on_timeout: Literal["none", "reset", "abort"] | None = None,
        timeout_us: int | None = None,
        timeout_admin_us: int | None = None,
        bdev_retry_count: int | None = None,
    ) -> bool:
        """Set how long commands may take, what happens then, and how often errors are retried.

        Holds for controllers that are attached from now on.
        """
        given = {
            "action_on_timeout": action_on_timeout,
            "timeout_us": timeout_us,
            "timeout_admin_us": timeout_admin_us,
            "bdev_retry_count": bdev_retry_count,
        }
        for key, value in given.items():
            if isinstance(value, int) and value < 0:
                raise OperationError(EINVAL, f"{key} {value}: must be 0 or more")
        if bdev_retry_count is not None and bdev_retry_count > 100:
            raise OperationError(
                EINVAL, f"bdev_retry_count {bdev_retry_count}: must be 100 or less"
            )
        if self._names:
            raise OperationError(-errno.EPERM, "options are set before controllers are attached")
        self._options = Options(
            **{**vars(self._options), **{k: v for k, v in given.items() if v is not None}}
        )
        return True

    def _settings(self) -> list[dict[str, Any]]:
        if self._options == Options():
            return []
        return [{"method": "bdev_nvme_set_options", "params": dict(vars(self._options))}]

    def _last_settings(self) -> list[dict[str, Any]]:
        """Return what comes after the controllers, which have their own names before it looks."""
        if not self._hotplug.enabled:
            return []
        params = {"enable": True, "period_us": self._hotplug.period_us}
        return [{"method": "bdev_nvme_set_hotplug", "params": params}]
