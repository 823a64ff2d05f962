"""The operations on vhost-scsi controllers, and the subsystem ``vhost_scsi``."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from bdev.kind import Bdev
from reactor.control import program_version
from reactor.cpumask import format_mask
from reactor.errors import INVALID_PARAMS, OperationError
from reactor.interfaces import Cluster
from reactor.native import lib
from reactor.operations import operation
from scsi.units import Units
from vhost.controller import Controller
from vhost.entrance import SERVER, Endpoint
from vhost.host import ReactorHost
from vhost.interfaces import ServedDevice
from vhost.record import SessionRecord
from vhost.scsi import MAX_LUNS, MAX_TARGETS, Lun, ScsiDevice, ScsiSession
from vhost.service import Registry, VhostService, invalid
from vhost.virtio_scsi import Event, ScsiFeature

CAPACITY_CHANGED = 0x2A | 0x09 << 8  # additional sense code and qualifier, as an event has them


class ScsiController(Controller):
    """A controller with a virtio-scsi device."""

    device: ScsiDevice
    feature_bits = ScsiFeature

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        device: ScsiDevice,
        host: ReactorHost,
        next_id: Callable[[], int],
        units: Units,
        unwatch: Callable[[Lun], None],
    ) -> None:
        """Make one; ``unwatch`` is called for each LUN that it gives up."""
        super().__init__(name, endpoint, device, host, next_id)
        self.started = False
        self._unwatch = unwatch
        self.guests: dict[int, ScsiSession] = {}  # by session
        self._units = units

    def serve(self, record: SessionRecord) -> ServedDevice:
        """See Controller: every front-end is an initiator of its own."""
        used = {guest.number for guest in self.guests.values()}
        number = next(number for number in itertools.count() if number not in used)
        guest = ScsiSession(self.device, self._units, record, number)
        self.guests[record.id] = guest
        return guest

    def ended(self, record: SessionRecord) -> None:
        """See Controller."""
        self.guests.pop(record.id).end()

    def describe(self) -> dict[str, Any]:
        """Return the controller's entry in vhost_get_controllers."""
        targets = [
            {
                "scsi_dev_num": number,
                "id": number,
                "target_name": f"Target {number}",
                "luns": [
                    {"id": lun.lun, "bdev_name": lun.unit.bdev.name}
                    for lun in self.device
                    if lun.target == number
                ],
            }
            for number in self.device.targets()
        ]
        return {
            "ctrlr": self.name,
            "cpumask": format_mask(self.device.cpus),
            **asdict(self.coalescing),
            **self.describe_socket(),
            "sessions": self.describe_sessions(),
            "backend_specific": {"scsi": targets},
        }

    def config(self) -> list[dict[str, Any]]:
        """Return the calls that would create it again."""
        cpumask = format_mask(self.device.cpus)
        create = {"ctrlr": self.name, "cpumask": cpumask, "delay": True, **self.endpoint.params()}
        calls = [{"method": "vhost_create_scsi_controller", "params": create}]
        for lun in self.device:
            params = {
                "ctrlr": self.name,
                "scsi_target_num": lun.target,
                "bdev_name": lun.unit.bdev.name,
                "lun": lun.lun,
                "readonly": lun.identity["readonly"],
            }
            named = {key: lun.identity[key] for key in ("serial", "vendor", "product")}
            calls.append({"method": "vhost_scsi_controller_add_target", "params": params | named})
        if self.started:
            start = {"ctrlr": self.name}
            calls.append({"method": "vhost_start_scsi_controller", "params": start})
        return [*calls, *super().config()]

    def release(self) -> None:
        """See Controller."""
        for lun in self.device:
            self._unwatch(lun)
            self.device.remove(lun)
            self._units.release(lun.unit)

    async def lun_added(self, lun: Lun) -> None:
        """Let the guests that are there have a LUN."""

        async def add(guest: ScsiSession, reactor: Any, call: Call) -> None:
            if await guest.open_lun(lun, reactor):
                event = guest.offers(ScsiFeature.HOTPLUG)
                args = {"session": guest.record.id, "lun": lun.args(guest.initiator)}
                await call("vhost_scsi_lun_add", {**args, "event": event})

        await self._at_each_guest(add)

    async def lun_removed(self, lun: Lun) -> None:
        """Take a LUN from the guests; returns when nothing uses it any more."""

        async def remove(guest: ScsiSession, reactor: Any, call: Call) -> None:
            event = guest.offers(ScsiFeature.HOTPLUG)
            args = {"session": guest.record.id, "target": lun.target, "lun": lun.lun}
            await call("vhost_scsi_lun_remove", {**args, "event": event})
            await guest.close_lun(lun, reactor)

        await self._at_each_guest(remove)

    async def lun_resized(self, lun: Lun) -> None:
        """Tell the guests that can be told."""

        async def tell(guest: ScsiSession, _: Any, call: Call) -> None:
            if guest.offers(ScsiFeature.CHANGE):
                place = {"target": lun.target, "lun": lun.lun, "reason": CAPACITY_CHANGED}
                args = {"session": guest.record.id, "event": int(Event.PARAM_CHANGE), **place}
                await call("vhost_scsi_event", args)

        await self._at_each_guest(tell)

    async def _at_each_guest(self, action: GuestAction) -> None:
        async def at(guest: ScsiSession) -> None:
            queues = self._host.find(guest.record.id)
            if queues is not None:
                await queues.at_reactors(lambda reactor, call: action(guest, reactor, call))

        await asyncio.gather(*(at(guest) for guest in self.guests.values()))


