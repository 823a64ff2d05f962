"""One front-end's connection: each message changes the session's record and what is served.

vhost.rings has the messages about rings, vhost.shared_memory those about memory; the others are
here. Nothing knows what device it is (see Device) or where queues are served (see QueueHost).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from reactor.errors import OperationError
from reactor.operations import FileDescriptors
from vhost import postcopy
from vhost.backend_channel import RequestChannel
from vhost.connection import Connection, Message, Reply, encode
from vhost.descriptors import check_stream
from vhost.device_state import DeviceState
from vhost.inband import InBand
from vhost.interfaces import Device, QueueHost
from vhost.journal import Journal, NoJournal
from vhost.messages import (
    MESSAGES,
    REPLY,
    U64,
    BackendRequest,
    Config,
    Feature,
    NoPayload,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Request,
    decode_request,
)
from vhost.postcopy import PostCopy
from vhost.record import SessionRecord, close_fds
from vhost.rings import Rings
from vhost.shared_memory import SharedMemory
from vhost.translation import Translator

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | postcopy.features()
)

# Features that must not be negotiated without others: a channel for messages that are confirmed; a
# log for what is in flight.
NEEDS = {
    ProtocolFeature.INBAND_NOTIFICATIONS: ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK,
    ProtocolFeature.GET_VRING_BASE_INFLIGHT: ProtocolFeature.INFLIGHT_SHMFD,
}

# Where the configuration space begins for front-ends on older versions of rust-vmm's library, among
# them Cloud Hypervisor up to v46: where virtio-mmio has it (virtio 1.2, section 4.2.2).
OLD_CONFIG_OFFSET = 0x100

MAX_STATUS = 0xFF  # the device status has eight bits: virtio 1.2, section 2.1

# Offered for every device, since they are the protocol's own.
TRANSPORT_FEATURES = Feature.PROTOCOL_FEATURES | Feature.LOG_ALL | Feature.ACCESS_PLATFORM

NO_ANSWER = Reply(NoPayload(), [])  # not even to say that all is well

log = logging.getLogger(__name__)


# Takes the payload of messages that have one, and the descriptors of messages that may have some.
Handler = Callable[..., Awaitable[Payload | Reply | None]]


def find_handlers(*parts: object) -> dict[int, Handler]:
    """Return by request what carries it out: a method of its name, such as ``_set_owner``."""
    handlers = {}
    for request in MESSAGES:
        name = f"_{Request(request).name.lower()}"
        (handlers[request],) = (getattr(part, name) for part in parts if hasattr(part, name))
    return handlers


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
        self.on_reset: Callable[[str], None] = lambda _by: None  # called with the message's name
        self._channel = RequestChannel(record, warn)
        self._inband = InBand(record, self._channel)
        self._rings = Rings(record, host, self._inband, self._journal)
        memory = SharedMemory(record, host, self._rings.changing)
        self._state = DeviceState(record, device, warn)
        self._translator = Translator(record, host, self._rings.changing, self._channel, warn)
        self._rings.on_untranslated = self._translator.need_ring
        self._rings.on_broken = self.queue_broke
        self.postcopy = PostCopy(record, host, self._rings, connection, warn)
        self._handlers = find_handlers(
            *(self, self._rings, memory, self._state, self._translator, self.postcopy)
        )

    async def run(self, *, resume: bool = False, applied: bool = False) -> None:
        """Serve messages until the connection ends, for whatever reason; leaves nothing behind.

        ``resume``: the record is that of a session whose control process has died; ``applied``: the
        first message is in it, and only finished.
        """
        try:
            if resume:
                await self._rings.resume()
                self.resumed.set()
            if applied and (message := await self._connection.receive()) is not None:
                with message:
                    await self._until_answered(message, self._rings.start_all())
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
        if self._channel.is_open and self.record.protocol_features & ProtocolFeature.CONFIG:
            self._channel.tell(BackendRequest.CONFIG_CHANGE_MSG)

    def queue_waits(self, index: int, iova: int, size: int, access: int) -> None:
        """Take note that the next request of queue ``index`` waits for a translation."""
        self._translator.need(index, iova, size, access)

    async def _release(self) -> None:
        self._translator.close()
        self.postcopy.close()
        self._inband.close()
        self._state.close()
        self._channel.close()
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
        if await self.postcopy.confirm(message):
            return NO_ANSWER
        payload = decode_request(request, message.payload, len(message.fds))
        self._check_negotiated(request)
        self._check_index(message.name, payload)
        arguments: list[Any] = [] if payload is None else [payload]
        if MESSAGES[request].fds[1]:
            arguments.append(message.fds)
        answer = await self._handlers[request](*arguments)
        return answer or self.postcopy.addresses(request, payload)

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

    def _check_index(self, message: str, payload: Payload | None) -> None:
        index, limit = getattr(payload, "index", 0), self.record.max_queues
        if index >= limit:
            allowed = f"less than {limit}: more need INBAND_NOTIFICATIONS, a channel, no eventfds"
            raise ProtocolError(message, "index", index, allowed)

    async def _answer(self, message: Message, answer: Payload | Reply | None) -> None:
        if answer is NO_ANSWER:
            await self._journal.finish(message, b"")
            return
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
        request, protocol = message.header.request, self.record.protocol_features
        # Of this one the specification has a reply without that feature ("IOMMU support").
        can = protocol & ProtocolFeature.REPLY_ACK or request == Request.IOTLB_MSG
        if own_reply or not message.wants_reply or not can:
            return b""
        return encode(request, U64(result), REPLY)

    # --- messages

    async def _get_features(self) -> U64:
        return U64(self._device.features | TRANSPORT_FEATURES)

    async def _set_features(self, payload: U64) -> None:
        offered = self._device.features | TRANSPORT_FEATURES
        if payload.value & ~offered:
            value = hex(payload.value & ~offered)
            raise ProtocolError("SET_FEATURES", "features", value, f"only of {offered:#x}")
        if payload.value != self.record.features:
            translated = self.record.translated
            async with self._rings.changing(self.record.queues.values()):
                self.record.features = payload.value
                if self.record.translated != translated:
                    await self._host.set_memory()
            self.on_features()

    async def _get_protocol_features(self) -> U64:
        return U64(PROTOCOL_FEATURES)

    async def _set_protocol_features(self, payload: U64) -> None:
        unknown = payload.value & ~PROTOCOL_FEATURES
        if unknown:
            allowed = f"only of {PROTOCOL_FEATURES:#x}"
            raise ProtocolError("SET_PROTOCOL_FEATURES", "features", hex(unknown), allowed)
        for feature, needed in NEEDS.items():
            if payload.value & feature and needed & ~payload.value:
                allowed = (
                    f"{feature.name} only with {' and '.join(one.name or '' for one in needed)}"
                )
                value = hex(payload.value)
                raise ProtocolError("SET_PROTOCOL_FEATURES", "features", value, allowed)
        self.record.protocol_features = payload.value

    async def _set_owner(self) -> None:
        """Nothing depends on it: the connection is the session."""

    async def _reset_owner(self) -> None:
        """Stop all rings and keep the rest, as the specification recommends."""
        await self._stop_all("RESET_OWNER")

    async def _stop_all(self, by: str) -> None:
        """Carry out a message that resets more or less; of what was never used, nobody is told."""
        used = self.record.status or any(queue.started for queue in self.record.queues.values())
        for queue in self.record.queues.values():
            await self._rings.stop(queue)
            queue.drop_kick()
            queue.enabled = None
        if used:
            self.on_reset(by)

    async def _reset_device(self) -> None:
        """Forget what a driver has set up; the front-end's memory and descriptors stay."""
        await self._reset_status("RESET_DEVICE")
        for queue in self.record.queues.values():
            queue.base = 0

    async def _reset_status(self, by: str) -> None:
        """Stop all queues where they are: QEMU 7.2 resets by SET_STATUS before it asks for that."""
        await self._stop_all(by)
        for queue in self.record.queues.values():
            queue.recover = False
        self.record.status, self.record.written = 0, {}

    async def _set_status(self, payload: U64) -> None:
        if payload.value > MAX_STATUS:
            raise ProtocolError("SET_STATUS", "status", hex(payload.value), f"<= {MAX_STATUS:#x}")
        if payload.value == 0:
            await self._reset_status("SET_STATUS")
        self.record.status = payload.value

    async def _get_status(self) -> U64:
        return U64(self.record.status)

    async def _get_queue_num(self) -> U64:
        return U64(self.record.max_queues)

    async def _set_backend_req_fd(self, fds: FileDescriptors) -> None:
        check_stream(fds[0], "SET_BACKEND_REQ_FD")
        self._channel.use(fds.take(0))
        self._inband.channel_changed()

    async def _get_config(self, payload: Config) -> Config:
        """Answer with exactly as many bytes as are asked for: zeroes past the structure."""
        start = payload.offset - (OLD_CONFIG_OFFSET if payload.offset >= OLD_CONFIG_OFFSET else 0)
        end = start + payload.size
        record = self.record
        config = self._device.config(record.features, record.written, record.max_queues)
        data = config[start:end].ljust(payload.size, b"\0")
        return replace(payload, data=data)

    async def _set_config(self, payload: Config) -> None:
        record, migration = self.record, payload.flags == Config.MIGRATION
        changes = self._device.accept_config(
            payload.offset, payload.data, record.features, record.max_queues, migration=migration
        )
        if changes.items() - record.written.items():
            async with self._rings.changing(record.queues.values()):
                record.written |= changes
