"""The operations on vhost-scsi controllers, and the subsystem ``vhost_scsi``."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from bdev.kind import Bdev
from reactor.control import program_version
from reactor.errors import INVALID_PARAMS, OperationError
from reactor.interfaces import Cluster
from reactor.native import lib
from reactor.operations import operation
from reactor.saved import Calls, Configured, PartKey
from scsi.units import Bdevs, Units
from vhost.entrance import SERVER
from vhost.scsi import MAX_LUNS, MAX_TARGETS, Lun, ScsiDevice, ScsiSession
from vhost.scsi_controller import Ask, ScsiController
from vhost.service import Registry, VhostService, invalid


class ScsiRegistry(Registry, Bdevs, Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""


class ScsiSubsystem(Configured):
    """The subsystem ``scsi``: it has no configuration of its own."""

    name = "scsi"
    depends_on = ("bdev",)

    def parts(self) -> Iterable[tuple[PartKey, Calls]]:
        """See Configured."""
        return []


class VhostScsiService(Configured):
    """vhost-scsi controllers: the subsystem ``vhost_scsi`` of a saved configuration."""

    name = "vhost_scsi"
    depends_on = ("scsi",)

    def __init__(
        self,
        vhost: VhostService,
        cluster: Cluster,
        registry: ScsiRegistry,
        state_dir: Path | None = None,
    ) -> None:
        """``vhost`` is the service of all controllers, which has names and sockets in its care.

        ``state_dir``: where reservations are kept that survive a restart; None: there are none.
        """
        self._vhost = vhost
        self._registry = registry
        self._units = Units(cluster, registry, state_dir)
        self._watched: dict[Lun, tuple[Any, Any]] = {}

    def parts(self) -> Iterator[tuple[PartKey, Calls]]:
        """See Configured."""
        for controller in self._controllers():
            yield PartKey(0, controller.name), controller.config()

    def part(self, key: PartKey) -> Calls:
        """See Configured."""
        controller = self._vhost.get(key.name)
        return controller.config() if isinstance(controller, ScsiController) else []

    @operation(aliases=["construct_vhost_scsi_controller"], touches=True)
    def vhost_create_scsi_controller(
        self,
        ctrlr: str,
        cpumask: str | None = None,
        delay: bool = False,
        mode: str = SERVER,
        path: str | None = None,
    ) -> bool:
        """Make a virtio-scsi controller on socket ``ctrlr``; ``delay``: it listens when started.

        ``mode`` and ``path`` are those of vhost_create_blk_controller.
        """
        endpoint = self._vhost.endpoint(ctrlr, mode, path)
        device = ScsiDevice(ctrlr, self._vhost.parse_cpumask(cpumask))
        controller = ScsiController(
            ctrlr,
            endpoint,
            device,
            self._vhost.host,
            self._vhost.next_session,
            self._units,
            self._unwatch,
        )
        if not delay:
            self._start(controller)
        self._vhost.add(controller, self)
        return True

    @operation(touches=True)
    def vhost_start_scsi_controller(self, ctrlr: str) -> bool:
        """Listen on the socket of a controller that was made with ``delay``."""
        controller = self._find(ctrlr)
        if controller.started:
            raise invalid(errno.EALREADY, f"controller {ctrlr} listens already")
        self._start(controller)
        return True

    @operation(aliases=["add_vhost_scsi_lun"], touches=True)
    async def vhost_scsi_controller_add_target(
        self,
        ctrlr: str,
        scsi_target_num: int,
        bdev_name: str,
        lun: int = 0,
        readonly: bool = False,
        serial: str = "",
        vendor: str = "VHOST",
        product: str = "",
    ) -> int:
        """Have a bdev as a LUN of a target, new or not; return the target's number.

        ``scsi_target_num`` -1 is the first target that there is not. ``serial``, ``vendor`` and
        ``product`` are what INQUIRY tells; by default the bdev's UUID and kind.
        """
        controller = self._find(ctrlr)
        device = controller.device
        number = scsi_target_num
        if number == -1:
            number = self._free_target(device)
        if not 0 <= number < MAX_TARGETS:
            text = f"scsi_target_num {scsi_target_num}: must be -1 or less than {MAX_TARGETS}"
            raise invalid(errno.EINVAL, text)
        if not 0 <= lun < MAX_LUNS:
            raise invalid(errno.EINVAL, f"lun {lun}: must be less than {MAX_LUNS}")
        if device.find(number, lun) is not None:
            raise invalid(errno.EEXIST, f"LUN {lun} of target {number} of {ctrlr}")
        bdev = self._vhost.find_bdev(bdev_name, controller.endpoint)
        identity = check_identity(bdev, serial=serial, vendor=vendor, product=product)
        if bdev.claims and not readonly:
            raise invalid(errno.EPERM, f"bdev {bdev.name} is claimed by {bdev.claims[0]}")
        identity["readonly"] = readonly or bdev.readonly
        added = device.add(number, lun, self._units.use(bdev), identity)
        controller.touched()
        self._watch(controller, added)
        try:
            await controller.lun_added(added)
        except BaseException:
            await self._remove(controller, added)
            raise
        return number

    @operation(aliases=["remove_vhost_scsi_target"], touches=True)
    async def vhost_scsi_controller_remove_target(
        self, ctrlr: str, scsi_target_num: int, lun: int | None = None
    ) -> bool:
        """Remove a target, or one LUN of it, once its I/O is done."""
        controller = self._find(ctrlr)
        found = [
            one
            for one in controller.device
            if one.target == scsi_target_num and lun in (None, one.lun)
        ]
        if not found:
            raise invalid(errno.EBUSY, f"{ctrlr} has no target {scsi_target_num}, or no such LUN")
        await asyncio.gather(*(self._remove(controller, one) for one in found))
        return True

    @operation(aliases=["get_scsi_devices"])
    def scsi_get_devices(self) -> list[dict[str, Any]]:
        """Describe all SCSI targets."""
        targets = [
            (controller, number)
            for controller in self._controllers()
            for number in controller.device.targets()
        ]
        return [
            {"id": index, "device_name": f"Target {number}", "ctrlr": controller.name}
            for index, (controller, number) in enumerate(targets)
        ]

    @operation(internal=True)
    async def vhost_scsi_forward(
        self,
        session: int,
        pid: int,
        function: int,
        target: int,
        lun: int,
        tag: int,
        nexuses: list[int],
    ) -> int:
        """Have what process ``pid`` was asked by a guest done by all others whom it concerns.

        Returns how many tasks of theirs it was for, when those that it aborts have ended.
        """
        asks = []
        if function != lib.SCSI_PREEMPT:
            place = {"session": session, "target": target, "lun": lun}
            asks.append(Ask(function=function, tag=tag, but=pid, **place))
        if function in (lib.SCSI_UNIT_RESET, lib.SCSI_PREEMPT):
            for other, at in self._others(session, target, lun):
                place = {"session": other.record.id, "target": at.target, "lun": at.lun}
                if function == lib.SCSI_UNIT_RESET:
                    asks.append(Ask(function=function, **place))
                elif is_member(at.unit.nexus(other.initiator, at.port), nexuses):
                    asks.append(Ask(function=lib.SCSI_ABORT_TASK_SET, **place))
        found = await asyncio.gather(*(self._manage(ask) for ask in asks))
        return sum(found)

    async def _manage(self, ask: Ask) -> int:
        for controller in self._controllers():
            if ask.session in controller.guests:
                return await controller.manage(ask)
        return 0

    def _others(self, session: int, target: int, lun: int) -> list[tuple[ScsiSession, Lun]]:
        """Return all other ways to the unit that a session has at a place."""
        controllers = self._controllers()
        units = [
            found.unit
            for controller in controllers
            if session in controller.guests and (found := controller.device.find(target, lun))
        ]
        return [
            (guest, at)
            for controller in controllers
            for guest in controller.guests.values()
            for at in controller.device
            if at.unit in units and (guest.record.id, at.target, at.lun) != (session, target, lun)
        ]

    def _controllers(self) -> list[ScsiController]:
        every = self._vhost.controllers()
        return [controller for controller in every if isinstance(controller, ScsiController)]

    def _find(self, name: str) -> ScsiController:
        controller = self._vhost.get(name)
        if isinstance(controller, ScsiController):
            return controller
        raise invalid(errno.ENODEV, f"SCSI controller {name!r:.80}")

    def _start(self, controller: ScsiController) -> None:
        try:
            controller.open()
        except OSError as error:
            text = f"{error.strerror}: {error.filename}"
            raise OperationError(INVALID_PARAMS, text) from None
        controller.started = True
        controller.touched()

    @staticmethod
    def _free_target(device: ScsiDevice) -> int:
        used = set(device.targets())
        for number in range(MAX_TARGETS):
            if number not in used:
                return number
        raise invalid(errno.ENOSPC, f"{device.name} has {MAX_TARGETS} targets already")

    def _watch(self, controller: ScsiController, lun: Lun) -> None:
        """Follow what becomes of a LUN's bdev."""

        async def removed(_: Bdev) -> None:
            await self._remove(controller, lun)

        async def resized(_: Bdev) -> None:
            lun.unit.attention(lib.SCSI_ATTENTION_CAPACITY_CHANGED)
            await controller.lun_resized(lun)

        self._watched[lun] = (removed, resized)
        self._registry.on_removed(lun.unit.bdev, removed)
        self._registry.on_resized(lun.unit.bdev, resized)

    def _unwatch(self, lun: Lun) -> None:
        callbacks = self._watched.pop(lun, ())
        self._registry.forget_callbacks(lun.unit.bdev, *callbacks)

    async def _remove(self, controller: ScsiController, lun: Lun) -> None:
        if lun not in self._watched:
            return  # it is being removed
        self._unwatch(lun)
        controller.device.remove(lun)
        controller.touched()
        await controller.lun_removed(lun)
        self._units.release(lun.unit)


def is_member(nexus: int, nexuses: list[int]) -> bool:
    """Tell whether a nexus is in a set of them, 64 a word."""
    return nexus >= 0 and bool(nexuses[nexus // 64] >> nexus % 64 & 1)


def check_identity(bdev: Bdev, *, serial: str, vendor: str, product: str) -> dict[str, Any]:
    """Return what INQUIRY tells of a bdev; OperationError for a text that does not fit."""
    default = bdev.product_name.split(" ")[0]
    for name, value, size in (
        ("serial", serial, 32),
        ("vendor", vendor, 8),
        ("product", product, 16),
    ):
        if not value.isascii() or (value and not value.isprintable()) or len(value) > size:
            text = f"{name} {value[:40]!r}: must have at most {size} printable ASCII characters"
            raise invalid(errno.EINVAL, text)
    return {
        "vendor": vendor or "VHOST",
        "product": product or f"{default} disk"[:16],
        "revision": program_version()[:4],
        "serial": serial or bdev.uuid.replace("-", ""),
        "uuid": bdev.uuid,
    }
