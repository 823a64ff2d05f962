r"""A virtio-scsi driver in user space: the front-end of any vhost-user-scsi back-end.

    with ScsiFrontend.connect("/run/vhost/scsi0") as host:
        answer = host.command(0, 0, bytes.fromhex("12 00 00 00 60 00"), into=96)
        print(answer.status, answer.data)

Section numbers are those of virtio 1.2. Nothing here is thread-safe.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Self

from vhost.frontend_device import WANTED_PROTOCOL, Frontend
from vhost.frontend_link import FrontendError, Where
from vhost.frontend_memory import Buffer, FrontendMemory
from vhost.messages import Feature
from vhost.virtio_scsi import (
    CDB_SIZE,
    COMMAND,
    CONTROL_QUEUE,
    EVENT,
    EVENT_QUEUE,
    FIRST_REQUEST_QUEUE,
    NOTIFICATION,
    RESPONSE,
    SENSE_SIZE,
    TASK_MANAGEMENT,
    Function,
    ScsiFeature,
    address,
)

_SPIN = 50e-6  # seconds to poll for an answer before sleeping until the device signals
_SEGMENT = 64 << 10  # bytes of a data buffer
_RESPONSE_SIZE = RESPONSE.size + SENSE_SIZE

WANTED_FEATURES = (
    Feature.VERSION_1
    | Feature.PROTOCOL_FEATURES
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | sum(ScsiFeature)
)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended; ``response`` is the transport's word, ``status`` SCSI's."""

    response: int
    status: int
    sense: bytes
    residual: int
    data: bytes


class Exchange:
    """A chain on its way: what the device reads, then room for what it writes."""

    def __init__(self, memory: FrontendMemory, readable: bytes, room: int) -> None:
        self._memory = memory
        self.out = (memory.allocate(max(len(readable), 1)), len(readable))
        self.into = (memory.allocate(max(room, 1)), room)
        memory.write(self.out[0], readable)
        memory.write(self.into[0], b"\xee" * room)
        self.written = -1
        """Bytes that the device says it wrote, or -1 while it has not answered."""
        self.raw = b""

    def buffers(self, out_sizes: list[int], in_sizes: list[int]) -> list[Buffer]:
        """Return the descriptors, of these sizes."""
        chain: list[Buffer] = []
        for (start, _), sizes, writes in (
            (self.out, out_sizes, False),
            (self.into, in_sizes, True),
        ):
            at = start
            for size in sizes:
                chain.append((at, size, writes))
                at += size
        return chain

    def complete(self, written: int) -> None:
        """Take what the device wrote, and give the memory back."""
        self.raw, self.written = self._memory.read(*self.into), written
        for start, size in (self.out, self.into):
            self._memory.free(start, max(size, 1))


