"""A controller with a virtio-scsi device, and the guests on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from reactor.cpumask import format_mask
from reactor.native import lib
from scsi.units import Units
from vhost.controller import Controller
from vhost.entrance import Endpoint
from vhost.host import ReactorHost
from vhost.interfaces import ServedDevice
from vhost.record import SessionRecord
from vhost.scsi import Lun, ScsiDevice, ScsiSession
from vhost.virtio_scsi import Event, ScsiFeature

CAPACITY_CHANGED = 0x2A | 0x09 << 8  # additional sense code and qualifier, as an event has them


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A function of task management (struct scsi_management), and where it is for."""

    session: int
    function: int
    target: int
    lun: int
    tag: int = 0
    but: int | None = None  # the process that has asked, and done its part


Call = Callable[[str, dict[str, Any]], Awaitable[Any]]
# With True for the first of a guest's reactors.
GuestAction = Callable[[ScsiSession, Any, Call, bool], Awaitable[None]]


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
            **self.describe_settings(),
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
        super().release()
        for lun in self.device:
            self._unwatch(lun)
            self.device.remove(lun)
            self._units.release(lun.unit)

    async def lun_added(self, lun: Lun) -> None:
        """Let the guests that are there have a LUN."""

        async def add(guest: ScsiSession, reactor: Any, call: Call, first: bool) -> None:
            if await guest.open_lun(lun, reactor):
                event = self._tells(guest, reactor, ScsiFeature.HOTPLUG)
                args = {"session": guest.record.id, "lun": lun.args(guest.initiator)}
                await call("vhost_scsi_lun_add", {**args, "event": event, "attend": first})

        await self._at_each_guest(add)

    async def lun_removed(self, lun: Lun) -> None:
        """Take a LUN from the guests; returns when nothing uses it any more."""

        async def remove(guest: ScsiSession, reactor: Any, call: Call, first: bool) -> None:
            event = self._tells(guest, reactor, ScsiFeature.HOTPLUG)
            args = {"session": guest.record.id, "target": lun.target, "lun": lun.lun}
            await call("vhost_scsi_lun_remove", {**args, "event": event, "attend": first})
            await guest.close_lun(lun, reactor)

        await self._at_each_guest(remove)
        for guest in self.guests.values():
            guest.lose(lun)

    async def lun_resized(self, lun: Lun) -> None:
        """Tell the guests that can be told."""

        async def tell(guest: ScsiSession, reactor: Any, call: Call, _: bool) -> None:
            if self._tells(guest, reactor, ScsiFeature.CHANGE):
                place = {"target": lun.target, "lun": lun.lun, "reason": CAPACITY_CHANGED}
                args = {"session": guest.record.id, "event": int(Event.PARAM_CHANGE), **place}
                await call("vhost_scsi_event", args)

        await self._at_each_guest(tell)

    def _tells(self, guest: ScsiSession, reactor: Any, feature: ScsiFeature) -> bool:
        """Say whether this reactor, which serves the event queue, has to send an event."""
        queues = self._host.find(guest.record.id)
        if queues is None or not guest.offers(feature):
            return False
        place = queues.place(lib.SCSI_EVENT_QUEUE)
        if place in (None, reactor.cpu):
            guest.note_event(None if place is None else reactor.pid)
        return bool(place == reactor.cpu)

    async def _at_each_guest(self, action: GuestAction) -> None:
        async def at(guest: ScsiSession) -> None:
            queues = self._host.find(guest.record.id)
            turns = itertools.count()
            if queues is not None:
                await queues.at_reactors(
                    lambda reactor, call: action(guest, reactor, call, next(turns) == 0)
                )

        await asyncio.gather(*(at(guest) for guest in self.guests.values()))

    async def manage(self, ask: Ask) -> int:
        """Have a function of task management carried out; return how many tasks it was for."""
        queues = self._host.find(ask.session)
        if queues is None:
            return 0
        where = {"session": ask.session, "target": ask.target, "lun": ask.lun}
        args = {**where, "function": ask.function, "tag": ask.tag}
        return sum(await queues.ask_reactors("vhost_scsi_manage", args, but=ask.but))