Call = Callable[[str, dict[str, Any]], Awaitable[Any]]
GuestAction = Callable[[ScsiSession, Any, Call], Awaitable[None]]


class ScsiSubsystem:
    """The subsystem ``scsi``: it has no configuration of its own."""

    name = "scsi"
    depends_on = ("bdev",)

    def config(self) -> list[dict[str, Any]]:
        """See reactor.control.Subsystem."""
        return []


class VhostScsiService:
    """vhost-scsi controllers: the subsystem ``vhost_scsi`` of a saved configuration."""

    name = "vhost_scsi"
    depends_on = ("scsi",)

    def __init__(self, vhost: VhostService, cluster: Cluster, registry: Registry) -> None:
        """``vhost`` is the service of all controllers, which has names and sockets in its care."""
        self._vhost = vhost
        self._registry = registry
        self._units = Units(cluster, registry)
        self._watched: dict[Lun, tuple[Any, Any]] = {}

    def config(self) -> list[dict[str, Any]]:
        """Return the calls that would create the controllers again."""
        return [call for controller in self._controllers() for call in controller.config()]

    @operation(aliases=["construct_vhost_scsi_controller"])
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
        self._vhost.add(controller)
        return True

    @operation
    def vhost_start_scsi_controller(self, ctrlr: str) -> bool:
        """Listen on the socket of a controller that was made with ``delay``."""
        controller = self._find(ctrlr)
        if controller.started:
            raise invalid(errno.EALREADY, f"controller {ctrlr} listens already")
        self._start(controller)
        return True

    @operation(aliases=["add_vhost_scsi_lun"])
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
        bdev = self._find_bdev(bdev_name)
        identity = check_identity(bdev, serial=serial, vendor=vendor, product=product)
        if bdev.claims and not readonly:
            raise invalid(errno.EPERM, f"bdev {bdev.name} is claimed by {bdev.claims[0]}")
        identity["readonly"] = readonly or bdev.readonly
        added = device.add(number, lun, self._units.use(bdev), identity)
        self._watch(controller, added)
        try:
            await controller.lun_added(added)
        except BaseException:
            await self._remove(controller, added)
            raise
        return number

    @operation(aliases=["remove_vhost_scsi_target"])
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

    def _controllers(self) -> list[ScsiController]:
        every = self._vhost.controllers()
        return [controller for controller in every if isinstance(controller, ScsiController)]

    def _find(self, name: str) -> ScsiController:
        for controller in self._controllers():
            if controller.name == name:
                return controller
        raise invalid(errno.ENODEV, f"SCSI controller {name!r:.80}")

    def _find_bdev(self, name: str) -> Bdev:
        try:
            return self._registry.find(name)
        except OperationError as error:
            raise OperationError(INVALID_PARAMS, error.message) from None

    def _start(self, controller: ScsiController) -> None:
        try:
            controller.open()
        except OSError as error:
            text = f"{error.strerror}: {error.filename}"
            raise OperationError(INVALID_PARAMS, text) from None
        controller.started = True

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
        await controller.lun_removed(lun)
        self._units.release(lun.unit)


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
