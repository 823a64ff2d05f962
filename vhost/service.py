"""The operations on vhost controllers, and the subsystem whose configuration they are."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Callable
from typing import Any, Protocol

from bdev.guest_dma import GuestDma
from bdev.kind import Bdev
from reactor.cpumask import format_mask, parse
from reactor.errors import INTERNAL_ERROR, INVALID_PARAMS, OperationError
from reactor.operations import operation
from vhost.blk import Bdevs, BlkDevice, check_serial
from vhost.controller import Controller
from vhost.host import ReactorHost
from vhost.interfaces import Cluster, Slots

TRANSPORT = "vhost_user_blk"  # SPDK's name for a controller on a Unix socket

# What SPDK reports of a controller whose interrupts are not coalesced.
_COALESCING = {"delay_base_us": 0, "iops_threshold": 60000}


class Registry(Bdevs, Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    @property
    def guest_dma(self) -> GuestDma:
        """Where devices see guest memory."""

    def find(self, name: str) -> Bdev:
        """Return the bdev with this name or UUID; OperationError if there is none."""
        ...


def invalid(code: int, detail: str) -> OperationError:
    """Return the error that SPDK answers with: the code for parameters, the text of an errno."""
    return OperationError(INVALID_PARAMS, f"{os.strerror(code)}: {detail}")


class BlkController(Controller):
    """A controller with a virtio-blk device, and what it was created with."""

    device: BlkDevice

    def __init__(
        self,
        name: str,
        path: str,
        device: BlkDevice,
        host: ReactorHost,
        next_id: Callable[[], int],
        params: dict[str, Any],
    ) -> None:
        super().__init__(name, path, device, host, next_id)
        self.params = params

    def describe(self) -> dict[str, Any]:
        """Return the controller's entry in vhost_get_controllers."""
        bdev = self.device.bdev
        return {
            "ctrlr": self.name,
            "cpumask": format_mask(self.device.cpus),
            **_COALESCING,
            "socket": self.path,
            "sessions": self.describe_sessions(),
            "backend_specific": {
                "block": {
                    "readonly": self.device.readonly,
                    "bdev": None if bdev is None else bdev.name,
                    "transport": TRANSPORT,
                    "serial": self.device.serial,
                }
            },
        }


