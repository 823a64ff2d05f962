"""The two devices as ``hot_path`` has them: the chain of a request, and how a queue starts."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from reactor.native import CData, ffi, lib
from tests.support.scsi import Port, Unit
from vhost.frontend_memory import Buffer, FrontendMemory
from vhost.virtio_blk import BlkRequest
from vhost.virtio_scsi import COMMAND, FIRST_REQUEST_QUEUE, RESPONSE, SENSE_SIZE

SECTOR = 512  # bytes, also of a logical block
READ_10, WRITE_10 = 0x28, 0x2A
LUN_0 = bytes([1, 0, 0x40, 0, 0, 0, 0, 0])
INITIATOR = 0x3000_0000_0000_0001


class Device(ABC):
    """A kind of device."""

    name: str

    @abstractmethod
    def chain(
        self, memory: FrontendMemory, offset: int, size: int, write: bool
    ) -> tuple[list[Buffer], int]:
        """Return the buffers of a request, and the address of the byte that is 0 if it succeeds."""

    @abstractmethod
    def start(self, reactor: CData, table: CData, bdev: CData, vq: CData) -> CData:
        """Start a queue: NULL, and errno, if that fails."""

    @abstractmethod
    def end(self) -> None:
        """Free what start() has made beside the queue."""

    @contextmanager
    def queue(self, reactor: CData, table: CData, bdev: CData, vq: CData) -> Iterator[None]:
        """Have a queue while the body runs."""
        native = self.start(reactor, table, bdev, vq)
        if native == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        try:
            yield
        finally:
            lib.queue_stop(native)
            lib.queue_free(native)
            self.end()


class _Blk(Device):
    name = "blk"

    def chain(
        self, memory: FrontendMemory, offset: int, size: int, write: bool
    ) -> tuple[list[Buffer], int]:
        header, data, status = (memory.allocate(length) for length in (16, size, 1))
        kind = BlkRequest.OUT if write else BlkRequest.IN
        memory.write(
            header, int(kind).to_bytes(8, "little") + (offset // SECTOR).to_bytes(8, "little")
        )
        return [(header, 16, False), (data, size, not write), (status, 1, True)], status

    def start(self, reactor: CData, table: CData, bdev: CData, vq: CData) -> CData:
        return lib.blk_queue_start(reactor, table, bdev, vq, ffi.new("struct blk_setup *"))

    def end(self) -> None:
        pass


class _Scsi(Device):
    """A LUN as the application has it: it minds ranges that COMPARE AND WRITE has locked."""

    name = "scsi"

    def chain(
        self, memory: FrontendMemory, offset: int, size: int, write: bool
    ) -> tuple[list[Buffer], int]:
        length = RESPONSE.size + SENSE_SIZE
        header, data, response = (memory.allocate(each) for each in (COMMAND.size, size, length))
        opcode, lba, blocks = WRITE_10 if write else READ_10, offset // SECTOR, size // SECTOR
        cdb = bytes([opcode, 0]) + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big")
        memory.write(header, COMMAND.pack(LUN_0, offset, 0, 0, 0, cdb))
        buffers = [(header, COMMAND.size, False), (response, length, True)]
        buffers.insert(1 if write else 2, (data, size, not write))
        return buffers, response + RESPONSE.size - 2  # the status; the response code follows

    def start(self, reactor: CData, table: CData, bdev: CData, vq: CData) -> CData:
        self._unit = Unit(reactor, bdev)
        port = Port(reactor, self._unit, INITIATOR, 1).ready()
        self._device = lib.scsi_device_create(reactor)
        assert lib.scsi_device_add(self._device, 0, port.target) == 0  # which frees it
        return lib.scsi_queue_start(reactor, table, self._device, FIRST_REQUEST_QUEUE, vq, 0)

    def end(self) -> None:
        lib.scsi_device_free(self._device)
        self._unit.close()


BLK, SCSI = _Blk(), _Scsi()