class ScsiFrontend(Frontend):
    """A vhost-user-scsi device; see ``connect``."""

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
        self._tags = itertools.count(1)
        self._waiting: dict[tuple[int, int], Exchange] = {}
        self._events: list[Exchange] = []

    @classmethod
    def connect(
        cls,
        where: Where,
        *,
        request_queues: int = 1,
        queue_size: int = 128,
        memory: int = 64 << 20,
        features: int = WANTED_FEATURES,
        protocol_features: int = WANTED_PROTOCOL,
        timeout: float = 10.0,
    ) -> Self:
        """Connect, negotiate, share ``memory`` bytes and start all queues. Raises FrontendError."""
        host = cls(where, features=features, protocol_features=protocol_features, timeout=timeout)
        try:
            queues = FIRST_REQUEST_QUEUE + request_queues
            host.set_up(queues, queue_size, FrontendMemory(memory))
        except BaseException:
            host.close()
            raise
        return host

    # --- commands

    def command(
        self,
        target: int,
        lun: int,
        cdb: bytes,
        out: bytes = b"",
        into: int = 0,
        *,
        attribute: int = 0,
        queue: int = 0,
    ) -> Answer:
        """Carry out a command: ``out`` is its Data-Out, ``into`` the room for Data-In, in bytes."""
        sent = self.submit(target, lun, cdb, out, into, attribute=attribute, queue=queue)
        return self.answer(sent)

    def submit(
        self,
        target: int,
        lun: int,
        cdb: bytes,
        out: bytes = b"",
        into: int = 0,
        *,
        attribute: int = 0,
        tag: int | None = None,
        queue: int = 0,
    ) -> Exchange:
        """Send a command; see ``answer``. ``tag`` is what task management calls it by."""
        if len(cdb) > CDB_SIZE:
            raise ValueError(f"a CDB of {len(cdb)} bytes: at most {CDB_SIZE}")
        number = next(self._tags) if tag is None else tag
        header = COMMAND.pack(address(target, lun), number, attribute, 0, 0, cdb)
        return self.send(
            FIRST_REQUEST_QUEUE + queue,
            header + out,
            _RESPONSE_SIZE + into,
            cut_out=[len(header), *_segments(len(out))],
            cut_in=[_RESPONSE_SIZE, *_segments(into)],
        )

    def answer(self, sent: Exchange, timeout: float | None = None) -> Answer:
        """Wait for a command's end; FrontendError when there is none within ``timeout`` seconds."""
        raw = self.wait(sent, timeout).raw
        sense_length, residual, _, status, response = RESPONSE.unpack_from(raw)
        sense = raw[RESPONSE.size : RESPONSE.size + min(sense_length, SENSE_SIZE)]
        moved = max(0, sent.written - _RESPONSE_SIZE)
        return Answer(response, status, sense, residual, raw[_RESPONSE_SIZE:][:moved])

    # --- control and events

    def manage(self, function: Function, target: int, lun: int, tag: int = 0) -> int:
        """Carry out a task management function and return its response."""
        ask = TASK_MANAGEMENT.pack(0, function, address(target, lun), tag)
        return self.wait(self.send(CONTROL_QUEUE, ask, 1)).raw[0]

    def notifications(self, kind: int, target: int, lun: int, events: int) -> tuple[int, int]:
        """Query (1) or subscribe to (2) notifications; return which there are, and the response."""
        ask = NOTIFICATION.pack(kind, address(target, lun), events)
        raw = self.wait(self.send(CONTROL_QUEUE, ask, 5)).raw
        return int.from_bytes(raw[:4], "little"), raw[4]

    def post_events(self, count: int) -> None:
        """Give the device buffers for events."""
        self._events += [self.send(EVENT_QUEUE, b"", EVENT.size) for _ in range(count)]

    def event(self, timeout: float | None = None) -> tuple[int, bytes, int]:
        """Return the oldest event: type, logical unit, reason. FrontendError if none comes."""
        raw = self.wait(self._events[0], timeout).raw
        del self._events[0]
        event, lun, reason = EVENT.unpack(raw)
        return event, lun, reason

    # --- queues

    def send(
        self,
        queue: int,
        readable: bytes,
        room: int,
        *,
        cut_out: list[int] | None = None,
        cut_in: list[int] | None = None,
    ) -> Exchange:
        """Send a chain of any form on any queue."""
        ring = self.queues[queue]
        exchange = Exchange(self.memory, readable, room)
        if cut_out is None:
            cut_out = [len(readable)] if readable else []
        if cut_in is None:
            cut_in = [room] if room else []
        buffers = exchange.buffers(cut_out, cut_in)
        indirect = len(buffers) > 3 and bool(self.features & Feature.INDIRECT_DESC)
        head = ring.add(buffers, indirect=indirect)
        self._waiting[queue, head] = exchange
        ring.publish()
        return exchange

    def poll(self) -> None:
        """Take what has come back on any queue, without waiting."""
        for queue in self.queues:
            for head, written in queue.reap():
                exchange = self._waiting.pop((queue.index, head), None)
                if exchange is not None:
                    exchange.complete(written)

    def wait(self, exchange: Exchange, timeout: float | None = None) -> Exchange:
        """Wait until a chain has come back; FrontendError after ``timeout`` seconds."""
        limit = self.timeout if timeout is None else timeout
        end = time.monotonic() + limit
        index = next((queue for (queue, _), e in self._waiting.items() if e is exchange), None)
        while exchange.written < 0 and index is not None:
            queue, left = self.queues[index], end - time.monotonic()
            if queue.broken():
                raise FrontendError(f"{self.path}: the back-end says queue {index} is broken")
            if not self.raw.alive():
                raise FrontendError(f"{self.path}: the back-end closed the connection")
            if left <= 0:
                raise FrontendError(f"{self.path}: no answer on queue {index} within {limit:g} s")
            queue.wait(min(left, 0.05), _SPIN)
            self.poll()
        return exchange


def _segments(length: int) -> list[int]:
    return [min(_SEGMENT, length - at) for at in range(0, length, _SEGMENT)]
