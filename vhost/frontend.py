r"""A virtio-blk driver in user space: the front-end of any vhost-user-blk back-end.

    with BlkFrontend.connect("/run/vhost/disk0") as disk:
        disk.write(0, b"hello".ljust(512, b"\0"))
        disk.flush()
        print(disk.config.capacity, disk.read(0, 512))

Section numbers are those of virtio 1.2. Nothing here is thread-safe.
"""

from __future__ import annotations

import enum
import os
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from vhost.frontend_link import FrontendError, Link
from vhost.frontend_memory import Buffer, DriverQueue, FrontendMemory
from vhost.messages import Feature, ProtocolFeature, Request
from vhost.payloads import (
    U64,
    Config,
    Inflight,
    MemoryTable,
    SingleRegion,
    VringFd,
    VringState,
)

SECTOR = 512  # the unit of virtio-blk, whatever the block size
_BOUNCE = 1 << 20  # bytes that read() and write() move in one request at most


class BlkFeature(enum.IntFlag):
    """Feature bits of virtio-blk, section 5.2.3."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class BlkRequest(enum.IntEnum):
    """Request types, section 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


STATUS_NAMES = {0: "OK", 1: "IOERR", 2: "UNSUPP"}

WANTED_FEATURES = (
    Feature.VERSION_1
    | Feature.PROTOCOL_FEATURES
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | sum(BlkFeature)
)
WANTED_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class RequestError(FrontendError):
    """A request that the device answered with another status than OK."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: the device says {STATUS_NAMES.get(status, status)}")
        self.status = status


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """The configuration space, section 5.2.4; what it says counts only with the feature bit."""

    capacity: int
    """Sectors of 512 bytes."""
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    unused0: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    WIRE: ClassVar = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return what the first 60 bytes of the configuration space say."""
        return cls(*cls.WIRE.unpack_from(data))


class Pending:
    """A request on its way. ``wait()`` returns what came back, once."""

    def __init__(
        self,
        disk: BlkFrontend,
        queue: DriverQueue,
        readable: tuple[int, int],
        writable: tuple[int, int],
    ) -> None:
        self._disk = disk
        self._queue = queue
        self._areas = (readable, writable)
        self.head = -1
        self.written = -1
        """Bytes that the device says it wrote, or -1 while it has not answered."""
        self.status = -1
        self.data = b""
        """What a read returned."""

    @property
    def done(self) -> bool:
        """Whether the answer is here; wait() and poll() look for it."""
        return self.written >= 0

    def complete(self, written: int) -> None:
        """Take the answer out of guest memory and give the memory back."""
        *_, (address, size) = self._areas
        raw = self._disk.memory.read(address, size)
        self.data, self.status, self.written = raw[:-1], raw[-1], written
        for area in self._areas:
            self._disk.memory.free(*area)

    def wait(self, timeout: float | None = None) -> Self:
        """Wait for the answer; FrontendError when it does not come within ``timeout`` seconds."""
        self._disk.wait_for(self, self._queue, timeout)
        return self


