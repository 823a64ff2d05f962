"""A vhost-user device as its front-end sets it up: negotiation, memory, queues, in-flight log.

What kind of device it is matters only for the features that are asked for; see vhost.frontend for
virtio-blk.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Protocol, Self

from vhost.frontend_channel import BackendChannel
from vhost.frontend_inband import InBand
from vhost.frontend_link import FrontendError, Link, Where, path_of
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.messages import Feature, ProtocolFeature, Request
from vhost.payloads import (
    U64,
    Config,
    Inflight,
    MemoryTable,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)

WANTED_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
IN_BAND = WANTED_PROTOCOL | ProtocolFeature.INBAND_NOTIFICATIONS


class Ring(Protocol):
    """What starting and stopping a queue takes; see :class:`vhost.frontend_memory.DriverQueue`."""

    index: int
    size: int
    kick_fd: int
    call_fd: int
    error_fd: int

    @property
    def base(self) -> int:
        """Where the device begins."""
        ...

    def addresses(self) -> VringAddr:
        """Return where the ring is."""
        ...


class Frontend:
    """A connected device, whose queues run after ``set_up``.

    ``offered`` are the back-end's feature bits, ``features`` and ``protocol`` what was negotiated,
    ``queues`` the virtqueues, ``memory`` what the back-end maps, ``raw`` the connection. Feature
    bits are used as far as the back-end offers them, but ``packed`` rings are had or it is an
    error. ``timeout`` is in seconds, for each message and each request.
    """

    def __init__(
        self,
        where: Where,
        *,
        features: int,
        protocol_features: int = WANTED_PROTOCOL,
        packed: bool = False,
        timeout: float = 10.0,
    ) -> None:
        self.path, self._where = path_of(where), where
        self.timeout = timeout
        self.packed = packed
        self._wanted = features | (Feature.RING_PACKED if packed else 0)
        self._wanted_protocol = protocol_features
        self.offered = self.features = 0
        self.protocol = ProtocolFeature(0)
        self.memory: FrontendMemory
        self.queues: list[DriverQueue] = []
        self._inflight: tuple[Inflight, int] | None = None
        self._running = False
        self.channel: BackendChannel | None = None
        self._inband: InBand | None = None
        self.raw = Link(self._where, timeout=timeout)
        try:
            self._negotiate()
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        self._stop_inband()
        self.raw.close()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _negotiate(self) -> None:
        link = self.raw
        self.offered = offered = link.number(Request.GET_FEATURES)
        if not offered & Feature.VERSION_1:
            raise FrontendError(f"{self.path}: the back-end does not offer VIRTIO_F_VERSION_1")
        if self.packed and not offered & Feature.RING_PACKED:
            raise FrontendError(f"{self.path}: the back-end does not offer packed rings")
        self.features = offered & self._wanted
        self.protocol = ProtocolFeature(0)
        if self.features & Feature.PROTOCOL_FEATURES:
            known = link.number(Request.GET_PROTOCOL_FEATURES)
            self.protocol = ProtocolFeature(known & self._wanted_protocol)
            link.tell(Request.SET_PROTOCOL_FEATURES, U64(self.protocol))
        link.acknowledges = bool(self.protocol & ProtocolFeature.REPLY_ACK)
        link.tell(Request.SET_OWNER)
        link.tell(Request.SET_FEATURES, U64(self.features))
        if self.protocol & ProtocolFeature.BACKEND_REQ:
            self.channel, theirs = BackendChannel.create()
            with theirs:
                link.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def read_config(self, offset: int, size: int) -> bytes:
        """Return bytes of the configuration space as it is now."""
        if not self.protocol & ProtocolFeature.CONFIG:
            raise FrontendError(f"{self.path}: the back-end has no configuration space to read")
        answer = self.raw.ask(Request.GET_CONFIG, Config(offset, size, 0, bytes(size)))
        assert isinstance(answer, Config)
        if len(answer.data) < size:
            raise FrontendError(
                f"{self.path}: the back-end refuses to read {size} bytes of the configuration "
                f"space from {offset}"
            )
        return answer.data

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the configuration space; FrontendError if the back-end refuses."""
        if not self.protocol & ProtocolFeature.CONFIG:
            raise FrontendError(f"{self.path}: the back-end has no configuration space to write")
        self.raw.tell(Request.SET_CONFIG, Config(offset, len(data), 0, data))

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
            queue = DriverQueue(memory, index, queue_size, event_idx=event_idx, packed=self.packed)
            self.queues.append(queue)
        self.share_memory()
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

    def share_memory(self) -> None:
        """Have the back-end map ``memory``."""
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
        if self.channel is not None and self.protocol & ProtocolFeature.INBAND_NOTIFICATIONS:
            self._inband = InBand(self.raw, self.channel, self.queues)
            self._inband.start()
        for queue in self.queues:
            self.start_queue(queue)
            queue.kick()
        self._running = True

    def start_queue(self, queue: Ring) -> None:
        """Start a queue where it stands."""
        tell, index = self.raw.tell, queue.index
        tell(Request.SET_VRING_NUM, VringState(index, queue.size))
        tell(Request.SET_VRING_BASE, VringState(index, queue.base))
        tell(Request.SET_VRING_ADDR, queue.addresses())
        if self._inband is None:
            tell(Request.SET_VRING_ERR, VringFd(index), [queue.error_fd])
            tell(Request.SET_VRING_CALL, VringFd(index), [queue.call_fd])
            tell(Request.SET_VRING_KICK, VringFd(index), [queue.kick_fd])
        if self.features & Feature.PROTOCOL_FEATURES:  # otherwise queues start enabled
            tell(Request.SET_VRING_ENABLE, VringState(index, 1))

    def stop_queue(self, queue: Ring) -> int:
        """Return where a queue has stopped, once nothing is in flight any more."""
        answer = self.raw.ask(Request.GET_VRING_BASE, VringState(queue.index, 0))
        assert isinstance(answer, VringState)
        return answer.num

    def _stop_inband(self) -> None:
        """Kick no more: in a message, that would start a queue again that has been stopped."""
        if self._inband is not None:
            self._inband.stop()
            self._inband = None

    def stop(self) -> list[int]:
        """Stop every queue; returns where each stopped, as GET_VRING_BASE says it.

        The back-end answers when nothing is in flight any more; requests that it had not taken wait
        for start().
        """
        self._stop_inband()
        bases = []
        for queue in self.queues:
            queue.stopped_at = self.stop_queue(queue)
            bases.append(queue.stopped_at)
        self._running = False
        return bases

    def reconnect(self) -> None:
        """Connect again after the back-end has gone, with the same memory, queues and requests.

        With an in-flight log the back-end serves what was in flight; without, what it had taken
        and not answered may be served twice, or out of order. A packed ring that was not stopped
        cannot go on without one: used descriptors have overwritten available ones.
        """
        if self.packed and self._running and self._inflight is None:
            raise FrontendError(
                f"{self.path}: packed rings cannot go on without an in-flight log: the back-end "
                "does not offer INFLIGHT_SHMFD"
            )
        self._disconnect()
        self._running = False
        self.raw = Link(self._where, timeout=self.timeout)
        offered, log = self.features, self._inflight
        self._negotiate()
        if self.features != offered:
            raise FrontendError(
                f"{self.path}: the back-end offers other features than before: "
                f"{self.features:#x}, not {offered:#x}"
            )
        if log is not None and not self.protocol & ProtocolFeature.INFLIGHT_SHMFD:
            raise FrontendError(f"{self.path}: the back-end takes no in-flight log any more")
        self.share_memory()
        self.start()

    def close(self) -> None:
        """Stop the queues if the back-end still answers, and free everything."""
        if self._running and self.raw.alive():
            with suppress(FrontendError):
                self.stop()
        self._disconnect()
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

    def __exit__(self, *exc: object) -> None:
        self.close()
