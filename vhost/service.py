"""The operations on vhost controllers, and the subsystem whose configuration they are."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from bdev.guest_dma import GuestDma
from bdev.kind import Bdev
from reactor import activation
from reactor.cpumask import format_mask, parse
from reactor.errors import INTERNAL_ERROR, INVALID_PARAMS, OperationError
from reactor.interfaces import Cluster, Slots
from reactor.native import lib
from reactor.notifications import Notify, ignore
from reactor.operations import operation
from reactor.saved import Calls, Configured, PartKey
from vhost import initiator as initiator  # a kind of bdev, registered by its import
from vhost.blk import Bdevs, BlkDevice, check_serial
from vhost.controller import Controller
from vhost.entrance import CLIENT, SERVER, Endpoint, check_path
from vhost.host import ReactorHost
from vhost.interfaces import ServedDevice
from vhost.journal import KEY
from vhost.loops import serves_itself
from vhost.record import Coalescing, SessionRecord
from vhost.resume import resume_sessions
from vhost.virtio_blk import BlkFeature

WINDOW = f"{lib.COALESCING_WINDOW_MS} ms"
TRANSPORT = "vhost_user_blk"  # SPDK's name for a controller on a Unix socket


class Registry(Bdevs, Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    @property
    def guest_dma(self) -> GuestDma:
        """Where devices see guest memory."""

    def find(self, name: str) -> Bdev:
        """Return the bdev with this name or UUID; OperationError if there is none."""
        ...

    async def use_ranges(self, bdev: Bdev) -> None:
        """Have the device lock ranges, and take COMPARE_AND_WRITE, on all reactors."""


def invalid(code: int, detail: str) -> OperationError:
    """Return the error that SPDK answers with: the code for parameters, the text of an errno."""
    return OperationError(INVALID_PARAMS, f"{os.strerror(code)}: {detail}")


def check_coalescing(delay_base_us: int, iops_threshold: int) -> Coalescing:
    """Return the settings; OperationError for what SPDK refuses, and over 32 bits."""
    if not 0 <= delay_base_us < 1 << 32 or lib.coalescing_check(delay_base_us, 100) < 0:
        longest = ((1 << 32) - 1) * 1_000_000 // lib.reactor_tick_rate()
        raise invalid(errno.EINVAL, f"delay_base_us {delay_base_us}: must be 0 to {longest}")
    if not 0 <= iops_threshold < 1 << 32 or lib.coalescing_check(0, iops_threshold) < 0:
        detail = f"iops_threshold {iops_threshold}: must be at least 100, one in {WINDOW}"
        raise invalid(errno.EINVAL, detail)
    return Coalescing(delay_base_us, iops_threshold)


class BlkController(Controller):
    """A controller with a virtio-blk device, and what it was created with."""

    device: BlkDevice
    feature_bits = BlkFeature

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        device: BlkDevice,
        host: ReactorHost,
        next_id: Callable[[], int],
        params: dict[str, Any],
    ) -> None:
        super().__init__(name, endpoint, device, host, next_id)
        self.params = params

    def config(self) -> list[dict[str, Any]]:
        """See Controller."""
        create = {"method": "vhost_create_blk_controller", "params": self.params}
        return [create, *super().config()]

    def serve(self, _: SessionRecord) -> ServedDevice:
        """See Controller: the same for all."""
        return self.device

    def release(self) -> None:
        """See Controller."""
        super().release()
        self.device.release()

    def describe(self) -> dict[str, Any]:
        """Return the controller's entry in vhost_get_controllers."""
        bdev = self.device.bdev
        return {
            "ctrlr": self.name,
            "cpumask": format_mask(self.device.cpus),
            **self.describe_settings(),
            **self.describe_socket(),
            "sessions": self.describe_sessions(),
            "backend_specific": {
                "block": {
                    "readonly": self.device.readonly,
                    "bdev": None if bdev is None else bdev.name,
                    "transport": TRANSPORT,
                    "serial": self.device.serial,
                    "registered_buffers": self.device.asked_for_registered_buffers,
                }
            },
        }


