"""One connection of the initiator to a vhost-user server: memory, and queues that reactors borrow.

Synchronous, as all of the front-end: the control process calls it in threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from reactor.native import CData, lib
from vhost.frontend_device import WANTED_PROTOCOL, Frontend
from vhost.frontend_link import FrontendError
from vhost.frontend_memory import PAGE, DriverQueue, FrontendMemory
from vhost.frontend_scsi import ScsiFrontend
from vhost.initiator_scsi import scan
from vhost.messages import Feature, ProtocolFeature
from vhost.payloads import VringAddr
from vhost.virtio_blk import SECTOR, BlkConfig, BlkFeature
from vhost.virtio_scsi import EVENT_QUEUE, FIRST_REQUEST_QUEUE

MAX_QUEUES = 64  # of requests
MAX_REQUEST = 1 << 31  # bytes of a range, where the server names no limit

_COMMON = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.EVENT_IDX
_BLK = (
    BlkFeature.RO
    | BlkFeature.BLK_SIZE
    | BlkFeature.FLUSH
    | BlkFeature.MQ
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
)
# In-flight logs are for those who keep their rings: what was in flight is submitted again.
_PROTOCOL = WANTED_PROTOCOL & ~ProtocolFeature.INFLIGHT_SHMFD


@dataclass(frozen=True, slots=True)
class Disk:
    """What a server says of one disk. All sizes are bytes; 0: there is no such request."""

    target: int
    lun: int
    block_size: int
    num_blocks: int = field(compare=False)
    readonly: bool
    flush: bool
    max_unmap: int
    max_zeroes: int


class Area:
    """One queue's part of the memory, with its eventfds."""

    def __init__(self, memory: FrontendMemory, index: int, size: int) -> None:
        self.index = index
        self.size = size
        self._layout: CData = lib.initiator_layout(size)
        self._memory = memory
        self.guest = memory.allocate(self._layout.size, PAGE)
        self.offset = self.guest - memory.regions[0].guest
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kick_fd, self.call_fd, self.error_fd = (os.eventfd(0, flags) for _ in range(3))

    base = 0  # a queue begins anew whenever it is lent

    def addresses(self) -> VringAddr:
        """Return what SET_VRING_ADDR says."""
        user, layout = self._memory.user(self.guest), self._layout
        desc, used, avail = (user + at for at in (layout.desc, layout.used, layout.avail))
        return VringAddr(self.index, 0, desc, used, avail, 0)

    def clear(self) -> None:
        """Make the ring as new."""
        self._memory.write(self.guest, bytes(self._layout.headers))

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick_fd, self.call_fd, self.error_fd):
            os.close(fd)


class InitiatorSession(Frontend):
    """A connection that has told what disks there are, and lends its queues after ``share``."""

    def __init__(self, path: str, kind: str, *, timeout: float = 10.0) -> None:
        self.areas: list[Area] = []
        self.disks: list[Disk] = []
        self.scsi = kind == "scsi"
        if self.scsi:
            # By a connection of its own, whose queues are Python's.
            with ScsiFrontend.connect(path, timeout=timeout) as host:
                self.disks = [Disk(**unit) for unit in scan(host)]
        self._first = FIRST_REQUEST_QUEUE if self.scsi else 0
        features = _COMMON if self.scsi else _COMMON | _BLK
        super().__init__(path, features=features, protocol_features=_PROTOCOL, timeout=timeout)
        if not self.scsi:
            try:
                self.disks = [self.read_disk()]
            except BaseException:
                self.close()
                raise

    def read_disk(self) -> Disk:
        """Return what the configuration space of virtio-blk says now."""
        config = BlkConfig.from_bytes(self.read_config(0, BlkConfig.WIRE.size))
        size = config.blk_size if self.features & BlkFeature.BLK_SIZE else SECTOR
        if size not in (SECTOR, 4096):
            size = SECTOR  # which is what requests are counted in
        return Disk(
            target=0,
            lun=0,
            block_size=size,
            num_blocks=config.capacity * SECTOR // size,
            readonly=bool(self.features & BlkFeature.RO),
            flush=bool(self.features & BlkFeature.FLUSH),
            max_unmap=self._limit(BlkFeature.DISCARD, config.max_discard_sectors, size),
            max_zeroes=self._limit(BlkFeature.WRITE_ZEROES, config.max_write_zeroes_sectors, size),
        )

    def _limit(self, feature: BlkFeature, sectors: int, block_size: int) -> int:
        if not self.features & feature:
            return 0
        return min(sectors * SECTOR or MAX_REQUEST, MAX_REQUEST) // block_size * block_size

    def share(self, count: int | None, size: int) -> None:
        """Share memory for ``count`` queues of ``size`` entries, by default for all there are."""
        most = self.max_queues() - self._first
        if count is not None and count > most:
            raise FrontendError(f"{self.path}: {count} queues asked for, the server has {most}")
        count = min(most, MAX_QUEUES) if count is None else count
        room = count * (lib.initiator_layout(size).size + PAGE) + (1 << 16)
        self.memory = FrontendMemory(room)
        for index in range(count):
            self.areas.append(Area(self.memory, self._first + index, size))
        self.share_memory()
        if self._first:  # a server may wait for these before it serves the others
            self.queues = [
                DriverQueue(self.memory, index, 16, event_idx=self.event_idx)
                for index in range(EVENT_QUEUE + 1)
            ]
        self.start()

    @property
    def event_idx(self) -> bool:
        """Whether EVENT_IDX was negotiated."""
        return bool(self.features & Feature.EVENT_IDX)

    def start_area(self, place: int) -> None:
        """Start the queue of an area, from nothing."""
        self.areas[place].clear()
        self.start_queue(self.areas[place])

    def stop_area(self, place: int) -> None:
        """Return when the server has finished with what is in a queue, however long that takes."""
        self.raw.set_timeout(None)
        try:
            self.stop_queue(self.areas[place])
        finally:
            self.raw.set_timeout(self.timeout)

    def close(self) -> None:
        """Disconnect, and free everything; reactors keep what they have mapped."""
        super().close()
        for area in self.areas:
            area.close()
        self.areas.clear()
