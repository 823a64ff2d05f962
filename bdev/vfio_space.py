"""The address space that all devices of VFIO share, of the older and of the newer interface.

The control process owns it. Memory is mapped by its file: the pages that are locked are the file's,
whoever else maps it. The first device decides which interface it is: iommufd where the kernel has a
file for the device (``/dev/vfio/devices``), else a container with the device's group.
"""

import errno
import logging
import mmap
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from bdev.nvme_transport import PAGE
from bdev.pci import PciDevice, Sysfs
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib

log = logging.getLogger(__name__)

# Where the kernel does not say: below what every IOMMU has, without x86's window for interrupts.
_DEFAULT_WINDOWS = [(1 << 20, 0xFEE0_0000 - 1)]
# The memory of guests has addresses above the driver's own, as far as the least of IOMMUs goes, and
# not where firmware and kernel like to put devices, which may come later.
GUEST_WINDOW = (1 << 36, (1 << 39) - 1)
_FIRST = 1 << 20  # no mapping at address 0: a device that was told nothing goes there
_ALIGNMENT = 2 << 20  # lets the IOMMU use its large pages


class Addresses:
    """Allocates device addresses out of the windows that the IOMMU has. First fit.

    ``avoid`` returns ranges, first and last address, that are none of memory: what a device sends
    to the address of another one on the bus need not get as far as the IOMMU.
    """

    def __init__(
        self,
        windows: Sequence[tuple[int, int]],
        avoid: Callable[[], list[tuple[int, int]]] = list,
    ) -> None:
        self._windows = sorted(windows)
        self._avoid = avoid
        self._used: dict[int, int] = {}  # size by address

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` free bytes; OSError(ENOSPC) if there are none."""
        alignment = _ALIGNMENT if size >= _ALIGNMENT else PAGE
        taken = sorted(
            [(at, at + length) for at, length in self._used.items()]
            + [(first, last + 1) for first, last in self._avoid()]
        )
        for first, last in self._windows:
            at = _round_up(max(first, _FIRST), alignment)
            for start, end in taken:
                if at + size <= start:
                    break
                if at < end:
                    at = _round_up(end, alignment)
            if at + size - 1 <= last:
                self._used[at] = size
                return at
        raise OSError(errno.ENOSPC, f"no {size} bytes of device addresses are left")

    def free(self, address: int) -> int:
        """Free what was allocated there, and return its size."""
        return self._used.pop(address)


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


class VfioSpace(ABC):
    """An address space, and the devices that are in it."""

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._maps: dict[int, mmap.mmap] = {}
        self._addresses: Addresses | None = None
        self.devices = 0

    def open_device(self, device: PciDevice) -> int:
        """Return the descriptor of a device, which is in the space from here on."""
        fd = self._enter(device)
        self.devices += 1
        if self._addresses is None:
            try:
                self._addresses = Addresses(self._ranges(), self._sysfs.bus_addresses)
            except BaseException:
                self.close_device(device, fd)
                raise
        return fd

    def close_device(self, device: PciDevice, fd: int) -> None:
        """Close a device; it does no DMA any more."""
        os.close(fd)
        self.devices -= 1
        self._left(device)

    def _ranges(self) -> list[tuple[int, int]]:
        """Return the windows for memory of ours: those of guests are above."""
        windows = ffi.new("struct vfio_window[]", lib.VFIO_WINDOWS)
        count = check_vfio(self._windows(windows), "addresses that devices may use")
        below = (1 << 32) - 1
        found = [(windows[i].first, min(windows[i].last, below)) for i in range(count)]
        return found or _DEFAULT_WINDOWS

    def map(self, fd: int, offset: int, size: int, iova: int | None = None) -> int:
        """Map whole pages of a file, at ``iova`` if given; return where devices see them."""
        assert self._addresses is not None, "a device comes first"
        memory = mmap.mmap(fd, size, offset=offset)
        buffer = ffi.from_buffer("char[]", memory)
        address = self._addresses.allocate(size) if iova is None else iova
        rc = self._map(buffer, size, address)
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
        check_vfio(self._unmap(iova, len(memory)), f"unmapping DMA address {iova:#x}")
        memory.close()
        if iova < GUEST_WINDOW[0]:
            self._addresses.free(iova)

    def close(self) -> None:
        """Close it; nothing uses it any more."""
        for memory in self._maps.values():
            memory.close()
        self._maps.clear()
        self._close()

    @abstractmethod
    def _enter(self, device: PciDevice) -> int: ...

    @abstractmethod
    def _left(self, device: PciDevice) -> None: ...

    @abstractmethod
    def _windows(self, windows: CData) -> int: ...

    @abstractmethod
    def _map(self, buffer: CData, size: int, iova: int) -> int: ...

    @abstractmethod
    def _unmap(self, iova: int, size: int) -> int: ...

    @abstractmethod
    def _close(self) -> None: ...


class GroupSpace(VfioSpace):
    """A container, with the groups of the devices: every kernel that has VFIO has these."""

    def __init__(self, sysfs: Sysfs) -> None:
        super().__init__(sysfs)
        rc = lib.vfio_container_open()
        self._fd = check_vfio(rc, "/dev/vfio/vfio", "run: modprobe vfio-pci")
        self._groups: dict[str, tuple[int, int]] = {}  # descriptor and users by number
        self._group_of: dict[str, str] = {}  # by address: sysfs may have forgotten the device

    def _enter(self, device: PciDevice) -> int:
        number = device.group
        group = self._open_group(number)
        self._group_of[device.address] = number
        fd = lib.vfio_device_open(group, device.address.encode())
        if fd < 0:
            self._left(device)
        return check_vfio(fd, device.address)

    def _open_group(self, number: str) -> int:
        fd, users = self._groups.get(number, (-1, 0))
        if fd < 0:
            path = f"/dev/vfio/{number}"
            rc = lib.vfio_group_open(path.encode(), self._fd)
            fd = check_vfio(rc, path, _GROUP_HINTS.get(-rc, ""))
            if not self._groups:
                rc = lib.vfio_iommu_choose(self._fd)
                if rc < 0:
                    os.close(fd)
                check_vfio(rc, "VFIO_SET_IOMMU: this kernel has no type 1 IOMMU")
        self._groups[number] = (fd, users + 1)
        return fd

    def _left(self, device: PciDevice) -> None:
        """Count one user of a group less; the container goes with the last group."""
        number = self._group_of.pop(device.address)
        fd, users = self._groups.pop(number)
        if users > 1:
            self._groups[number] = (fd, users - 1)
        else:
            os.close(fd)

    def _windows(self, windows: CData) -> int:
        return int(lib.vfio_windows(self._fd, windows))

    def _map(self, buffer: CData, size: int, iova: int) -> int:
        return int(lib.vfio_map(self._fd, buffer, size, iova))

    def _unmap(self, iova: int, size: int) -> int:
        return int(lib.vfio_unmap(self._fd, iova, size))

    def _close(self) -> None:
        os.close(self._fd)


class IommufdSpace(VfioSpace):
    """An address space of /dev/iommu, into which devices come by their own files."""

    def __init__(self, sysfs: Sysfs) -> None:
        super().__init__(sysfs)
        self._fd = check_vfio(lib.iommufd_open(), "/dev/iommu")
        number = ffi.new("uint32_t *")
        rc = lib.iommufd_create_space(self._fd, number)
        if rc < 0:
            os.close(self._fd)
        check_vfio(rc, "/dev/iommu: IOMMU_IOAS_ALLOC")
        self._space = number[0]

    def _enter(self, device: PciDevice) -> int:
        path = device.cdev
        assert path is not None, "the first device has one, and so has every other"
        rc = lib.iommufd_open_device(os.fsencode(path), self._fd, self._space)
        return check_vfio(rc, str(path), _GROUP_HINTS.get(-rc, ""))

    def _left(self, device: PciDevice) -> None:
        """Do nothing: closing its file took the device out of the space."""

    def _windows(self, windows: CData) -> int:
        return int(lib.iommufd_windows(self._fd, self._space, windows))

    def _map(self, buffer: CData, size: int, iova: int) -> int:
        return int(lib.iommufd_map(self._fd, self._space, buffer, size, iova))

    def _unmap(self, iova: int, size: int) -> int:
        return int(lib.iommufd_unmap(self._fd, self._space, iova, size))

    def _close(self) -> None:
        os.close(self._fd)


_GROUP_HINTS = {
    errno.EPERM: "a device of the group has another driver than vfio-pci",
    errno.EBUSY: "another program has it open",
    errno.EACCES: "we may not open it: run as root, or chown it to us",
    errno.ENOENT: "no device of the group has the driver vfio-pci",
}


def check_vfio(rc: int, what: str, hint: str = "") -> int:
    """Return ``rc``; OperationError if it is -errno."""
    if rc < 0:
        text = f"{what}: {os.strerror(-rc)}" + (f"; {hint}" if hint else "")
        raise OperationError(rc, text)
    return rc


_space: VfioSpace | None = None


def open_in_space(device: PciDevice) -> tuple[VfioSpace, int]:
    """Open a device in the space of this process; return both. OperationError says why not."""
    global _space
    if _space is not None:
        return _space, _space.open_device(device)
    space, fd = _open_first(device)
    _space = space
    return space, fd


def _open_first(device: PciDevice) -> tuple[VfioSpace, int]:
    if device.cdev is not None:
        try:
            return _enter(IommufdSpace, device)
        except OperationError as error:
            log.info("iommufd is not used: %s", error.message)
    return _enter(GroupSpace, device)


def _enter(kind: type[VfioSpace], device: PciDevice) -> tuple[VfioSpace, int]:
    space = kind(device.sysfs)
    try:
        return space, space.open_device(device)
    except BaseException:
        space.close()
        raise


def close_in_space(device: PciDevice, fd: int) -> None:
    """Close a device; the space goes with the last one."""
    global _space
    assert _space is not None
    _space.close_device(device, fd)
    if not _space.devices:
        _space.close()
        _space = None
