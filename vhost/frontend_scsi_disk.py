"""A logical unit of a virtio-scsi device as a disk that load can be put on: see vhost.io."""

from __future__ import annotations

import struct
from typing import Self

from vhost.frontend_device import WANTED_PROTOCOL
from vhost.frontend_link import FrontendError, Link, Where
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.frontend_scsi import WANTED_FEATURES, ScsiFrontend
from vhost.virtio_scsi import FIRST_REQUEST_QUEUE, address

_READY = bytes(6)
_CAPACITY = bytes.fromhex("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00")
_MODES = bytes.fromhex("1a 08 3f 00 04 00")
_WRITE_PROTECTED = 0x80
_UNIT_ATTENTION = 6
_QUEUE_SIZE, _MEMORY = 16, 1 << 20  # for the questions at the beginning


class ScsiDisk:
    """A unit, and a connection for its load; ``size`` and ``block_size`` are in bytes."""

    def __init__(
        self,
        where: Where,
        *,
        target: int = 0,
        lun: int = 0,
        features: int = WANTED_FEATURES,
        protocol_features: int = WANTED_PROTOCOL,
        packed: bool = False,
        timeout: float = 10.0,
    ) -> None:
        """Ask the unit what it is; FrontendError if there is none."""
        self.path = where
        self.address = address(target, lun)
        self._place = target, lun
        with ScsiFrontend(
            where, features=features, protocol_features=protocol_features, timeout=timeout
        ) as host:
            host.set_up(FIRST_REQUEST_QUEUE + 1, _QUEUE_SIZE, FrontendMemory(_MEMORY))
            self._get_ready(host)
            last, self.block_size = struct.unpack_from(">QI", self._ask(host, _CAPACITY, 32))
            self.read_only = bool(self._ask(host, _MODES, 4)[2] & _WRITE_PROTECTED)
        self.size = (last + 1) * self.block_size
        self._host = ScsiFrontend(
            where,
            features=features,
            protocol_features=protocol_features,
            packed=packed,
            timeout=timeout,
        )
        self.features = self._host.features
        self.raw: Link = self._host.raw
        self.max_buffers: int = self._host.config.seg_max

    @property
    def queues(self) -> list[DriverQueue]:
        """The request queues."""
        return self._host.queues[FIRST_REQUEST_QUEUE:]

    @property
    def memory(self) -> FrontendMemory:
        """What is shared with the device."""
        return self._host.memory

    def set_up(self, queues: int, queue_size: int, memory: FrontendMemory) -> None:
        """Share ``memory``, start the queues, and take the unit attentions that a guest finds."""
        self._host.set_up(FIRST_REQUEST_QUEUE + queues, queue_size, memory)
        self._get_ready(self._host)

    def _get_ready(self, host: ScsiFrontend) -> None:
        while True:
            answer = host.command(*self._place, _READY)
            if answer.response == 0 and answer.status == 0:
                return
            if answer.response or not answer.sense or answer.sense[2] & 0xF != _UNIT_ATTENTION:
                target, lun = self._place
                raise FrontendError(f"{self.path}: LUN {lun} of target {target} is not ready")

    def _ask(self, host: ScsiFrontend, cdb: bytes, room: int) -> bytes:
        answer = host.command(*self._place, cdb, into=room)
        if answer.response or answer.status or len(answer.data) < room:
            raise FrontendError(f"{self.path}: the unit does not answer command {cdb[0]:#04x}")
        return answer.data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._host.close()
