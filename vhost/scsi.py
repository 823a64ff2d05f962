"""The virtio-scsi device (virtio 1.2, section 5.6) as front-ends see it, and its LUNs.

Its requests are served by vhost/scsi.c. A device has one ScsiSession for each front-end that is
connected: an initiator of its own, so that reservations tell guests apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bdev.kind import Bdev
from reactor.native import lib
from scsi.units import Unit, Units
from vhost.messages import Feature, ProtocolError
from vhost.record import SessionRecord
from vhost.virtio_scsi import CDB_SIZE, EVENT, SENSE_SIZE, ScsiConfig, ScsiFeature

MAX_TARGETS: int = lib.SCSI_MAX_TARGETS
MAX_LUNS: int = lib.SCSI_MAX_UNITS

FEATURES = (
    Feature.VERSION_1
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.RING_PACKED
    | ScsiFeature.INOUT
    | ScsiFeature.HOTPLUG
    | ScsiFeature.CHANGE
)

CONFIG = ScsiConfig(
    num_queues=0,  # request queues; filled in for each front-end
    seg_max=126,  # with header and response they fill a queue of 128
    max_sectors=0xFFFF,
    cmd_per_lun=128,
    event_info_size=EVENT.size,
    sense_size=SENSE_SIZE,
    cdb_size=CDB_SIZE,
    max_channel=0,
    max_target=MAX_TARGETS - 1,
    max_lun=MAX_LUNS - 1,
)


def sas_address(name: str) -> int:
    """Return a locally assigned NAA (SPC-5 section 7.7.6.5), always the same for a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return 3 << 60 | int.from_bytes(digest[:8], "big") >> 4


@dataclass(frozen=True, slots=True, eq=False)
class Lun:
    """A logical unit at its place in a controller."""

    target: int
    lun: int
    unit: Unit
    port: int  # SAS address of the target port
    identity: dict[str, Any]  # of vhost.scsi_worker.LunArgs

    def args(self, initiator: int) -> dict[str, Any]:
        """Return vhost.scsi_worker.LunArgs for an initiator."""
        return {
            "target": self.target,
            "lun": self.lun,
            "unit": self.unit.bdev.id,
            "initiator": initiator,
            "port": self.port,
            "relative": self.unit.port(self.port),
            **self.identity,
        }


class ScsiDevice:
    """Targets and their LUNs: a Device (vhost.interfaces), from which sessions are made."""

    virtio_id = 8

    def __init__(self, name: str, cpus: Collection[int]) -> None:
        self.name = name
        self.cpus = cpus
        self._luns: dict[tuple[int, int], Lun] = {}

    def __iter__(self) -> Iterator[Lun]:
        """Iterate over the LUNs, by target and number."""
        return iter([self._luns[place] for place in sorted(self._luns)])

    def bdevs(self) -> list[Bdev]:
        """Return what is behind the LUNs."""
        return [lun.unit.bdev for lun in self]

    def find(self, target: int, lun: int) -> Lun | None:
        """Return the LUN at a place."""
        return self._luns.get((target, lun))

    def targets(self) -> list[int]:
        """Return the numbers of the targets that there are."""
        return sorted({target for target, _ in self._luns})

    def add(self, target: int, lun: int, unit: Unit, identity: dict[str, Any]) -> Lun:
        """Have a unit at a free place."""
        port = sas_address(f"target {self.name} {target}")
        made = self._luns[target, lun] = Lun(target, lun, unit, port, identity)
        return made

    def remove(self, lun: Lun) -> None:
        """Have a LUN no more."""
        del self._luns[lun.target, lun.lun]

    @property
    def features(self) -> int:
        """See Device."""
        return int(FEATURES)

    def config(self, features: int, written: Mapping[int, int], queues: int) -> bytes:
        """See Device; nothing depends on features, and nothing can be written."""
        del features, written
        return replace(CONFIG, num_queues=queues - 2).to_bytes()

    def accept_config(
        self, offset: int, data: bytes, features: int, queues: int, *, migration: bool
    ) -> dict[int, int]:
        """See Device; sizes of CDB and sense data cannot be changed."""
        del migration
        if self.config(features, {}, queues)[offset : offset + len(data)] != data:
            where = f"{offset} + {len(data)}"
            raise ProtocolError("SET_CONFIG", "range", where, "what it is already", fatal=False)
        return {}


