"""NVMe controllers through VFIO: one address space for all devices, and the devices in it.

The control process owns everything here. Memory is mapped by its file: the pages that are locked
are the file's, whoever else maps it.
"""

import errno
import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path

from bdev.nvme_transport import PAGE, Transport
from bdev.pci import VFIO_DRIVER, PciDevice, Sysfs
from reactor.errors import OperationError, check
from reactor.native import CData, ffi, lib

_COMMAND, _MEMORY, _MASTER = 0x04, 0x2, 0x4  # PCI configuration space: the command register
_BAR0 = 0
# Where the kernel does not say: below what every IOMMU has, without x86's window for interrupts.
_DEFAULT_WINDOWS = [(1 << 20, 0xFEE0_0000 - 1)]
# The memory of guests has addresses above the driver's own, as far as the least of IOMMUs goes.
GUEST_WINDOW = (1 << 32, (1 << 39) - 1)
_FIRST = 1 << 20  # no mapping at address 0: a device that was told nothing goes there
_ALIGNMENT = 2 << 20  # lets the IOMMU use its large pages


class Addresses:
    """Allocates device addresses out of the windows that the IOMMU has. First fit."""

    def __init__(self, windows: Sequence[tuple[int, int]]) -> None:
        self._windows = sorted(windows)
        self._used: dict[int, int] = {}  # size by address

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` free bytes; OSError(ENOSPC) if there are none."""
        alignment = _ALIGNMENT if size >= _ALIGNMENT else PAGE
        used = sorted(self._used.items())
        for first, last in self._windows:
            at = _round_up(max(first, _FIRST), alignment)
            for start, length in used:
                if at + size <= start:
                    break
                if at < start + length:
                    at = _round_up(start + length, alignment)
            if at + size - 1 <= last:
                self._used[at] = size
                return at
        raise OSError(errno.ENOSPC, f"no {size} bytes of device addresses are left")

    def free(self, address: int) -> int:
        """Free what was allocated there, and return its size."""
        return self._used.pop(address)


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


class Container:
    """The address space that all devices share."""

    def __init__(self) -> None:
        self.fd = _check(lib.vfio_container_open(), "/dev/vfio/vfio", "run: modprobe vfio-pci")
        self._groups: dict[str, tuple[int, int]] = {}  # descriptor and users by number
        self._maps: dict[int, mmap.mmap] = {}
        self._addresses: Addresses | None = None

    def open_group(self, number: str) -> int:
        """Put a group into the container, if it is not there, and return its descriptor."""
        fd, users = self._groups.get(number, (-1, 0))
        if fd < 0:
            path = f"/dev/vfio/{number}"
            rc = lib.vfio_group_open(path.encode(), self.fd)
            fd = _check(rc, path, _GROUP_HINTS.get(-rc, ""))
            try:
                if self._addresses is None:
                    self._choose_iommu()
            except BaseException:
                os.close(fd)
                raise
        self._groups[number] = (fd, users + 1)
        return fd

    def _choose_iommu(self) -> None:
        check(lib.vfio_iommu_choose(self.fd), "VFIO_SET_IOMMU: this kernel has no type 1 IOMMU")
        windows = ffi.new("struct vfio_window[]", lib.VFIO_WINDOWS)
        count = check(lib.vfio_windows(self.fd, windows), "VFIO_IOMMU_GET_INFO")
        below = GUEST_WINDOW[0] - 1
        ranges = [(windows[i].first, min(windows[i].last, below)) for i in range(count)]
        self._addresses = Addresses(ranges or _DEFAULT_WINDOWS)

    def close_group(self, number: str) -> None:
        """Count one user of a group less; the container goes with the last group."""
        fd, users = self._groups.pop(number)
        if users > 1:
            self._groups[number] = (fd, users - 1)
        else:
            os.close(fd)

    @property
    def unused(self) -> bool:
        """Whether no group is left."""
        return not self._groups

    def map(self, fd: int, offset: int, size: int, iova: int | None = None) -> int:
        """Map whole pages of a file, at ``iova`` if given; return where devices see them."""
        assert self._addresses is not None, "a group comes first"
        memory = mmap.mmap(fd, size, offset=offset)
        buffer = ffi.from_buffer("char[]", memory)
        address = self._addresses.allocate(size) if iova is None else iova
        rc = lib.vfio_map(self.fd, buffer, size, address)
        ffi.release(buffer)
        if rc < 0:
            if iova is None:
                self._addresses.free(address)
            memory.close()
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            hint = (
                f"; the limit of locked memory is {limit} bytes (ulimit -l)"
                if rc == -errno.ENOMEM
                else ""
            )
            raise OSError(-rc, f"{os.strerror(-rc)}: mapping {size} bytes for DMA{hint}")
        self._maps[address] = memory  # the kernel may look at these addresses again
        return address

    def unmap(self, iova: int) -> None:
        """Unmap what was mapped at ``iova``."""
        assert self._addresses is not None
        memory = self._maps.pop(iova)
        check(lib.vfio_unmap(self.fd, iova, len(memory)), "VFIO_IOMMU_UNMAP_DMA")
        memory.close()
        if iova < GUEST_WINDOW[0]:
            self._addresses.free(iova)

    def close(self) -> None:
        """Close it; nothing uses it any more."""
        for memory in self._maps.values():
            memory.close()
        self._maps.clear()
        os.close(self.fd)


_GROUP_HINTS = {
    errno.EPERM: "a device of the group has another driver than vfio-pci",
    errno.EBUSY: "another program has it open",
    errno.EACCES: "we may not open it: run as root, or chown it to us",
    errno.ENOENT: "no device of the group has the driver vfio-pci",
}


def _check(rc: int, what: str, hint: str = "") -> int:
    if rc < 0:
        text = f"{what}: {os.strerror(-rc)}" + (f"; {hint}" if hint else "")
        raise OperationError(rc, text)
    return rc


_container: Container | None = None


def container() -> Container:
    """Return the container of this process, opened if need be."""
    global _container
    if _container is None:
        _container = Container()
    return _container


def _close_if_unused() -> None:
    global _container
    if _container is not None and _container.unused:
        _container.close()
        _container = None


def current_container() -> Container | None:
    """Return the container if any drive is attached."""
    return _container


class VfioDevice:
    """A ``Transport`` on a device that vfio-pci has."""

    def __init__(self, device: PciDevice) -> None:
        self.address = device.address
        self._number = device.group
        self._fd = -1
        self.dma = container()
        try:
            group = self.dma.open_group(self._number)
        except BaseException:
            _close_if_unused()
            raise
        try:
            self._fd = _check(lib.vfio_device_open(group, self.address.encode()), self.address)
            bar, config = self._region(_BAR0), self._region(lib.VFIO_CONFIG)
            if not bar.mappable:
                raise OperationError(-errno.ENOTSUP, f"{self.address}: BAR 0 cannot be mapped")
            self.registers = (self._fd, bar.offset, bar.size)
            self._config = config.offset
            self.vectors = max(lib.vfio_msix_count(self._fd), 0)
        except BaseException:
            self.close()
            raise

    def _region(self, index: int) -> CData:
        region = ffi.new("struct vfio_region *")
        _check(lib.vfio_region_find(self._fd, index, region), f"{self.address}: region {index}")
        return region

    def set_interrupts(self, eventfds: Sequence[int]) -> None:
        """Signal ``eventfds[i]`` upon interrupt ``i``."""
        if not self.vectors:
            return
        rc = lib.vfio_msix_set(self._fd, ffi.new("int[]", list(eventfds)), len(eventfds))
        _check(rc, f"{self.address}: {len(eventfds)} MSI-X interrupts")

    def set_request(self, eventfd: int) -> None:
        """Signal ``eventfd`` when the kernel asks for the device; old kernels never do."""
        rc = lib.vfio_request_set(self._fd, eventfd)
        if rc != -errno.EINVAL:
            _check(rc, f"{self.address}: notice of its removal")

    def _set_master(self, on: bool) -> None:
        at = self._config + _COMMAND
        command = int.from_bytes(os.pread(self._fd, 2, at), "little")
        value = command | _MEMORY | _MASTER if on else command & ~_MASTER
        os.pwrite(self._fd, value.to_bytes(2, "little"), at)

    def enable(self) -> None:
        """Let the device be a bus master."""
        self._set_master(True)

    def quiesce(self) -> None:
        """Stop the device from being one."""
        self._set_master(False)

    def close(self) -> None:
        """Close the device and, with its last device, its group and the container."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.dma.close_group(self._number)
        _close_if_unused()


def open_device(address: str, sysfs: Sysfs | None = None) -> Transport:
    """Open an NVMe controller; OperationError says what is in the way, and what to do."""
    device = (sysfs or Sysfs()).find(address)
    device.check_takeable()
    if device.driver != VFIO_DRIVER:
        raise OperationError(
            -errno.EBUSY,
            f"{device.address}: has driver {device.driver or 'none'}; run: vhost-reactor nvme bind "
            f"{device.address}",
        )
    return VfioDevice(device)


def vfio_is_there(root: Path = Path("/")) -> bool:
    """Whether the kernel offers VFIO at all."""
    return (root / "dev/vfio/vfio").exists()