class VhostService(Configured):
    """All controllers: the subsystem ``vhost_blk`` of a saved configuration."""

    name = "vhost_blk"
    depends_on = ("bdev",)

    def __init__(self, socket_dir: str, cluster: Cluster, registry: Registry, slots: Slots) -> None:
        """``socket_dir`` is where sockets appear, each under its controller's name."""
        self._socket_dir = socket_dir
        self._cluster = cluster
        self._registry = registry
        self.host = ReactorHost(cluster, slots, guest_dma=registry.guest_dma)
        self.notify: Notify = ignore
        former = [int(key.removeprefix(KEY)) for key in cluster.vault.keys(KEY)]
        self._session_ids = itertools.count(max(former, default=-1) + 1)
        self._controllers: dict[str, Controller] = {}

    def parts(self) -> Iterator[tuple[PartKey, Calls]]:
        """See Configured: the controllers of disks, of those that have a bdev."""
        for name in self._controllers:
            key = PartKey(0, name)
            yield key, self.part(key)

    def part(self, key: PartKey) -> Calls:
        """See Configured."""
        controller = self._controllers.get(key.name)
        if not isinstance(controller, BlkController) or controller.device.bdev is None:
            return []
        return controller.config()

    def controllers(self) -> list[Controller]:
        """Return all controllers, of whatever device."""
        return list(self._controllers.values())

    def add(self, controller: Controller, subsystem: Configured) -> None:
        """Have a new controller, whose name ``endpoint`` has found free.

        ``subsystem`` is the one whose configuration it belongs to.
        """
        controller.notify = self.notify
        controller.touched = lambda: subsystem.touched(PartKey(0, controller.name))
        self._controllers[controller.name] = controller
        controller.touched()

    def get(self, name: str) -> Controller | None:
        """Return a controller, of whatever device; None if there is none."""
        return self._controllers.get(name)

    def next_session(self) -> int:
        """Return the id of a new session."""
        return next(self._session_ids)

    async def resume(self) -> int:
        """Go on with the sessions of the control process before; return how many they are."""
        return await resume_sessions(self, self.host.vault)

    async def stop(self) -> None:
        """Close every controller once its I/O is done."""
        await asyncio.gather(*(self._close(name) for name in list(self._controllers)))

    @operation(aliases=["construct_vhost_blk_controller"], touches=True)
    def vhost_create_blk_controller(
        self,
        ctrlr: str,
        dev_name: str,
        cpumask: str | None = None,
        readonly: bool = False,
        packed_ring: bool = False,
        in_order: bool = False,
        transport: str = TRANSPORT,
        serial: str = "",
        registered_buffers: bool = False,
        mode: str = SERVER,
        path: str | None = None,
    ) -> bool:
        """Serve bdev ``dev_name`` as a virtio-blk disk on socket ``ctrlr`` of the socket directory.

        In ``mode`` "client" we connect to the socket of a front-end that listens at ``path``, by
        default that of the same name, and do so again whenever the connection has ended.

        ``cpumask`` says which reactors may serve its queues, all by default; ``packed_ring`` offers
        packed rings beside split ones; ``in_order`` offers VIRTIO_F_IN_ORDER, with which quick
        requests wait for slow ones before them; ``serial`` is what the guest reads as the disk's
        serial number, the bdev's name by default. ``registered_buffers`` pins guest memory, which
        makes file disks faster; not for guests that give memory back (docs/operations.md).
        """
        if transport != TRANSPORT:
            raise invalid(errno.EINVAL, f"transport {transport!r:.40}: must be {TRANSPORT}")
        endpoint = self.endpoint(ctrlr, mode, path)
        cpus = self.parse_cpumask(cpumask)
        bdev = self.find_bdev(dev_name, endpoint)
        try:
            serial_number = check_serial(serial, bdev.name)
        except ValueError as error:
            raise invalid(errno.EINVAL, str(error)) from None
        if bdev.claims and not readonly:
            raise invalid(errno.EPERM, f"bdev {bdev.name} is claimed by {bdev.claims[0]}")

        async def lose_device() -> None:
            await controller.lose_device()

        def config_changed() -> None:
            controller.config_changed()

        device = BlkDevice(
            self._registry,
            bdev,
            cpus,
            readonly=readonly,
            packed_ring=packed_ring,
            in_order=in_order,
            serial=serial_number,
            on_lost=lose_device,
            on_config=config_changed,
            registered_buffers=registered_buffers,
        )
        params: dict[str, Any] = {"ctrlr": ctrlr, "dev_name": bdev.name}
        if cpumask is not None:
            params["cpumask"] = cpumask
        params |= {"readonly": readonly, "transport": TRANSPORT}
        options = {
            "packed_ring": packed_ring,
            "in_order": in_order,
            "serial": serial,
            "registered_buffers": registered_buffers,
        }
        params |= {name: value for name, value in options.items() if value} | endpoint.params()
        controller = BlkController(ctrlr, endpoint, device, self.host, self.next_session, params)
        try:
            controller.open()
        except OSError as error:
            device.release()
            text = f"{error.strerror}: {error.filename}"
            raise OperationError(INVALID_PARAMS, text) from None
        self.add(controller, self)
        return True

    @operation(aliases=["set_vhost_controller_coalescing"], touches=True)
    async def vhost_controller_set_coalescing(
        self, ctrlr: str, delay_base_us: int, iops_threshold: int
    ) -> bool:
        """Signal guests less often where they do more than ``iops_threshold`` requests a second.

        The delay, by queue, is ``delay_base_us * (iops - threshold) / threshold``, at most 10 ms; a
        base of 0 switches it off.
        """
        controller = self.find(ctrlr)
        await controller.set_coalescing(check_coalescing(delay_base_us, iops_threshold))
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

    @operation
    def vhost_get_iostat(self, ctrlr: str | None = None, per_queue: bool = False) -> dict[str, Any]:
        """Return what was done for the guests of all controllers, or of one: as bdev_get_iostat.

        It counts what their queues asked of disks since each began to be served; ``per_queue``
        shows each queue.
        """
        wanted = list(self._controllers.values()) if ctrlr is None else [self.find(ctrlr)]
        found = [controller.iostat() for controller in wanted]
        if not per_queue:
            for one in found:
                del one["queues"]
        return {
            "tick_rate": lib.reactor_tick_rate(),
            "ticks": lib.reactor_ticks(),
            "controllers": found,
        }

    @operation(aliases=["remove_vhost_controller"], touches=True)
    async def vhost_delete_controller(self, ctrlr: str, force: bool = False) -> bool:
        """Remove a controller and its socket; front-ends are in the way, unless ``force`` is set.

        They are then disconnected once their I/O is done.
        """
        controller = self.find(ctrlr)
        if controller.sessions and not force:
            count = len(controller.sessions)
            raise invalid(errno.EBUSY, f"{count} front-ends are connected to {ctrlr}: use force")
        await self._close(ctrlr)
        return True

    @operation(internal=True)
    def vhost_queue_broken(self, session: int, queue: int, code: int, text: str) -> None:
        """Take note that a reactor has stopped a queue whose driver broke a rule."""
        queues = self.host.find(session)
        if queues is not None:
            queues.on_broken(queue, f"{text} ({os.strerror(-code)})" if code < 0 else text)

    @operation(internal=True)
    def vhost_iotlb_miss(self, session: int, queue: int, iova: int, size: int, access: int) -> None:
        """Take note that the next request of a queue waits for a translation."""
        queues = self.host.find(session)
        if queues is not None:
            queues.on_miss(queue, iova, size, access)

    async def _close(self, name: str) -> None:
        controller = self._controllers.pop(name)
        controller.touched()
        await controller.close()
        controller.release()

    def find(self, ctrlr: str) -> Controller:
        """Return a controller, of whatever device; OperationError if there is none."""
        controller = self._controllers.get(ctrlr)
        if controller is None:
            raise invalid(errno.ENODEV, f"controller {ctrlr!r:.80}")
        return controller

    def endpoint(self, name: str, mode: str, path: str | None) -> Endpoint:
        """Return where a new controller meets its front-ends; OperationError if it cannot."""
        usual, given = self._socket_path(name), activation.find(name)
        if mode not in (SERVER, CLIENT):
            raise invalid(errno.EINVAL, f"mode {mode!r:.40}: must be {SERVER} or {CLIENT}")
        if mode == SERVER:
            if path is not None:
                detail = f"path {path!r:.200}: only in mode {CLIENT}; we listen at {usual}"
                raise invalid(errno.EINVAL, detail)
            return Endpoint(usual if given is None else given.getsockname())
        if path is not None and (not os.path.isabs(path) or not path.isprintable()):
            raise invalid(errno.EINVAL, f"path {path!r:.200}: must be that of a socket, from /")
        try:
            check_path(path or usual)
        except OSError as error:
            raise invalid(errno.ENAMETOOLONG, f"path {path or usual}: {error.strerror}") from None
        return Endpoint(path or usual, CLIENT)

    def _socket_path(self, name: str) -> str:
        if not name or "/" in name or name in (".", "..") or not name.isprintable():
            detail = f"ctrlr {name!r:.80}: must be a file name, without a directory"
            raise invalid(errno.EINVAL, detail)
        if name in self._controllers:
            raise invalid(errno.EEXIST, f"controller {name}")
        return os.path.join(self._socket_dir, name)

    def parse_cpumask(self, text: str | None) -> list[int]:
        """Return the CPUs of a mask, by default all reactors'; OperationError for others."""
        available = [reactor.cpu for reactor in self._cluster.reactors]
        if text is None:
            return available
        try:
            return parse(text, available)
        except ValueError as error:
            raise invalid(errno.EINVAL, f"cpumask: {error}") from None

    def find_bdev(self, name: str, endpoint: Endpoint) -> Bdev:
        """Return a bdev by name or UUID, to be served at ``endpoint``.

        OperationError if there is none, or it is what is served there.
        """
        try:
            bdev = self._registry.find(name)
        except OperationError as error:
            raise OperationError(INVALID_PARAMS, error.message) from None
        if serves_itself(bdev, endpoint.path, self._served_at):
            detail = f"bdev {bdev.name} is, by way of a virtio disk, what {endpoint.path} serves"
            raise invalid(errno.EDEADLK, detail)
        return bdev

    def _served_at(self, path: str) -> list[Bdev]:
        """Return what is behind a socket, by its real path."""
        return [
            bdev
            for controller in self._controllers.values()
            if os.path.realpath(controller.endpoint.path) == path
            for bdev in controller.device.bdevs()
        ]