class VhostService:
    """All controllers: the subsystem ``vhost_blk`` of a saved configuration."""

    name = "vhost_blk"
    depends_on = ("bdev",)

    def __init__(self, socket_dir: str, cluster: Cluster, registry: Registry, slots: Slots) -> None:
        """``socket_dir`` is where sockets appear, each under its controller's name."""
        self._socket_dir = socket_dir
        self._cluster = cluster
        self._registry = registry
        self._host = ReactorHost(cluster, slots, guest_dma=registry.guest_dma)
        self._session_ids = itertools.count(0)
        self._controllers: dict[str, BlkController] = {}

    def config(self) -> list[dict[str, Any]]:
        """Return the calls that would create the controllers again, of those that have a bdev."""
        return [
            {"method": "vhost_create_blk_controller", "params": controller.params}
            for controller in self._controllers.values()
            if controller.device.bdev is not None
        ]

    async def stop(self) -> None:
        """Close every controller once its I/O is done."""
        await asyncio.gather(*(self._close(name) for name in list(self._controllers)))

    @operation(aliases=["construct_vhost_blk_controller"])
    def vhost_create_blk_controller(
        self,
        ctrlr: str,
        dev_name: str,
        cpumask: str | None = None,
        readonly: bool = False,
        packed_ring: bool = False,
        transport: str = TRANSPORT,
        serial: str = "",
    ) -> bool:
        """Serve bdev ``dev_name`` as a virtio-blk disk on socket ``ctrlr`` of the socket directory.

        ``cpumask`` says which reactors may serve its queues, all by default; ``packed_ring`` offers
        packed rings beside split ones; ``serial`` is what the guest reads as the disk's serial
        number, the bdev's name by default.
        """
        if transport != TRANSPORT:
            raise invalid(errno.EINVAL, f"transport {transport!r:.40}: must be {TRANSPORT}")
        path = self._socket_path(ctrlr)
        cpus = self._parse_cpumask(cpumask)
        bdev = self._find_bdev(dev_name)
        try:
            serial_number = check_serial(serial, bdev.name)
        except ValueError as error:
            raise invalid(errno.EINVAL, str(error)) from None
        if bdev.claims and not readonly:
            raise invalid(errno.EPERM, f"bdev {bdev.name} is claimed by {bdev.claims[0]}")

        async def lose_device() -> None:
            await controller.lose_device()

        device = BlkDevice(
            self._registry,
            bdev,
            cpus,
            readonly=readonly,
            packed_ring=packed_ring,
            serial=serial_number,
            on_lost=lose_device,
        )
        params: dict[str, Any] = {"ctrlr": ctrlr, "dev_name": bdev.name}
        if cpumask is not None:
            params["cpumask"] = cpumask
        params |= {"readonly": readonly, "transport": TRANSPORT}
        if packed_ring:
            params["packed_ring"] = True
        if serial:
            params["serial"] = serial
        controller = BlkController(
            ctrlr, path, device, self._host, lambda: next(self._session_ids), params
        )
        try:
            controller.open()
        except OSError as error:
            device.release()
            text = f"{error.strerror}: {error.filename}"
            raise OperationError(INVALID_PARAMS, text) from None
        self._controllers[ctrlr] = controller
        return True

    @operation(aliases=["get_vhost_controllers"])
    def vhost_get_controllers(self, name: str | None = None) -> list[dict[str, Any]]:
        """Describe all controllers, or one, with the front-ends that are connected."""
        if name is None:
            return [controller.describe() for controller in self._controllers.values()]
        if name not in self._controllers:
            text = f"{os.strerror(errno.ENODEV)}: controller {name!r:.80}"
            raise OperationError(INTERNAL_ERROR, text)
        return [self._controllers[name].describe()]

    @operation(aliases=["remove_vhost_controller"])
    async def vhost_delete_controller(self, ctrlr: str) -> bool:
        """Remove a controller that no front-end is connected to, and its socket."""
        controller = self._controllers.get(ctrlr)
        if controller is None:
            raise invalid(errno.ENODEV, f"controller {ctrlr!r:.80}")
        if controller.sessions:
            count = len(controller.sessions)
            raise invalid(errno.EBUSY, f"{count} front-ends are connected to {ctrlr}")
        await self._close(ctrlr)
        return True

    @operation(internal=True)
    def vhost_queue_broken(self, session: int, queue: int, code: int, text: str) -> None:
        """Take note that a reactor has stopped a queue whose driver broke a rule."""
        queues = self._host.find(session)
        if queues is not None:
            queues.on_broken(queue, f"{text} ({os.strerror(-code)})" if code < 0 else text)

    async def _close(self, name: str) -> None:
        controller = self._controllers.pop(name)
        await controller.close()
        controller.device.release()

    def _socket_path(self, name: str) -> str:
        """Return where a new controller's socket goes; OperationError if it cannot."""
        if not name or "/" in name or name in (".", "..") or not name.isprintable():
            detail = f"ctrlr {name!r:.80}: must be a file name, without a directory"
            raise invalid(errno.EINVAL, detail)
        if name in self._controllers:
            raise invalid(errno.EEXIST, f"controller {name}")
        return os.path.join(self._socket_dir, name)

    def _parse_cpumask(self, text: str | None) -> list[int]:
        available = [reactor.cpu for reactor in self._cluster.reactors]
        if text is None:
            return available
        try:
            return parse(text, available)
        except ValueError as error:
            raise invalid(errno.EINVAL, f"cpumask: {error}") from None

    def _find_bdev(self, name: str) -> Bdev:
        try:
            return self._registry.find(name)
        except OperationError as error:
            raise OperationError(INVALID_PARAMS, error.message) from None
