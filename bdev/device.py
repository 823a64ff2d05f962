"""What a block device is that a user writes in Python.

    from bdev.device import Device, python_device

    @python_device("ramp")
    class Ramp(Device):
        def __init__(self, megabytes: int = 1) -> None:
            self.size = megabytes << 20

        async def read(self, offset: int, length: int) -> bytes:
            return bytes(at % 251 for at in range(offset, offset + length))

in a module that ``vhost-reactor start --load MODULE`` names, then

    vhost-reactor rpc bdev_python_create name=R0 device=ramp args='{"megabytes":64}'

It runs in a process of its own; see docs/bdev.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Buffer = bytes | bytearray | memoryview

ZEROES = 1 << 18  # bytes that write_zeroes() writes at a time


class Device:
    """The base of a device. ``size`` is to be set by ``__init__``, which gets ``args``.

    Offsets and lengths are bytes, multiples of ``block_size`` and inside of the device; a read or a
    write has at most 256 KiB. Methods may be ordinary functions, which have every other request to
    this device wait. Several run at a time, in any order. A request fails with the errno of an
    OSError that its method raises, with EIO for any other exception, and with ETIMEDOUT if the
    method does not return in time: then it is cancelled, and must change nothing any more.
    """

    size: int  # bytes
    block_size: int = 512  # or 4096
    readonly: bool = False  # so is a device without ``write``

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes."""
        raise NotImplementedError

    async def write(self, offset: int, data: bytes) -> None:
        """Store ``data``."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Return when all that was written before is durable."""

    async def discard(self, offset: int, length: int) -> None:
        """Take note that nobody needs a range any more; offered only where it is overridden."""
        raise NotImplementedError

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Have a range read as zeroes."""
        for at in range(offset, offset + length, ZEROES):
            await call(self.write, at, bytes(min(ZEROES, offset + length - at)))

    async def close(self) -> None:
        """Let go of what the device has; no request follows."""


async def call(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns that may be asynchronous."""
    result = function(*args)
    return await result if hasattr(result, "__await__") else result


_devices: dict[str, type[Device]] = {}
DeviceT = TypeVar("DeviceT", bound=type[Device])


def python_device(name: str) -> Callable[[DeviceT], DeviceT]:
    """Let ``bdev_python_create`` make devices of a class under ``name``."""

    def mark(cls: DeviceT) -> DeviceT:
        if _devices.get(name, cls) is not cls:
            raise ValueError(f"python device {name!r} is registered twice")
        _devices[name] = cls
        return cls

    return mark


def find_device(name: str) -> type[Device]:
    """Return the class registered as ``name``; LookupError if there is none."""
    if name not in _devices:
        known = ", ".join(sorted(_devices)) or "none"
        raise LookupError(
            f"device {name!r:.80} is not registered by a module that start --load names; "
            f"there are: {known}"
        )
    return _devices[name]
