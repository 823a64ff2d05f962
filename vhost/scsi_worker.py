"""The reactor's side of virtio-scsi devices: one for each session whose queues are served here."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import uuid as uuids
from typing import Any, Protocol

import msgspec

from bdev import worker as bdevs
from reactor.errors import OperationError, check
from reactor.loop import ReactorLoop
from reactor.native import CData, ffi, lib
from reactor.operations import operation
from scsi.worker import UnitWorker

log = logging.getLogger(__name__)

_DRAIN_POLL = 0.001  # seconds between looks whether a LUN that is going still has tasks


class Node(Protocol):
    """The part of reactor.events.Node that is needed."""

    async def call(
        self,
        target: str,
        op: str,
        args: dict[str, Any] | None = None,
        *,
        timeout: float | None = 10.0,
    ) -> Any:
        """Have another process run an operation, and return its result."""


class LunArgs(msgspec.Struct, forbid_unknown_fields=True):
    """A logical unit at its place: see struct scsi_ports and struct scsi_identity."""

    target: int
    lun: int
    unit: int  # the id of its bdev
    initiator: int  # SAS addresses of the ports
    port: int
    relative: int
    vendor: str
    product: str
    revision: str
    serial: str
    uuid: str
    readonly: bool


class ScsiArgs(msgspec.Struct, forbid_unknown_fields=True):
    """What a virtio-scsi queue is beside a ring; ``missed``: events were lost meanwhile."""

    slot: int
    missed: bool
    luns: list[LunArgs]


class _Device:
    """A struct scsi_device, and the LUNs of each of its targets."""

    def __init__(self, native: CData) -> None:
        self.native = native
        self.targets: dict[int, set[int]] = {}
        self.asking = asyncio.Lock()  # one function at a time: a guest cannot flood the cluster


class ScsiWorker:
    """Devices by session, and operations on their LUNs."""

    def __init__(self, loop: ReactorLoop, node: Node, units: UnitWorker) -> None:
        self._loop = loop
        self._node = node
        self._tasks: set[asyncio.Task[None]] = set()
        self._units = units
        self._devices: dict[int, _Device] = {}

    def device(self, session: int, luns: list[LunArgs]) -> CData:
        """Return the device of a session, made with ``luns`` if there is none yet."""
        device = self._devices.get(session)
        if device is None:
            native = lib.scsi_device_create(self._loop.native)
            if native == ffi.NULL:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "a virtio-scsi device")
            device = _Device(native)
            try:
                for lun in luns:
                    self._add(device, lun)
            except BaseException:
                lib.scsi_device_free(native)
                raise
            self._devices[session] = device
        return device.native

    def drop(self, session: int) -> None:
        """Free the device of a session that has no queue here any more."""
        device = self._devices.pop(session, None)
        if device is not None:
            lib.scsi_device_free(device.native)

    @operation
    def vhost_scsi_lun_add(self, session: int, lun: LunArgs, event: bool, attend: bool) -> None:
        """Let the guest have one more LUN; ``event``: tell it; ``attend``: by other LUNs, too."""
        device = self._devices.get(session)
        if device is None or lun.lun in device.targets.get(lun.target, ()):
            return
        self._add(device, lun)
        if attend:
            self._tell_others(device, lun.target, lun.lun)
        if event:
            lib.scsi_device_event(
                device.native,
                lib.SCSI_TRANSPORT_RESET,
                lun.target,
                lun.lun,
                lib.SCSI_RESET_RESCAN,
            )

    @operation
    async def vhost_scsi_lun_remove(
        self, session: int, target: int, lun: int, event: bool, attend: bool
    ) -> None:
        """Take a LUN away; answers when nothing of it is in flight.

        ``event``: tell the guest; ``attend``: by other LUNs of the target, too.
        """
        device = self._devices.get(session)
        if device is None or lun not in device.targets.get(target, ()):
            return
        native = lib.scsi_device_target(device.native, target)
        lib.scsi_target_detach(native, lun)
        if event:
            lib.scsi_device_event(
                device.native, lib.SCSI_TRANSPORT_RESET, target, lun, lib.SCSI_RESET_REMOVED
            )
        while lib.scsi_target_remove(native, lun) == -errno.EBUSY:  # noqa: ASYNC110 - C gives no event
            await asyncio.sleep(_DRAIN_POLL)
        device.targets[target].discard(lun)
        if attend:
            self._tell_others(device, target, lun)
        if not device.targets[target]:
            while lib.scsi_device_remove(device.native, target) == -errno.EBUSY:  # noqa: ASYNC110 - C gives no event
                await asyncio.sleep(_DRAIN_POLL)
            device.targets.pop(target, None)

    @operation
    def vhost_scsi_event(
        self, session: int, event: int, target: int, lun: int, reason: int
    ) -> None:
        """Put an event on the device's event queue."""
        device = self._devices.get(session)
        if device is not None:
            lib.scsi_device_event(device.native, event, target, lun, reason)

    @operation
    async def vhost_scsi_manage(
        self, session: int, function: int, target: int, lun: int, tag: int
    ) -> int:
        """Carry out a function of task management on what of a session is served here.

        Answers, with how many tasks it was for, when all that it aborts have ended.
        """
        device = self._devices.get(session)
        if device is None:
            return 0
        what = {"function": function, "target": target, "lun": lun, "tag": tag}
        asked: CData = ffi.new("struct scsi_management *", what)
        asked.serial = lib.scsi_device_serial(device.native)
        found: int = lib.scsi_device_count(device.native, asked)
        if function in (lib.SCSI_QUERY_TASK, lib.SCSI_QUERY_TASK_SET):
            return found
        lib.scsi_device_abort(device.native, asked)
        while (  # noqa: ASYNC110 - C gives no event
            self._devices.get(session) is device and lib.scsi_device_waits(device.native, asked)
        ):
            await asyncio.sleep(_DRAIN_POLL)
        return found

    def forward(self, session: int, queue: CData, slot: int) -> None:
        """Have a function that the request in a slot asks for carried out wherever it matters."""
        task = self._loop.create_task(self._forward(session, queue, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, session: int, queue: CData, slot: int) -> None:
        asked: CData = ffi.new("struct scsi_management *")
        lib.scsi_queue_asked(queue, slot, asked)
        args = {name: getattr(asked, name) for name in ("function", "target", "lun", "tag")}
        args |= {"nexuses": list(asked.nexuses), "session": session, "pid": os.getpid()}
        try:
            async with self._devices[session].asking:
                found = await self._node.call("control", "vhost_scsi_forward", args, timeout=None)
        except (OperationError, OSError) as error:
            log.error("task management of session %d: %s", session, error)
            found = -errno.EIO
        lib.scsi_queue_answer(queue, slot, found)

    def _add(self, device: _Device, lun: LunArgs) -> None:
        handle = bdevs.handles.get(lun.unit)
        if handle is None:
            raise OperationError(-errno.ENODEV, f"bdev {lun.unit} is not open in this reactor")
        place = self._units.find(lun.unit)
        native = lib.scsi_device_target(device.native, lun.target)
        if native == ffi.NULL:
            native = self._make_target(device, lun)
        identity = ffi.new("struct scsi_identity *", identity_of(lun))
        rc = lib.scsi_target_add(native, lun.lun, handle, place, identity)
        check(rc, f"LUN {lun.lun} of target {lun.target}")
        device.targets.setdefault(lun.target, set()).add(lun.lun)

    def _make_target(self, device: _Device, lun: LunArgs) -> CData:
        ports = {"initiator": lun.initiator, "target": lun.port, "relative": lun.relative}
        native = lib.scsi_target_create(ffi.new("struct scsi_ports *", ports))
        if native == ffi.NULL:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "a SCSI target")
        rc = lib.scsi_device_add(device.native, lun.target, native)
        if rc < 0:
            lib.scsi_target_free(native)
            check(rc, f"target {lun.target}")
        return native

    def _tell_others(self, device: _Device, target: int, changed: int) -> None:
        """Have the other LUNs of a target tell that there is a change (SPC-5 section 6.34)."""
        native = lib.scsi_device_target(device.native, target)
        for lun in device.targets.get(target, ()):
            if lun != changed:
                lib.scsi_target_attention(native, lun, lib.SCSI_ATTENTION_LUNS_CHANGED)


def identity_of(lun: LunArgs) -> dict[str, object]:
    """Return the fields of a struct scsi_identity."""

    def text(value: str, size: int) -> bytes:
        return value.encode("ascii", "replace")[:size].ljust(size)

    return {
        "vendor": text(lun.vendor, 8),
        "product": text(lun.product, 16),
        "revision": text(lun.revision, 4),
        "serial": text(lun.serial, 32),
        "uuid": uuids.UUID(lun.uuid).bytes,
        "readonly": lun.readonly,
    }