class BlkFrontend:
    """A connected and running vhost-user-blk device; see ``connect``.

    ``features`` and ``protocol`` are what was negotiated, ``config`` the configuration space as it
    was then, ``queues`` the virtqueues, ``memory`` what the back-end maps, ``raw`` the socket.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        features: int = WANTED_FEATURES,
        protocol_features: int = WANTED_PROTOCOL,
        timeout: float = 10.0,
    ) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        self.spin = 50e-6
        """Seconds to poll for an answer before sleeping until the device signals."""
        self._wanted = features
        self._wanted_protocol = protocol_features
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.memory: FrontendMemory
        self.queues: list[DriverQueue] = []
        self._waiting: dict[tuple[int, int], Pending] = {}
        self._inflight: tuple[Inflight, int] | None = None
        self._running = False
        self.raw = Link(self.path, timeout=timeout)
        try:
            self._negotiate()
        except BaseException:
            self.raw.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        queues: int = 1,
        queue_size: int = 256,
        memory: int = 64 << 20,
        regions: int = 1,
        hole: int = 1 << 20,
        features: int = WANTED_FEATURES,
        protocol_features: int = WANTED_PROTOCOL,
        timeout: float = 10.0,
    ) -> Self:
        """Connect, negotiate, share ``memory`` bytes in ``regions``, and start ``queues``.

        ``features`` and ``protocol_features`` are used as far as the back-end offers them.
        ``timeout`` is in seconds, for each message and each request. Raises FrontendError.
        """
        disk = cls(path, features=features, protocol_features=protocol_features, timeout=timeout)
        try:
            disk.set_up(queues, queue_size, FrontendMemory(memory, regions=regions, hole=hole))
        except BaseException:
            disk.close()
            raise
        return disk

    # Setting up.

    def _negotiate(self) -> None:
        link = self.raw
        offered = link.number(Request.GET_FEATURES)
        if not offered & Feature.VERSION_1:
            raise FrontendError(f"{self.path}: the back-end does not offer VIRTIO_F_VERSION_1")
        self.features = offered & self._wanted
        self.protocol = ProtocolFeature(0)
        if self.features & Feature.PROTOCOL_FEATURES:
            known = link.number(Request.GET_PROTOCOL_FEATURES)
            self.protocol = ProtocolFeature(known & self._wanted_protocol)
            link.tell(Request.SET_PROTOCOL_FEATURES, U64(self.protocol))
        link.acknowledges = bool(self.protocol & ProtocolFeature.REPLY_ACK)
        link.tell(Request.SET_OWNER)
        if not self.protocol & ProtocolFeature.CONFIG:
            raise FrontendError(
                f"{self.path}: the back-end has no configuration space (protocol feature CONFIG): "
                "not a vhost-user-blk device?"
            )
        self.config = BlkConfig.from_bytes(self.read_config())
        link.tell(Request.SET_FEATURES, U64(self.features))

    def read_config(self, offset: int = 0, size: int = BlkConfig.WIRE.size) -> bytes:
        """Return bytes of the configuration space as it is now."""
        answer = self.raw.ask(Request.GET_CONFIG, Config(offset, size, 0, bytes(size)))
        assert isinstance(answer, Config)
        if len(answer.data) < size:
            raise FrontendError(
                f"{self.path}: the back-end refuses to read {size} bytes of the configuration "
                f"space from {offset}"
            )
        return answer.data

    def max_queues(self) -> int:
        """Return how many queues the back-end has."""
        if self.protocol & ProtocolFeature.MQ:
            return self.raw.number(Request.GET_QUEUE_NUM)
        return 1

    def set_up(self, queues: int, queue_size: int, memory: FrontendMemory) -> None:
        """Share ``memory``, which is the disk's from now on, and start the queues."""
        self.memory = memory
        most = self.max_queues()
        if queues > most:
            raise FrontendError(f"{self.path}: {queues} queues asked for, the device has {most}")
        event_idx = bool(self.features & Feature.EVENT_IDX)
        for index in range(queues):
            self.queues.append(DriverQueue(memory, index, queue_size, event_idx=event_idx))
        self._share_memory()
        if self.protocol & ProtocolFeature.INFLIGHT_SHMFD:
            ask = Inflight(0, 0, queues, queue_size)
            log, fds = self.raw.ask_with_fds(Request.GET_INFLIGHT_FD, ask)
            assert isinstance(log, Inflight)
            if len(fds) != 1:
                raise FrontendError(
                    f"{self.path}: GET_INFLIGHT_FD came with {len(fds)} descriptors"
                )
            self._inflight = (log, fds[0])
        self.start()

    def _share_memory(self) -> None:
        regions, fds = self.memory.regions, self.memory.fds
        if self.protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            slots = self.raw.number(Request.GET_MAX_MEM_SLOTS)
            if len(regions) > slots:
                raise FrontendError(f"{self.path}: {len(regions)} regions, room for {slots}")
            for region, fd in zip(regions, fds, strict=True):
                self.raw.tell(Request.ADD_MEM_REG, SingleRegion(region), [fd])
        else:
            self.raw.tell(Request.SET_MEM_TABLE, MemoryTable(tuple(regions)), fds)

    def start(self) -> None:
        """Start every queue where it stands; after stop() or a lost connection."""
        if self._inflight is not None:
            log, fd = self._inflight
            self.raw.tell(Request.SET_INFLIGHT_FD, log, [fd])
        for queue in self.queues:
            self._start_queue(queue)
        self._running = True

    def _start_queue(self, queue: DriverQueue) -> None:
        tell, index = self.raw.tell, queue.index
        tell(Request.SET_VRING_NUM, VringState(index, queue.size))
        # What was made available and not used is the device's to take (again).
        tell(Request.SET_VRING_BASE, VringState(index, queue.used_idx))
        tell(Request.SET_VRING_ADDR, queue.addresses())
        tell(Request.SET_VRING_ERR, VringFd(index), [queue.error_fd])
        tell(Request.SET_VRING_CALL, VringFd(index), [queue.call_fd])
        tell(Request.SET_VRING_KICK, VringFd(index), [queue.kick_fd])
        if self.features & Feature.PROTOCOL_FEATURES:  # otherwise queues start enabled
            tell(Request.SET_VRING_ENABLE, VringState(index, 1))
        queue.kick()

    def stop(self) -> list[int]:
        """Stop every queue; returns where in its avail ring each stopped.

        The back-end answers when nothing is in flight any more; requests that it had not taken wait
        for start().
        """
        bases = []
        for queue in self.queues:
            answer = self.raw.ask(Request.GET_VRING_BASE, VringState(queue.index, 0))
            assert isinstance(answer, VringState)
            bases.append(answer.num)
        self._running = False
        return bases

    def reconnect(self) -> None:
        """Connect again after the back-end has gone, with the same memory, queues and requests.

        With an in-flight log the back-end serves what was in flight; without, what it had taken
        and not answered may be served twice, or out of order.
        """
        self.raw.close()
        self._running = False
        self.raw = Link(self.path, timeout=self.timeout)
        offered, log = self.features, self._inflight
        self._negotiate()
        if self.features != offered:
            raise FrontendError(
                f"{self.path}: the back-end offers other features than before: "
                f"{self.features:#x}, not {offered:#x}"
            )
        if log is not None and not self.protocol & ProtocolFeature.INFLIGHT_SHMFD:
            raise FrontendError(f"{self.path}: the back-end takes no in-flight log any more")
        self._share_memory()
        self.start()

    def close(self) -> None:
        """Stop the queues if the back-end still answers, and free everything."""
        if self._running and self.raw.alive():
            with suppress(FrontendError):
                self.stop()
        self.raw.close()
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None
        if hasattr(self, "memory"):
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Requests.

    def submit(
        self,
        request: int,
        sector: int = 0,
        data: bytes = b"",
        *,
        length: int = 0,
        queue: int = 0,
        indirect: bool | None = None,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
        publish: bool = True,
    ) -> Pending:
        """Send a request: ``data`` for the device to read, room for ``length`` bytes to write.

        ``readable`` and ``writable`` are sizes of buffers into which header with data, and data
        with status, are cut instead of the usual ones (section 2.7.4.2 allows any). ``indirect``:
        by default if there are more than three buffers and the device can.
        """
        ring = self.queues[queue]
        out = struct.pack("<IIQ", request, 0, sector) + data
        read_area = (self.memory.allocate(len(out)), len(out))
        write_area = (self.memory.allocate(length + 1), length + 1)
        self.memory.write(read_area[0], out)
        self.memory.write(write_area[0], bytes(length) + b"\xff")
        if readable is None:
            readable = [16, *self._segments(len(data))]
        if writable is None:
            writable = [*self._segments(length), 1]
        buffers = [*_cut(*read_area, readable, False), *_cut(*write_area, writable, True)]
        if indirect is None:
            indirect = len(buffers) > 3 and bool(self.features & Feature.INDIRECT_DESC)
        pending = Pending(self, ring, read_area, write_area)
        try:
            pending.head = ring.add(buffers, indirect=indirect)
        except BaseException:
            self.memory.free(*read_area)
            self.memory.free(*write_area)
            raise
        self._waiting[queue, pending.head] = pending
        if publish:
            ring.publish()
        return pending

    def _segments(self, length: int) -> list[int]:
        """Cut data as SIZE_MAX demands (some devices offer it and say 0)."""
        limit = self.config.size_max if self.features & BlkFeature.SIZE_MAX else 0
        limit = limit or max(length, 1)
        return [min(limit, length - at) for at in range(0, length, limit)]

    def poll(self) -> list[Pending]:
        """Take what has come back on any queue, without waiting."""
        done = []
        for queue in self.queues:
            for head, written in queue.reap():
                pending = self._waiting.pop((queue.index, head), None)
                if pending is not None:
                    pending.complete(written)
                    done.append(pending)
        return done

    def wait_for(self, pending: Pending, queue: DriverQueue, timeout: float | None = None) -> None:
        """See Pending.wait."""
        limit = self.timeout if timeout is None else timeout
        end = time.monotonic() + limit
        self.poll()
        while not pending.done:
            left = end - time.monotonic()
            if queue.broken():
                raise FrontendError(f"{self.path}: the back-end says queue {queue.index} is broken")
            if not self.raw.alive():
                raise FrontendError(f"{self.path}: the back-end closed the connection")
            if left <= 0:
                raise FrontendError(
                    f"{self.path}: no answer on queue {queue.index} within {limit:g} s"
                )
            queue.wait(min(left, 0.05), self.spin)
            self.poll()

    def _request(
        self,
        request: BlkRequest,
        sector: int = 0,
        data: bytes = b"",
        length: int = 0,
        queue: int = 0,
    ) -> bytes:
        pending = self.submit(request, sector, data, length=length, queue=queue).wait()
        if pending.status != 0:
            raise RequestError(f"{self.path}: {request.name} at sector {sector}", pending.status)
        return pending.data

    @property
    def size(self) -> int:
        """Bytes that the device has."""
        return self.config.capacity * SECTOR

    @property
    def block_size(self) -> int:
        """Bytes of a block: offsets and lengths are multiples of it."""
        return self.config.blk_size if self.features & BlkFeature.BLK_SIZE else SECTOR

    @property
    def read_only(self) -> bool:
        """Whether the device refuses writes."""
        return bool(self.features & BlkFeature.RO)

    def read(self, offset: int, length: int, *, queue: int = 0) -> bytes:
        """Return bytes of the device; both numbers are multiples of 512."""
        _check_aligned(offset, length)
        parts = [
            self._request(BlkRequest.IN, at // SECTOR, length=size, queue=queue)
            for at, size in self._bounces(offset, length)
        ]
        return b"".join(parts)

    def write(self, offset: int, data: bytes, *, queue: int = 0) -> None:
        """Store bytes on the device; offset and length are multiples of 512."""
        _check_aligned(offset, len(data))
        for at, size in self._bounces(offset, len(data)):
            part = data[at - offset : at - offset + size]
            self._request(BlkRequest.OUT, at // SECTOR, part, queue=queue)

    def _bounces(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        limit = _BOUNCE
        if self.features & BlkFeature.SIZE_MAX and self.features & BlkFeature.SEG_MAX:
            limit = min(limit, (self.config.size_max * self.config.seg_max) or limit)
        end = offset + length
        return ((at, min(limit, end - at)) for at in range(offset, end, limit))

    def flush(self, *, queue: int = 0) -> None:
        """Make what was written durable."""
        self._request(BlkRequest.FLUSH, queue=queue)

    def discard(self, ranges: Iterable[tuple[int, int]], *, unmap: bool = False) -> None:
        """Say that the contents of (offset, length) ranges, in bytes, are not needed any more.

        ``unmap`` sets a flag that has no meaning for discard: devices refuse it.
        """
        self._request(BlkRequest.DISCARD, data=_range_list(ranges, unmap))

    def write_zeroes(self, ranges: Iterable[tuple[int, int]], *, unmap: bool = False) -> None:
        """Make (offset, length) ranges, in bytes, read as zeroes; ``unmap`` allows deallocation."""
        self._request(BlkRequest.WRITE_ZEROES, data=_range_list(ranges, unmap))

    def get_id(self) -> str:
        """Return the device's serial number, at most 20 characters."""
        raw = self._request(BlkRequest.GET_ID, length=20)
        return raw.split(b"\0")[0].decode("ascii", "replace")


def _check_aligned(offset: int, length: int) -> None:
    if offset < 0 or offset % SECTOR or length % SECTOR:
        raise ValueError(f"offset {offset} and length {length} must be multiples of {SECTOR}")


def _range_list(ranges: Iterable[tuple[int, int]], unmap: bool) -> bytes:
    """Return struct virtio_blk_discard_write_zeroes, section 5.2.6, for each range."""
    packed = b""
    for offset, length in ranges:
        _check_aligned(offset, length)
        packed += struct.pack("<QII", offset // SECTOR, length // SECTOR, unmap)
    return packed


def _cut(address: int, size: int, sizes: Sequence[int], device_writes: bool) -> list[Buffer]:
    if sum(sizes) != size:
        raise ValueError(f"buffers of {list(sizes)} bytes do not make {size}")
    buffers = []
    for length in sizes:
        buffers.append((address, length, device_writes))
        address += length
    return buffers