class _Opened:
    """What a reactor process has open for a session."""

    def __init__(self, cpu: int) -> None:
        self.cpu = cpu
        self.queues = 0
        self.luns: list[Lun] = []
        self.events = False  # some were sent there, which may be lost with it


class ScsiSession:
    """The device as one front-end is served: a ServedDevice (vhost.interfaces).

    ``missed`` tells that the guest must hear of an event that could not be delivered.
    """

    def __init__(
        self, device: ScsiDevice, units: Units, record: SessionRecord, number: int
    ) -> None:
        """Serve a front-end; ``number`` tells it from others that are connected meanwhile."""
        self.number = number
        self.record = record
        self.initiator = sas_address(f"initiator {device.name} {number}")
        self.missed = False
        self._device = device
        self._units = units
        self._opened: dict[int, _Opened] = {}  # by process
        self._known: set[Lun] = set()  # whose nexus this session has established

    @property
    def cpus(self) -> Collection[int]:
        """See ServedDevice."""
        return self._device.cpus

    @property
    def registered_buffers(self) -> bool:
        """See ServedDevice: not a setting of this device."""
        return False

    def offers(self, feature: ScsiFeature) -> bool:
        """Tell whether the driver has accepted a feature."""
        return bool(self.record.features & feature)

    async def open(self, reactor: Any) -> int | None:
        """See ServedDevice: open every LUN for the first queue."""
        process: int = reactor.pid
        opened = self._opened.get(process)
        if opened is None:
            opened = _Opened(reactor.cpu)
            for lun in self._device:
                if await self._units.open(lun.unit, reactor):
                    opened.luns.append(lun)
                    self._establish(lun)
            self._forget(reactor.cpu)  # a process that has died, and its handles with it
            self._opened[process] = opened
        opened.queues += 1
        return process

    async def close(self, reactor: Any, handle: int) -> None:
        """See ServedDevice: close every LUN after the last queue."""
        opened = self._opened.get(handle)
        if opened is None or reactor.pid != handle:
            return
        opened.queues -= 1
        if opened.queues == 0:
            del self._opened[handle]
            self.missed |= opened.events
            for lun in opened.luns:
                await self._units.close(lun.unit, reactor)

    def queue_args(
        self, features: int, written: Mapping[int, int], slot: int, handle: int | None
    ) -> dict[str, Any]:
        """See ServedDevice."""
        del features, written
        opened = None if handle is None else self._opened.get(handle)
        luns = [] if opened is None else [lun.args(self.initiator) for lun in opened.luns]
        return {"scsi": {"slot": slot, "luns": luns, "missed": self.missed}}

    async def open_lun(self, lun: Lun, reactor: Any) -> bool:
        """Let a reactor that serves queues have one more LUN; False if its bdev is going."""
        opened = self._opened.get(reactor.pid)
        if opened is None or lun in opened.luns or not await self._units.open(lun.unit, reactor):
            return False
        opened.luns.append(lun)
        self._establish(lun)
        return True

    async def close_lun(self, lun: Lun, reactor: Any) -> None:
        """Undo it, or what ``open`` did for this LUN."""
        opened = self._opened.get(reactor.pid)
        if opened is not None and lun in opened.luns:
            opened.luns.remove(lun)
            await self._units.close(lun.unit, reactor)

    def note_event(self, process: int | None) -> None:
        """Take note that the guest is told of something by way of a process, or cannot be."""
        opened = None if process is None else self._opened.get(process)
        if opened is None:
            self.missed = True
        else:
            opened.events = True

    def _forget(self, cpu: int) -> None:
        for process in [one for one, opened in self._opened.items() if opened.cpu == cpu]:
            self.missed |= self._opened.pop(process).events

    def end(self) -> None:
        """Give up its nexuses: the front-end has gone."""
        for lun in self._device:
            self.lose(lun)

    def lose(self, lun: Lun) -> None:
        """Give up its nexus with a LUN, which it does not reach any more."""
        if lun in self._known:
            self._known.discard(lun)
            lun.unit.nexus_gone(self.initiator, lun.port)

    def _establish(self, lun: Lun) -> None:
        """Let a guest find a unit that was just powered on, whoever was there before."""
        if lun not in self._known:
            self._known.add(lun)
            lun.unit.nexus_lost(self.initiator, lun.port, lib.SCSI_ATTENTION_POWER_ON)
