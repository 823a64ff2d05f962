r"""A virtio-blk driver in user space: the front-end of any vhost-user-blk back-end.

    with BlkFrontend.connect("/run/vhost/disk0") as disk:
        disk.write(0, b"hello".ljust(512, b"\0"))
        disk.flush()
        print(disk.config.capacity, disk.read(0, 512))

Section numbers are those of virtio 1.2. Nothing here is thread-safe.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from typing import Self

from vhost.frontend_device import WANTED_PROTOCOL, Frontend
from vhost.frontend_link import FrontendError, Where
from vhost.frontend_memory import Buffer, DriverQueue, FrontendMemory
from vhost.messages import Feature
from vhost.virtio_blk import SECTOR, STATUS_NAMES, BlkConfig, BlkFeature, BlkRequest
from vhost.virtio_scsi import ScsiConfig

_BOUNCE = 1 << 20  # bytes that read() and write() move in one request at most

WANTED_FEATURES = (
    Feature.VERSION_1
    | Feature.PROTOCOL_FEATURES
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | sum(BlkFeature)
)


class RequestError(FrontendError):
    """A request that the device answered with another status than OK."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: the device says {STATUS_NAMES.get(status, status)}")
        self.status = status


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


class BlkFrontend(Frontend):
    """A vhost-user-blk device; see ``connect``.

    ``config`` is the configuration space as it was when it was read last: when the connection was
    made, or by ``refresh_config`` and ``wait_config_change``.
    """

    def __init__(
        self,
        where: Where,
        *,
        features: int = WANTED_FEATURES,
        protocol_features: int = WANTED_PROTOCOL,
        packed: bool = False,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(
            where,
            features=features,
            protocol_features=protocol_features,
            packed=packed,
            timeout=timeout,
        )
        self.spin = 50e-6
        """Seconds to poll for an answer before sleeping until the device signals."""
        self._waiting: dict[tuple[int, int], Pending] = {}
        try:
            self.refresh_config()
        except BaseException:
            self.close()
            raise

    def refresh_config(self) -> None:
        """Read the configuration space again."""
        raw = self.read_config(0, BlkConfig.WIRE.size)
        if not self.offered & BlkFeature.BLK_SIZE and ScsiConfig.from_bytes(raw).is_scsi:
            raise FrontendError(f"{self.path}: the device is virtio-scsi, not virtio-blk")
        self.config = BlkConfig.from_bytes(raw)

    def wait_config_change(self, timeout: float | None = None) -> None:
        """Wait until the device says that its configuration has changed, and read it again.

        Raises FrontendError when it does not within ``timeout`` seconds, or never will: without
        BACKEND_REQ.
        """
        if self.channel is None:
            raise FrontendError(f"{self.path}: the back-end tells no changes of its configuration")
        self.channel.wait_config_change(self.timeout if timeout is None else timeout)
        self.refresh_config()

    @classmethod
    def connect(
        cls,
        where: Where,
        *,
        queues: int = 1,
        queue_size: int = 256,
        memory: int = 64 << 20,
        regions: int = 1,
        hole: int = 1 << 20,
        features: int = WANTED_FEATURES,
        protocol_features: int = WANTED_PROTOCOL,
        packed: bool = False,
        timeout: float = 10.0,
    ) -> Self:
        """Connect, negotiate, share ``memory`` bytes in ``regions``, and start ``queues``.

        ``where`` is the back-end's socket, or one that listens and to which it connects.
        ``features`` and ``protocol_features`` are used as far as the back-end offers them;
        ``packed`` rings must be offered. ``timeout`` is in seconds, for each message and each
        request. Raises FrontendError.
        """
        disk = cls(
            where,
            features=features,
            protocol_features=protocol_features,
            packed=packed,
            timeout=timeout,
        )
        try:
            disk.set_up(queues, queue_size, FrontendMemory(memory, regions=regions, hole=hole))
        except BaseException:
            disk.close()
            raise
        return disk

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
