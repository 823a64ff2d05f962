"""What is known of one connection: plain data and the descriptors that it owns.

Nothing here does anything, so that a session can be rebuilt elsewhere from its record: by a reactor
that replaces another, or by a control process that adopts the connection.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vhost.iotlb import READ, WRITE, Iotlb
from vhost.messages import (
    MAX_FD_QUEUES,
    MAX_QUEUES,
    Feature,
    MemoryTable,
    ProtocolFeature,
    Region,
    VringAddr,
)


class Told(enum.IntFlag):
    """What a front-end has announced of a queue: a descriptor, or that there is none."""

    KICK = 1
    CALL = 2
    ERROR = 4


NOTHING = Told(0)


class Migration(enum.Enum):
    """How far a post-copy migration to here has come: see vhost.postcopy."""

    NONE = enum.auto()
    ADVISED = enum.auto()
    LISTENING = enum.auto()


@dataclass(slots=True)
class MappedRegion:
    """A region of guest memory and the descriptor of its file."""

    region: Region
    fd: int


@dataclass(slots=True)
class InflightArea:
    """A file with the in-flight logs of several queues, one every ``stride`` bytes from ``offset``.

    ``shared`` tells that the front-end keeps it too, so that it may hold what another process
    began (vhost-user, "Inflight I/O tracking").
    """

    fd: int
    offset: int
    queues: int
    queue_size: int
    stride: int
    shared: bool


@dataclass(slots=True)
class DirtyLog:
    """A bitmap of guest pages, ``size`` bytes at ``offset`` of a file, for a live migration."""

    PAGE: ClassVar = 4096  # bytes of guest memory for each bit

    fd: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The guest-physical address up to which there are bits."""
        return self.size * 8 * self.PAGE


@dataclass(slots=True)
class LogPart:
    """The in-flight log of one queue: ``size`` bytes at ``offset`` of a file that is its area's."""

    fd: int
    offset: int
    size: int


@dataclass(slots=True)
class QueueRecord:
    """One virtqueue as the front-end has described it. Descriptors are -1 where there is none.

    Those that were not ``told`` are eventfds of ours: see vhost.inband.
    """

    index: int
    size: int = 0
    addr: VringAddr | None = None
    ring: VringAddr | None = None  # while it runs: the same, of the front-end's address space
    base: int = 0  # where to go on, as SET_VRING_BASE says it
    kick: int = -1
    call: int = -1
    error: int = -1
    told: Told = NOTHING
    started: bool = False  # by a kick descriptor, the absence of one, or a kick in a message
    enabled: bool | None = None  # None: the front-end has not said
    running: bool = False  # a reactor serves it
    recover: bool = False  # what is in flight stands in a log that the front-end brought
    log: LogPart | None = None
    broken: str = ""  # why the device has stopped serving it

    def drop_kick(self) -> None:
        """Forget the kick descriptor: the ring is stopped until there is another."""
        close_fds((self.kick,))
        self.kick, self.started = -1, False
        self.told &= ~Told.KICK


@dataclass(frozen=True, slots=True)
class Coalescing:
    """When a queue holds signals back; see vhost/coalescing.h."""

    delay_base_us: int = 0  # 0: never
    iops_threshold: int = 60000


