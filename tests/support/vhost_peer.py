"""A front-end that says what a test wants it to, and a queue host that only takes notes."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import IO

from reactor.errors import OperationError
from tests.support.descriptors import open_fds
from tests.support.waiting import PATIENCE
from vhost.connection import Connection
from vhost.iotlb import Translation
from vhost.messages import (
    MESSAGES,
    NEED_REPLY,
    U64,
    Feature,
    MemoryTable,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Region,
    Request,
    VringAddr,
    VringFd,
    VringState,
)
from vhost.record import QueueRecord, SessionRecord
from vhost.session import Session

GUEST_SIZE = 1 << 20
USER = 0x7F00_0000_0000
FEATURES = Feature.VERSION_1 | Feature.EVENT_IDX
REGION = Region(0, GUEST_SIZE, USER, 0)


class FakeDevice:
    features = int(FEATURES)
    virtio_id = 2

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes, bool]] = []

    def config(self, _features: int, written: Mapping[int, int], _queues: int) -> bytes:
        return bytes(written.get(at, at) for at in range(60))

    def accept_config(
        self, offset: int, data: bytes, _features: int, _queues: int, *, migration: bool
    ) -> dict[int, int]:
        if offset:
            raise ProtocolError("SET_CONFIG", "offset", offset, "0", fatal=False)
        self.written.append((offset, data, migration))
        return dict(enumerate(data, offset))


@dataclass
class FakeHost:
    """Checks what a real host relies on; ``calls`` says what was asked for."""

    record: SessionRecord
    base: int = 7
    fail: str = ""
    calls: list[str] = field(default_factory=list)
    running: set[int] = field(default_factory=set)

    async def start(self, queue: QueueRecord) -> None:
        assert queue.index not in self.running
        assert queue.log is not None
        assert queue.addr is not None
        for fd in (queue.log.fd, *(fd for fd in (queue.kick, queue.call, queue.error) if fd >= 0)):
            os.fstat(fd)
        await asyncio.sleep(0)
        if self.fail:
            raise OperationError(-22, self.fail)
        self.running.add(queue.index)
        self.calls.append(
            f"{'recover' if queue.recover else 'start'} {queue.index} at {queue.base}"
        )

    async def stop(self, queue: QueueRecord, *, suspend: bool = False) -> int:
        await asyncio.sleep(0)
        self.running.remove(queue.index)
        self.calls.append(f"{'suspend' if suspend else 'stop'} {queue.index}")
        return self.base

    async def set_call(self, queue: QueueRecord) -> None:
        assert queue.index in self.running
        if queue.call >= 0:
            os.fstat(queue.call)
        await asyncio.sleep(0)
        self.calls.append(f"call {queue.index}")

    async def set_memory(self) -> None:
        for entry in self.record.memory:
            os.fstat(entry.fd)
        await asyncio.sleep(0)
        self.calls.append(f"memory {len(self.record.memory)}")

    async def update_iotlb(
        self,
        forgotten: Sequence[tuple[int, int]],
        learnt: Sequence[Translation],
        *,
        settle: bool = False,
    ) -> None:
        await asyncio.sleep(0)
        gone = [f"{first:#x}-{last:#x}" for first, last in forgotten]
        new = [f"{entry.iova:#x}" for entry in learnt]
        self.calls.append(" ".join(["settle" if settle else "iotlb", *gone, "+", *new]))

    async def begin_postcopy(self) -> int:
        self.calls.append("begin post-copy")
        return os.eventfd(0)

    def addresses(self) -> dict[int, int]:
        return {entry.region.guest: 0x1000 + entry.region.guest for entry in self.record.memory}

    async def end_postcopy(self) -> None:
        self.calls.append("end post-copy")

    async def abandon_postcopy(self) -> None:
        self.calls.append("abandon post-copy")

    async def resume(self, queue: QueueRecord) -> None:
        self.calls.append(f"resume {queue.index}")

    async def fault(self, queue: QueueRecord) -> None:
        self.calls.append(f"fault {queue.index}")

    async def drop(self) -> None:
        self.running.clear()
        self.calls.append("drop")


class Peer:
    """A front-end's end of a connection."""

    def __init__(self, sock: socket.socket, session: Session, host: FakeHost) -> None:
        self.socket = sock
        self.connection = Connection(sock)
        self.session = session
        self.host = host
        self.device = session._device
        self.warnings: list[str] = []

    async def send(
        self, request: int, payload: Payload | None = None, fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        await self.connection.send(request, payload, fds, flags=flags)

    async def ask(self, request: Request, payload: Payload | None = None) -> Payload:
        """Send a message that has a reply, and return that."""
        reply = MESSAGES[request].reply
        assert reply is not None
        await self.send(request, payload)
        message = await self.connection.receive()
        assert message is not None, self.warnings
        with message:
            assert (message.header.request, message.is_reply) == (request, True)
            return reply.from_bytes(message.payload, message.name)

    async def acknowledged(
        self, request: int, payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> int:
        """Send a message with need_reply, and return the result."""
        await self.send(request, payload, fds, NEED_REPLY)
        message = await self.connection.receive()
        assert message is not None, self.warnings
        assert (message.header.request, message.is_reply) == (request, True)
        return U64.from_bytes(message.payload, "result").value

    async def settle(self) -> None:
        """Return when all that was sent has been dealt with."""
        await self.ask(Request.GET_FEATURES)

    async def gone(self) -> str:
        """Return why the back-end has closed the connection."""
        async with asyncio.timeout(PATIENCE):
            message = await self.connection.receive()
        assert message is None
        return self.warnings[-1]

    async def negotiate(self, protocol: int = int(ProtocolFeature.REPLY_ACK)) -> None:
        await self.send(Request.SET_OWNER)
        await self.send(Request.SET_FEATURES, U64(FEATURES | Feature.PROTOCOL_FEATURES))
        await self.send(Request.SET_PROTOCOL_FEATURES, U64(protocol))

    async def share_memory(self) -> None:
        with memory() as fd:
            await self.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)), [fd.fileno()])

    async def describe_ring(self, index: int = 0, size: int = 128) -> None:
        await self.send(Request.SET_VRING_NUM, VringState(index, size))
        await self.send(Request.SET_VRING_BASE, VringState(index, 0))
        await self.send(Request.SET_VRING_ADDR, ring(index))

    async def kick(self, request: Request = Request.SET_VRING_KICK, index: int = 0) -> None:
        fd = os.eventfd(0)
        try:
            await self.send(request, VringFd(index), [fd])
        finally:
            os.close(fd)

    async def start_queue(self, index: int = 0) -> None:
        await self.describe_ring(index)
        await self.kick(index=index)
        await self.kick(Request.SET_VRING_CALL, index)
        await self.send(Request.SET_VRING_ENABLE, VringState(index, 1))
        await self.settle()
        assert index in self.host.running, self.warnings


def ring(index: int = 0) -> VringAddr:
    """Return addresses in guest memory, other ones for each of the first queues."""
    start = USER + index % 16 * 0x10000
    return VringAddr(index, 0, start, start + 0x9000, start + 0x8000, 0)


def memory(size: int = GUEST_SIZE) -> IO[bytes]:
    """Return a memfd as something that closes itself."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return os.fdopen(fd, "r+b", buffering=0)


@asynccontextmanager
async def connected() -> AsyncIterator[Peer]:
    """Run a session; on leaving, nothing of it may be left."""
    before = open_fds()
    ours, theirs = socket.socketpair()
    record = SessionRecord(1, "test")
    host = FakeHost(record)
    warnings: list[str] = []
    session = Session(Connection(ours), record, FakeDevice(), host, warn=warnings.append)
    task = asyncio.create_task(session.run())
    peer = Peer(theirs, session, host)
    peer.warnings = warnings
    try:
        yield peer
    finally:
        peer.connection.close()
        async with asyncio.timeout(PATIENCE):
            await task
    assert host.calls[-1] == "drop"
    assert open_fds() == before
