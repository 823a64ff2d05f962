"""What a device of ours knows of its driver, as it travels with a migration.

A front-end fetches it through a pipe when all rings are stopped, and the next back-end gets it the
same way (vhost-user, "Migrating back-end state"). Nothing is in flight then, or it stands in the
front-end's in-flight log; what is left is what the driver has written into the configuration space,
with the features without which that means nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

import msgspec

from reactor.operations import FileDescriptors
from vhost.descriptors import check_pipe
from vhost.interfaces import Device
from vhost.messages import U64, ProtocolError, StateTransfer
from vhost.record import SessionRecord

MAX_STATE = 64 << 10  # bytes
TIME_LIMIT = 10.0  # seconds for a transfer, once the front-end asks how it went
NO_FD = 1 << 8  # of the reply: the front-end's descriptor is used
FAILED = 1


class State(msgspec.Struct, forbid_unknown_fields=True):
    """The contents, in MessagePack."""

    version: Literal[1]
    device: int  # virtio_id of the device that it is the state of
    features: int
    written: dict[int, int]

    def check(self, device: Device, queues: int) -> None:
        """Raise ProtocolError or ValueError unless a driver of ``device`` can have this state."""
        if self.device != device.virtio_id:
            raise ValueError(f"it is of a device of type {self.device}, not {device.virtio_id}")
        if self.features < 0:
            raise ValueError(f"features are {self.features}")
        for offset, value in self.written.items():
            if offset < 0 or not 0 <= value <= 0xFF:
                raise ValueError(f"byte {offset} of the configuration space is {value}")
            device.accept_config(offset, bytes([value]), self.features, queues, migration=False)


class DeviceState:
    """The transfers of one session, with a method for each message about them."""

    def __init__(self, record: SessionRecord, device: Device, warn: Callable[[str], None]) -> None:
        self._record = record
        self._device = device
        self._warn = warn
        self._transfer: asyncio.Task[bool] | None = None

    def close(self) -> None:
        """End what is under way."""
        if self._transfer is not None:
            self._transfer.cancel()
            self._transfer = None

    async def _set_device_state_fd(self, payload: StateTransfer, fds: FileDescriptors) -> U64:
        check_pipe(fds[0], "SET_DEVICE_STATE_FD")
        self.close()
        if any(queue.started for queue in self._record.queues.values()):
            self._warn("refused: SET_DEVICE_STATE_FD: not all rings are stopped")
            return U64(NO_FD | FAILED)
        transfer = self._save if payload.direction == StateTransfer.SAVE else self._load
        fd = fds.take(0)
        os.set_blocking(fd, False)
        self._transfer = asyncio.get_running_loop().create_task(self._run(transfer, fd))
        self._transfer.add_done_callback(lambda _: os.close(fd))
        return U64(NO_FD)

    async def _check_device_state(self) -> U64:
        """Answer 0 if the last transfer has gone well, once it is over."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            return U64(FAILED)
        await asyncio.wait({transfer}, timeout=TIME_LIMIT)
        transfer.cancel()  # changes nothing if it is done
        return U64(0 if transfer.done() and transfer.result() else FAILED)

    async def _run(self, transfer: Callable[[int], Awaitable[None]], fd: int) -> bool:
        try:
            await transfer(fd)
        except (OSError, ValueError, msgspec.DecodeError, ProtocolError) as error:
            self._warn(f"the device's state was not transferred: {error}")
            return False
        return True

    async def _save(self, fd: int) -> None:
        record = self._record
        state = State(1, self._device.virtio_id, record.features, dict(record.written))
        data = memoryview(msgspec.msgpack.encode(state))
        loop = asyncio.get_running_loop()
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                await ready(fd, loop.add_writer, loop.remove_writer)

    async def _load(self, fd: int) -> None:
        data = bytearray()
        loop = asyncio.get_running_loop()
        while len(data) <= MAX_STATE:
            try:
                part = os.read(fd, MAX_STATE + 1 - len(data))
            except BlockingIOError:
                await ready(fd, loop.add_reader, loop.remove_reader)
                continue
            if not part:
                break
            data += part
        else:
            raise ValueError(f"it has more than {MAX_STATE} bytes")
        state = msgspec.msgpack.decode(bytes(data), type=State)
        state.check(self._device, self._record.max_queues)
        if any(queue.started for queue in self._record.queues.values()):
            raise ValueError("a ring was started meanwhile")
        self._record.written = state.written


async def ready(fd: int, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
    """Wait until a descriptor can be read or written."""
    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake() -> None:
        with suppress(asyncio.InvalidStateError):
            waiting.set_result(None)

    watch(fd, wake)
    try:
        await waiting
    finally:
        unwatch(fd)
