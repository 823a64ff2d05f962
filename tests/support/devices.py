"""Block devices written in Python; loaded with ``--load tests.support.devices``."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time

from bdev.device import Device, python_device


@python_device("memory")
class Memory(Device):
    """Keeps what is written, in this process or in a file that outlives it."""

    def __init__(self, blocks: int, block_size: int = 512, path: str | None = None) -> None:
        self.block_size = block_size
        self.size = blocks * block_size
        self.fd = os.memfd_create("memory") if path is None else os.open(path, os.O_RDWR)
        os.ftruncate(self.fd, self.size)

    async def read(self, offset: int, length: int) -> bytes:
        await asyncio.sleep(0)
        return os.pread(self.fd, length, offset)

    async def write(self, offset: int, data: bytes) -> None:
        await asyncio.sleep(0)
        os.pwrite(self.fd, data, offset)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    def close(self) -> None:  # type: ignore[override]  # may be an ordinary function
        os.close(self.fd)


@python_device("keeping")
class Keeping(Memory):
    """As Memory, but it has no use for what a guest does not need any more."""

    discard = Device.discard


@python_device("ramp")
class Ramp(Device):
    """The bytes of each block say which one it is."""

    def __init__(self, blocks: int) -> None:
        self.size = blocks * 512

    def read(self, offset: int, length: int) -> bytes:  # type: ignore[override]
        first, count = offset // 512, length // 512
        return b"".join(bytes([block % 251]) * 512 for block in range(first, first + count))


@python_device("faulty")
class Faulty(Device):
    """What happens when a block is read depends on its number."""

    size = 512 * 512

    async def read(self, offset: int, length: int) -> bytes:
        match offset // 512:
            case 10:
                raise OSError(errno.ENXIO, "no such block")
            case 11:
                raise ZeroDivisionError("a mistake")
            case 12:
                return bytes(length - 1)
            case 13:
                return "no bytes"  # type: ignore[return-value]
            case 14:
                await asyncio.Event().wait()
        return bytes(length)


@python_device("harmful")
class Harmful(Device):
    """As Faulty, but its process suffers."""

    size = 512 * 512

    async def read(self, offset: int, length: int) -> bytes:
        match offset // 512:
            case 10:
                time.sleep(3600)  # noqa: ASYNC251 - that is the point
            case 11:
                os._exit(3)
            case 12:
                while True:  # will not be cancelled
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(3600)
        return bytes(length)


@python_device("slow")
class Slow(Device):
    """A write takes for ever, unless it is cancelled."""

    size = 512 * 512

    async def read(self, _offset: int, length: int) -> bytes:
        return bytes(length)

    async def write(self, _offset: int, _data: bytes) -> None:
        await asyncio.Event().wait()


@python_device("growing")
class Growing(Device):
    """Has twice its size from the first read on."""

    size = 64 * 512

    async def read(self, _offset: int, length: int) -> bytes:
        self.size = 128 * 512
        return bytes(length)


@python_device("shapeless")
class Shapeless(Device):
    """Has no size."""

    async def read(self, _offset: int, length: int) -> bytes:
        return bytes(length)


@python_device("unreadable")
class Unreadable(Device):
    """Has no method read."""

    size = 4096
