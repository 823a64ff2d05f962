"""One front-end's connection: what each message does to the session's record and its queues.

A queue is served while its size and addresses are known, there is memory, it is started
(SET_VRING_KICK) and it is enabled. Every message that changes one of these goes the same way: stop
the queue if it runs, change the record, start the queue if it is ready. Stopping waits until no
request is in flight, so nothing is ever changed under a reactor's feet.

Nothing here knows what device it is (see Device) or where queues are served (see QueueHost).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from reactor.errors import OperationError
from reactor.operations import FileDescriptors
from vhost.backend_channel import send_request
from vhost.connection import Connection, Message, encode
from vhost.descriptors import (
    check_eventfd,
    check_file,
    check_memory,
    check_stream,
    forget_log,
    log_of,
    make_inflight,
    open_inflight,
)
from vhost.interfaces import Device, QueueHost
from vhost.journal import Journal, NoJournal
from vhost.messages import (
    MAX_QUEUE_SIZE,
    MAX_QUEUES,
    MESSAGES,
    REPLY,
    U64,
    BackendRequest,
    Config,
    Feature,
    Inflight,
    Log,
    MemoryTable,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Region,
    Request,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
    check_overlap,
    decode_request,
)
from vhost.record import (
    DirtyLog,
    MappedRegion,
    QueueRecord,
    SessionRecord,
    close_fds,
    in_table,
    ring_parts,
)

MAX_MEM_SLOTS = 509  # what the kernel's vhost and rust-vmm allow

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

MAX_STATUS = 0xFF  # the device status has eight bits: virtio 1.2, section 2.1

# Offered for every device, since they are the protocol's own.
TRANSPORT_FEATURES = Feature.PROTOCOL_FEATURES | Feature.LOG_ALL

NO_FDS = FileDescriptors()

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reply:
    """What a message is answered with; the descriptors are closed once they are sent."""

    payload: Payload
    fds: list[int]


# Takes the payload of messages that have one, and the descriptors of messages that may have some.
Handler = Callable[..., Awaitable[Payload | Reply | None]]


class Session:
    """The state machine of one connection; ``run`` is its life."""

    def __init__(
        self,
        connection: Connection,
        record: SessionRecord,
        device: Device,
        host: QueueHost,
        warn: Callable[[str], None] = log.warning,
        journal: Journal | None = None,
    ) -> None:
        """``warn`` writes a line to the log and limits how many."""
        self.record = record
        self.peer_pid = connection.peer()[0]
        self._connection = connection
        self._device = device
        self._host = host
        self._warn = warn
        self._journal = NoJournal(connection) if journal is None else journal
        self.resumed = asyncio.Event()  # what was served before is served again
        self.on_features: Callable[[], None] = lambda: None  # called when others were negotiated
        self._handlers: dict[int, Handler] = {
            request: getattr(self, f"_{Request(request).name.lower()}") for request in MESSAGES
        }

    async def run(self, *, resume: bool = False, applied: bool = False) -> None:
        """Serve messages until the connection ends, for whatever reason; leaves nothing behind.

        ``resume``: the record is that of a session whose control process has died; ``applied``: the
        first message is in it, and only finished.
        """
        try:
            if resume:
                await self._resume(applied=applied)
            while (message := await self._connection.receive()) is not None:
                with message:
                    await self._serve(message)
        except (ProtocolError, OSError) as error:
            if not self._connection.closed:  # by us, that is
                self._warn(f"connection closed: {str(error) or type(error).__name__}")
        finally:
            self._connection.close()
            await asyncio.shield(self._release())

    def queue_broke(self, index: int, text: str) -> None:
        """Take note that queue ``index`` is served no more because its driver broke a rule."""
        queue = self.record.queues.get(index)
        if queue is not None and queue.running:
            queue.broken = text
            self._warn(f"queue {index} stopped: {text}")

    def config_changed(self) -> None:
        """Let the front-end know that it should read the configuration space again."""
        record = self.record
        if record.backend_channel >= 0 and record.protocol_features & ProtocolFeature.CONFIG:
            try:
                send_request(record.backend_channel, BackendRequest.CONFIG_CHANGE_MSG)
            except OSError as error:
                self._warn(f"requests to the front-end end here: {error}")
                record.drop_backend_channel()

    async def _resume(self, *, applied: bool) -> None:
        """Have the queues served that were, and end a message that a dead process has begun."""
        for queue in self.record.queues.values():
            if queue.running:
                try:
                    await self._host.start(queue)
                except (OperationError, OSError) as error:
                    self.queue_broke(queue.index, f"no reactor can serve it: {error}")
                    queue.running = False
                queue.recover = False
        self.resumed.set()
        if applied and (message := await self._connection.receive()) is not None:
            with message:
                await self._until_answered(message, self._start_all())

    async def _start_all(self) -> None:
        for queue in self.record.queues.values():
            await self._start_if_ready(queue)

    async def _release(self) -> None:
        await self._host.drop()
        self._journal.drop()
        self.record.close()

    async def _serve(self, message: Message) -> None:
        """Carry out one message and answer it; raise ProtocolError if the connection must end."""
        await self._until_answered(message, self._carry_out(message))

    async def _carry_out(self, message: Message) -> Payload | Reply | None:
        request = message.header.request
        if message.is_reply:
            raise ProtocolError(message.name, "flags", hex(message.header.flags), "no reply")
        payload = decode_request(request, message.payload, len(message.fds))
        self._check_negotiated(request)
        arguments: list[Any] = [] if payload is None else [payload]
        if MESSAGES[request].fds[1]:
            arguments.append(message.fds)
        return await self._handlers[request](*arguments)

    async def _until_answered(
        self, message: Message, work: Awaitable[Payload | Reply | None]
    ) -> None:
        try:
            answer = await work
        except ProtocolError as error:
            await self._fail(message, error)
        except (OperationError, OSError) as error:
            await self._fail(message, ProtocolError(message.name, "request", "failed", str(error)))
        else:
            await self._answer(message, answer)

    async def _fail(self, message: Message, error: ProtocolError) -> None:
        """Tell the front-end, if it wants to know; raise the error if it ends the connection."""
        with suppress(OSError):
            await self._journal.finish(message, self._acknowledgement(message, 1))
        if error.fatal:
            raise error
        self._warn(f"refused: {error}")

    def _check_negotiated(self, request: int) -> None:
        needs = MESSAGES[request].needs
        if needs is not None and not self.record.protocol_features & needs:
            name = Request(request).name
            raise ProtocolError(name, "request", request, f"only after {needs.name} is negotiated")

    async def _answer(self, message: Message, answer: Payload | Reply | None) -> None:
        if answer is None:
            await self._journal.finish(message, self._acknowledgement(message, 0))
            return
        reply = answer if isinstance(answer, Reply) else Reply(answer, [])
        try:
            encoded = encode(message.header.request, reply.payload, REPLY)
            await self._journal.finish(message, encoded, reply.fds)
        finally:
            close_fds(reply.fds)

    def _acknowledgement(self, message: Message, result: int) -> bytes:
        """Return what answers need_reply ("REPLY_ACK"), 0 for success; nothing if not asked for.

        Messages with a reply of their own have none.
        """
        known = MESSAGES.get(message.header.request)
        own_reply = known is not None and known.reply is not None
        asked = message.wants_reply and self.record.protocol_features & ProtocolFeature.REPLY_ACK
        if own_reply or not asked:
            return b""
        return encode(message.header.request, U64(result), REPLY)

    # Queues: stop, change, start.

    @asynccontextmanager
    async def _changing(self, queues: Iterable[QueueRecord]) -> AsyncIterator[None]:
        """Keep queues from running while the body changes what they depend on."""
        for queue in queues:
            await self._stop(queue)
        yield
        for queue in self.record.queues.values():
            await self._start_if_ready(queue)

    async def _stop(self, queue: QueueRecord) -> None:
        if queue.running:
            queue.base = await self._host.stop(queue)
            queue.running, queue.broken = False, ""
            await self._journal.save()

    async def _start_if_ready(self, queue: QueueRecord) -> None:
        if queue.running or not self.record.is_ready(queue):
            return
        self._check_ring(queue)
        self._choose_log(queue)
        queue.running = True
        await self._journal.save(applied=True)
        try:
            await self._host.start(queue)
        except BaseException:
            queue.running = False
            raise
        queue.recover = False

    def _check_ring(self, queue: QueueRecord) -> None:
        """Raise ProtocolError unless a ring is in memory and its size is one of its format."""
        name, packed = f"queue {queue.index}", self.record.packed
        if not packed and queue.size & (queue.size - 1):
            raise ProtocolError(name, "size", queue.size, "a power of two, of a split ring")
        if not packed and queue.base > 0xFFFF:
            raise ProtocolError(name, "base", queue.base, "at most 65535, of a split ring")
        regions = self.record.table().regions
        for part, (address, length) in ring_parts(queue, packed=packed).items():
            if not any(region.holds(address, length) for region in regions):
                where = f"{address:#x} + {length:#x}"
                raise ProtocolError(name, f"{part} ring", where, "within one region of memory")
        if self.record.logging is not None:
            check_dirty_log(self.record.logging, regions, name)
            if queue.addr is not None and queue.addr.flags & VringAddr.F_LOG:
                _, size = ring_parts(queue, packed=packed)["used"]
                check_log_end(self.record.logging, queue.addr.log + size, name)

    def _choose_log(self, queue: QueueRecord) -> None:
        """Give a queue its in-flight log, with what another process began or with nothing."""
        area = self.record.inflight
        if area is None or queue.index >= area.queues:
            if self.record.own_inflight is None:
                self.record.own_inflight = make_inflight(MAX_QUEUES, MAX_QUEUE_SIZE, packed=True)
            area = self.record.own_inflight
        if queue.size > area.queue_size:
            allowed = f"at most {area.queue_size}, the size in SET_INFLIGHT_FD"
            raise ProtocolError(f"queue {queue.index}", "size", queue.size, allowed)
        queue.log = log_of(area, queue.index)
        queue.recover = queue.recover and area.shared
        if not queue.recover:
            forget_log(queue.log)

    async def _set_memory(
        self, kept: list[MappedRegion], added: Iterable[Region] = (), fds: FileDescriptors = NO_FDS
    ) -> None:
        """Use the regions ``kept`` and ``added``, whose descriptors are ``fds``, and no others.

        The descriptors of the others are closed when nobody has them mapped any more.
        """
        record, former = self.record, self.record.memory
        table = MemoryTable((*(entry.region for entry in kept), *added))
        if record.logging is not None:
            check_dirty_log(record.logging, table.regions, "memory")
        moved = [
            queue
            for queue in record.queues.values()
            if not in_table(queue, table, packed=record.packed)
        ]
        async with self._changing(moved):
            new = [MappedRegion(region, fds.take(i)) for i, region in enumerate(added)]
            record.memory = kept + new
            try:
                await self._host.set_memory()
            finally:
                still_used = {entry.fd for entry in kept}
                close_fds([entry.fd for entry in former if entry.fd not in still_used])

    # One handler for each message of MESSAGES.

    async def _get_features(self) -> U64:
        return U64(self._device.features | TRANSPORT_FEATURES)

    async def _set_features(self, payload: U64) -> None:
        offered = self._device.features | TRANSPORT_FEATURES
        if payload.value & ~offered:
            value = hex(payload.value & ~offered)
            raise ProtocolError("SET_FEATURES", "features", value, f"only of {offered:#x}")
        if payload.value != self.record.features:
            async with self._changing(self.record.queues.values()):
                self.record.features = payload.value
            self.on_features()

    async def _get_protocol_features(self) -> U64:
        return U64(PROTOCOL_FEATURES)

    async def _set_protocol_features(self, payload: U64) -> None:
        unknown = payload.value & ~PROTOCOL_FEATURES
        if unknown:
            allowed = f"only of {PROTOCOL_FEATURES:#x}"
            raise ProtocolError("SET_PROTOCOL_FEATURES", "features", hex(unknown), allowed)
        self.record.protocol_features = payload.value

    async def _set_owner(self) -> None:
        """Nothing depends on it: the connection is the session."""

    async def _reset_owner(self) -> None:
        """Stop all rings and keep the rest, as the specification recommends."""
        for queue in self.record.queues.values():
            await self._stop(queue)
            queue.drop_kick()
            queue.enabled = None

    async def _reset_device(self) -> None:
        """Forget what a driver has set up; the front-end's memory and descriptors stay."""
        await self._reset_status()
        for queue in self.record.queues.values():
            queue.base = 0

    async def _reset_status(self) -> None:
        """Stop all queues where they are: QEMU 7.2 resets by SET_STATUS before it asks for that."""
        await self._reset_owner()
        for queue in self.record.queues.values():
            queue.recover = False
        self.record.status, self.record.written = 0, {}

    async def _set_status(self, payload: U64) -> None:
        if payload.value > MAX_STATUS:
            raise ProtocolError("SET_STATUS", "status", hex(payload.value), f"<= {MAX_STATUS:#x}")
        if payload.value == 0:
            await self._reset_status()
        self.record.status = payload.value

    async def _get_status(self) -> U64:
        return U64(self.record.status)

    async def _get_queue_num(self) -> U64:
        return U64(MAX_QUEUES)

    async def _get_max_mem_slots(self) -> U64:
        return U64(MAX_MEM_SLOTS)

    async def _set_mem_table(self, payload: MemoryTable, fds: FileDescriptors) -> None:
        for region, fd in zip(payload.regions, fds, strict=True):
            check_memory(fd, region, "SET_MEM_TABLE")
        await self._set_memory([], payload.regions, fds)

    async def _add_mem_reg(self, payload: SingleRegion, fds: FileDescriptors) -> None:
        name, memory, region = "ADD_MEM_REG", self.record.memory, payload.region
        if len(memory) >= MAX_MEM_SLOTS:
            raise ProtocolError(name, "number of regions", len(memory) + 1, f"<= {MAX_MEM_SLOTS}")
        check_overlap(region, self.record.table().regions, name, "region")
        check_memory(fds[0], region, name)
        await self._set_memory(memory, [region], fds)

    async def _rem_mem_reg(self, payload: SingleRegion, _: FileDescriptors) -> None:
        """Remove the region with the same addresses and size; the offset is ignored."""
        asked = payload.region
        kept = [
            entry
            for entry in self.record.memory
            if replace(entry.region, offset=asked.offset) != asked
        ]
        if len(kept) == len(self.record.memory):
            where = f"{asked.guest:#x} + {asked.size:#x}"
            raise ProtocolError("REM_MEM_REG", "region", where, "one that was added")
        await self._set_memory(kept)

    async def _set_log_base(self, payload: Log, fds: FileDescriptors) -> U64:
        """Log to other memory from now on; answers when nothing is logged to the former."""
        check_file(fds[0], payload.offset, payload.size, "SET_LOG_BASE")
        dirty_log = DirtyLog(fds[0], payload.offset, payload.size)
        check_dirty_log(dirty_log, self.record.table().regions, "SET_LOG_BASE")
        fds.take(0)
        former, self.record.dirty_log = self.record.dirty_log, dirty_log
        try:
            await self._host.set_memory()
        finally:
            close_fds(() if former is None else (former.fd,))
        return U64(0)

    async def _set_log_fd(self, fds: FileDescriptors) -> None:
        check_eventfd(fds[0], "SET_LOG_FD")
        former, self.record.log_event = self.record.log_event, fds.take(0)
        try:
            await self._host.set_memory()
        finally:
            close_fds((former,))

    async def _set_vring_num(self, payload: VringState) -> None:
        queue = self.record.queue(payload.index)
        async with self._changing([queue]):
            queue.size = payload.num

    async def _set_vring_base(self, payload: VringState) -> None:
        queue = self.record.queue(payload.index)
        async with self._changing([queue]):
            queue.base = payload.num

    async def _set_vring_addr(self, payload: VringAddr) -> None:
        if payload.flags & VringAddr.F_LOG and not self.record.features & Feature.LOG_ALL:
            raise ProtocolError("SET_VRING_ADDR", "flags", payload.flags, "no log was negotiated")
        queue = self.record.queue(payload.index)
        async with self._changing([queue] if queue.addr != payload else []):
            queue.addr = payload

    async def _get_vring_base(self, payload: VringState) -> VringState:
        queue = self.record.queue(payload.index)
        await self._stop(queue)
        queue.drop_kick()
        return VringState(queue.index, queue.base)

    async def _set_vring_enable(self, payload: VringState) -> None:
        queue = self.record.queue(payload.index)
        async with self._changing([] if payload.num else [queue]):
            queue.enabled = bool(payload.num)

    async def _set_vring_kick(self, payload: VringFd, fds: FileDescriptors) -> None:
        queue = self.record.queue(payload.index)
        check_vring_fd(fds, "SET_VRING_KICK")
        async with self._changing([queue]):
            queue.drop_kick()
            queue.kick, queue.started = fds.take(0) if fds else -1, True

    async def _set_vring_call(self, payload: VringFd, fds: FileDescriptors) -> None:
        queue = self.record.queue(payload.index)
        check_vring_fd(fds, "SET_VRING_CALL")
        former, queue.call = queue.call, fds.take(0) if fds else -1
        try:
            # Without a drain: front-ends change it whenever the guest masks an interrupt.
            if queue.running:
                await self._host.set_call(queue)
        finally:
            close_fds((former,))

    async def _set_vring_err(self, payload: VringFd, fds: FileDescriptors) -> None:
        queue = self.record.queue(payload.index)
        check_vring_fd(fds, "SET_VRING_ERR")
        async with self._changing([queue]):
            close_fds((queue.error,))
            queue.error = fds.take(0) if fds else -1

    async def _set_backend_req_fd(self, fds: FileDescriptors) -> None:
        check_stream(fds[0], "SET_BACKEND_REQ_FD")
        self.record.drop_backend_channel()
        self.record.backend_channel = fds.take(0)

    async def _get_config(self, payload: Config) -> Config:
        """Answer with exactly as many bytes as are asked for: zeroes past the structure."""
        end = payload.offset + payload.size
        config = self._device.config(self.record.features, self.record.written)
        data = config[payload.offset : end].ljust(payload.size, b"\0")
        return replace(payload, data=data)

    async def _set_config(self, payload: Config) -> None:
        record, migration = self.record, payload.flags == Config.MIGRATION
        changes = self._device.accept_config(
            payload.offset, payload.data, record.features, migration=migration
        )
        if changes.items() - record.written.items():
            async with self._changing(record.queues.values()):
                record.written |= changes

    async def _get_inflight_fd(self, payload: Inflight) -> Reply:
        area = make_inflight(payload.num_queues, payload.queue_size, packed=self.record.packed)
        size = area.queues * area.stride
        return Reply(replace(payload, mmap_size=size, mmap_offset=0), [area.fd])

    async def _set_inflight_fd(self, payload: Inflight, fds: FileDescriptors) -> None:
        area = open_inflight(payload, fds[0], "SET_INFLIGHT_FD", packed=self.record.packed)
        async with self._changing(self.record.queues.values()):
            if self.record.inflight is not None:
                close_fds((self.record.inflight.fd,))
            self.record.inflight = area
            fds.take(0)
            for index in range(area.queues):
                self.record.queue(index).recover = True


def check_dirty_log(dirty_log: DirtyLog, regions: Iterable[Region], message: str) -> None:
    """Raise ProtocolError unless a dirty log has a bit for each page of some regions."""
    for region in regions:
        check_log_end(dirty_log, region.guest + region.size, message)


def check_log_end(dirty_log: DirtyLog, end: int, message: str) -> None:
    """Raise ProtocolError unless a dirty log has bits up to guest-physical address ``end``."""
    if end > dirty_log.end:
        allowed = f"a bit for each {DirtyLog.PAGE} bytes up to guest address {end:#x}"
        raise ProtocolError(message, "log size", dirty_log.size, allowed)


def check_vring_fd(fds: FileDescriptors, message: str) -> None:
    """Raise ProtocolError unless the descriptor, if there is one, is an eventfd."""
    for fd in fds:
        check_eventfd(fd, message)