@dataclass(slots=True)
class SessionRecord:
    """One connection's state. ``close`` closes every descriptor in it."""

    id: int
    controller: str
    features: int = 0
    protocol_features: int = 0
    status: int = 0  # the device status that the driver has set, as far as we are told
    written: dict[int, int] = field(default_factory=dict)
    """What was written into the configuration space: bytes by their offsets."""
    backend_channel: int = -1  # where requests of ours go to the front-end
    memory: list[MappedRegion] = field(default_factory=list)
    queues: dict[int, QueueRecord] = field(default_factory=dict)
    dirty_log: DirtyLog | None = None
    log_event: int = -1  # to signal when something was logged
    inflight: InflightArea | None = None  # the front-end's
    own_inflight: InflightArea | None = None  # for queues that the front-end has none for
    coalescing: Coalescing = Coalescing()
    iotlb: Iotlb = field(default_factory=Iotlb)
    migration: Migration = Migration.NONE
    unconfirmed: bool = False  # the front-end cannot deal with faults in memory yet
    uses_fds: bool = False  # SET_VRING_KICK, _CALL or _ERR came

    @property
    def inband(self) -> bool:
        """Whether notifications are messages where no eventfd was announced."""
        return bool(self.protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS)

    @property
    def max_queues(self) -> int:
        """How many queues there may be: those messages can name fewer than others.

        It takes more than the feature: QEMU negotiates it with whoever offers it, goes on with
        eventfds, and cuts off what is too much of an index. It asks before it gives us a channel.
        """
        by_messages = self.inband and self.backend_channel >= 0 and not self.uses_fds
        return MAX_QUEUES if by_messages else MAX_FD_QUEUES

    def queue(self, index: int) -> QueueRecord:
        """Return queue ``index``, which begins to exist when it is first spoken of."""
        return self.queues.setdefault(index, QueueRecord(index))

    def is_enabled(self, queue: QueueRecord) -> bool:
        """Tell whether a ring is enabled; see "Ring states" for what it is at first."""
        if queue.enabled is None:
            return not self.features & Feature.PROTOCOL_FEATURES
        return queue.enabled

    @property
    def packed(self) -> bool:
        """Whether rings have the packed format (virtio 1.2, section 2.8)."""
        return bool(self.features & Feature.RING_PACKED)

    @property
    def logging(self) -> DirtyLog | None:
        """Where to log what is written into guest memory, while that is asked for."""
        return self.dirty_log if self.features & Feature.LOG_ALL else None

    @property
    def translated(self) -> bool:
        """Whether a driver's addresses are IOVAs, which the front-end translates."""
        return bool(self.features & Feature.ACCESS_PLATFORM)

    def ring(self, queue: QueueRecord) -> VringAddr | None:
        """Return where a ring is in the front-end's address space, None if that is not known yet.

        The log address of one that is translated becomes the guest-physical address that it is for
        other rings: front-ends send the IOVA.
        """
        addr = queue.addr
        if addr is None or not self.translated:
            return addr
        found = {
            part: self.iotlb.translate(iova, size, ring_access(part, packed=self.packed))
            for part, (iova, size) in ring_parts(addr, queue.size, packed=self.packed).items()
        }
        desc, avail, used = (found[part] for part in ("descriptor", "avail", "used"))
        if desc is None or avail is None or used is None:
            return None
        log = next(
            region.guest + used - region.user
            for region in self.table().regions
            if region.holds(used, 1)
        )
        return VringAddr(addr.index, addr.flags, desc, used, avail, log)

    def is_ready(self, queue: QueueRecord) -> bool:
        """Tell whether all that is needed to serve a queue is known."""
        described = queue.size > 0 and queue.addr is not None and bool(self.memory)
        ready = described and queue.started and self.is_enabled(queue)
        return ready and not self.unconfirmed

    def table(self) -> MemoryTable:
        """Return the regions of guest memory without their descriptors."""
        return MemoryTable(tuple(entry.region for entry in self.memory))

    def drop_backend_channel(self) -> None:
        """Forget the channel for requests of ours."""
        close_fds((self.backend_channel,))
        self.backend_channel = -1

    def close(self) -> None:
        """Close every descriptor."""
        for queue in self.queues.values():
            close_fds((queue.kick, queue.call, queue.error))
        close_fds([entry.fd for entry in self.memory])
        self.drop_backend_channel()
        if self.dirty_log is not None:
            close_fds((self.dirty_log.fd,))
        close_fds((self.log_event,))
        self.dirty_log, self.log_event = None, -1
        close_fds([area.fd for area in (self.inflight, self.own_inflight) if area is not None])
        self.queues, self.memory = {}, []
        self.inflight = self.own_inflight = None


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors; those that are -1 are none."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def ring_parts(addr: VringAddr, size: int, *, packed: bool) -> dict[str, tuple[int, int]]:
    """Return address and bytes of each part of a ring of ``size`` entries.

    Sizes are those of virtio 1.2, sections 2.7 and 2.8.10; a packed ring has the event suppression
    of the driver where a split one has its avail ring, and that of the device for the used ring.
    """
    avail, used = (4, 4) if packed else (6 + 2 * size, 6 + 8 * size)
    return {
        "descriptor": (addr.desc, 16 * size),
        "avail": (addr.avail, avail),
        "used": (addr.used, used),
    }


def ring_access(part: str, *, packed: bool) -> int:
    """Return what the device does to a part of a ring: virtio 1.2, sections 2.7 and 2.8."""
    if part == "descriptor" and packed:
        return READ | WRITE
    return WRITE if part == "used" else READ


def in_table(addr: VringAddr | None, size: int, table: MemoryTable, *, packed: bool) -> bool:
    """Tell whether a ring, as far as it is known, is in a table's memory."""
    parts = () if addr is None else ring_parts(addr, size, packed=packed).values()
    return all(any(region.holds(*part) for region in table.regions) for part in parts)
