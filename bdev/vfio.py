"""NVMe controllers through VFIO: registers, interrupts, and the bus mastering of one device."""

import errno
import os
from collections.abc import Sequence

from bdev.nvme_transport import Transport
from bdev.pci import VFIO_DRIVER, PciDevice, Sysfs
from bdev.vfio_space import check_vfio, close_in_space, open_in_space
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib

_COMMAND, _MEMORY, _MASTER = 0x04, 0x2, 0x4  # PCI configuration space: the command register
_BAR0 = 0


class VfioDevice:
    """A ``Transport`` on a device that vfio-pci has."""

    def __init__(self, device: PciDevice) -> None:
        self.address = device.address
        self._device = device
        self.dma, self._fd = open_in_space(device)
        try:
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
        check_vfio(lib.vfio_region_find(self._fd, index, region), f"{self.address}: region {index}")
        return region

    def set_interrupts(self, eventfds: Sequence[int]) -> None:
        """Signal ``eventfds[i]`` upon interrupt ``i``."""
        if not self.vectors:
            return
        rc = lib.vfio_msix_set(self._fd, ffi.new("int[]", list(eventfds)), len(eventfds))
        check_vfio(rc, f"{self.address}: {len(eventfds)} MSI-X interrupts")

    def set_request(self, eventfd: int) -> None:
        """Signal ``eventfd`` when the kernel asks for the device; old kernels never do."""
        rc = lib.vfio_request_set(self._fd, eventfd)
        if rc != -errno.EINVAL:
            check_vfio(rc, f"{self.address}: notice of its removal")

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
        """Close the device; the address space goes with the last one."""
        close_in_space(self._device, self._fd)
        self._fd = -1


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
