"""What the NVMe driver needs of the bus: registers, memory that the device sees, interrupts.

VFIO offers it (``bdev/vfio.py``), and so may anything that behaves like it: the driver above this
line knows neither PCI nor the kernel.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

from reactor.errors import OperationError
from reactor.native import CData, ffi, lib

ALL_ONES_32 = 0xFFFF_FFFF
ALL_ONES_64 = 0xFFFF_FFFF_FFFF_FFFF
PAGE = 4096


class DmaSpace(Protocol):
    """The addresses at which devices see memory."""

    def map(self, fd: int, offset: int, size: int, iova: int | None = None) -> int:
        """Map whole pages of a file, at ``iova`` if given; return where devices see them.

        OSError if it cannot.
        """

    def unmap(self, iova: int) -> None:
        """Unmap what was mapped at ``iova``."""


class Transport(Protocol):
    """One controller as the bus shows it."""

    @property
    def address(self) -> str:
        """Where it is, as ``0000:01:00.0``."""

    @property
    def dma(self) -> DmaSpace:
        """The addresses that it uses."""

    @property
    def registers(self) -> tuple[int, int, int]:
        """Return descriptor, offset and size of its registers."""

    @property
    def vectors(self) -> int:
        """How many interrupts it has; 0 if it must be polled."""

    def set_interrupts(self, eventfds: Sequence[int]) -> None:
        """Signal ``eventfds[i]`` upon interrupt ``i``; none: no interrupts."""

    def set_request(self, eventfd: int) -> None:
        """Signal ``eventfd`` when the device is to be given back, which somebody waits for."""

    def enable(self) -> None:
        """Let the device do DMA."""

    def quiesce(self) -> None:
        """Stop the device's DMA for certain, whatever its state; OSError if it is gone."""

    def close(self) -> None:
        """Let go of the device."""


class ControllerError(OperationError):
    """The controller does not do what it should; the message says what."""

    def __init__(self, message: str, code: int = -errno.EIO) -> None:
        super().__init__(code, message)


class DeviceGoneError(ControllerError):
    """The controller is not there any more."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: the device is gone (its registers read as all ones)", -errno.ENODEV
        )


class Registers:
    """The registers of a controller; each read raises DeviceGoneError when there is nobody."""

    def __init__(self, transport: Transport) -> None:
        fd, offset, size = transport.registers
        self.size = size
        self._native = lib.nvme_registers_map(fd, offset, size)
        if self._native == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno), f"registers of {transport.address}")

    def read32(self, at: int) -> int:
        """Return the 32-bit register at ``at``."""
        value: int = lib.nvme_read32(self._native, at)
        if value == ALL_ONES_32 or lib.nvme_registers_lost(self._native):
            raise DeviceGoneError(f"register {at:#x}")
        return value

    def read64(self, at: int) -> int:
        """Return the 64-bit register at ``at``."""
        value: int = lib.nvme_read64(self._native, at)
        if value == ALL_ONES_64 or lib.nvme_registers_lost(self._native):
            raise DeviceGoneError(f"register {at:#x}")
        return value

    def write32(self, at: int, value: int) -> None:
        """Write a 32-bit register."""
        lib.nvme_write32(self._native, at, value)

    def write64(self, at: int, value: int) -> None:
        """Write a 64-bit register."""
        lib.nvme_write64(self._native, at, value)

    def close(self) -> None:
        """Unmap them; no other call may follow."""
        if self._native is not None:
            lib.nvme_registers_unmap(self._native)
            self._native = None


class DmaMemory:
    """Shared memory of ours, the first ``seen`` bytes of which the device sees (all by default)."""

    def __init__(self, dma: DmaSpace, name: str, size: int, seen: int | None = None) -> None:
        self.size = -(-size // PAGE) * PAGE
        self._dma = dma
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size)
            self._map = mmap.mmap(self.fd, self.size)
            self.iova = dma.map(self.fd, 0, self.size if seen is None else seen)
        except BaseException:
            os.close(self.fd)
            raise
        self._buffer = ffi.from_buffer("char[]", self._map, require_writable=True)

    def at(self, ctype: str, offset: int = 0) -> CData:
        """Return a pointer of C, as ``struct nvme_command *``, to what stands at ``offset``."""
        return ffi.cast(ctype, self._buffer + offset)

    def bytes(self, offset: int, length: int) -> bytes:
        """Return a copy."""
        return self._map[offset : offset + length]

    def words(self, offset: int, count: int) -> memoryview:
        """Return ``count`` 64-bit numbers as they are now."""
        return memoryview(self.bytes(offset, count * 8)).cast("Q")

    def clear(self, offset: int = 0, length: int | None = None) -> None:
        """Make a part, or all of it, zeroes."""
        size = self.size - offset if length is None else length
        self._map[offset : offset + size] = bytes(size)

    def close(self) -> None:
        """Unmap it everywhere; the device must not use it any more."""
        if self.fd >= 0:
            self._dma.unmap(self.iova)
            ffi.release(self._buffer)
            self._map.close()
            os.close(self.fd)
            self.fd = -1
