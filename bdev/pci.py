"""PCI devices as sysfs shows them: who drives them, what shares their group, what is on them."""

import errno
import os
import re
from pathlib import Path

from reactor.errors import OperationError

CLASS_NVME = 0x010802
VFIO_DRIVER = "vfio-pci"
_RESOURCE_MEMORY = 0x200  # IORESOURCE_MEM of linux/ioport.h
_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


def normal_address(text: str) -> str:
    """Return ``0000:01:00.0`` for it or ``01:00.0``; OperationError(-22) for anything else."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[3], 16) > 0x1F:
        raise OperationError(
            -errno.EINVAL, f"PCI address {text!r:.40}: must be like 0000:01:00.0 (see lspci -D)"
        )
    domain, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


class Sysfs:
    """The files of the kernel that describe devices; another ``root`` stands in for it in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.devices = root / "sys/bus/pci/devices"
        self.drivers = root / "sys/bus/pci/drivers"
        self.groups = root / "sys/kernel/iommu_groups"
        self.mounts = root / "proc/self/mountinfo"
        self.swaps = root / "proc/swaps"

    def read(self, path: Path) -> str:
        """Return a file's text without its end of line, or "" if there is none."""
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    def write(self, path: Path, text: str) -> None:
        """Write a file of the kernel; OperationError says which, and why it refused."""
        try:
            with path.open("w") as file:
                file.write(text)
        except OSError as error:
            code = error.errno or errno.EIO
            hint = " (are you root?)" if code in (errno.EACCES, errno.EPERM) else ""
            raise OperationError(
                -code, f"writing {text!r} to {path}: {os.strerror(code)}{hint}"
            ) from None

    def find(self, address: str) -> "PciDevice":
        """Return the device at an address; OperationError(-19) if there is none."""
        device = PciDevice(self, normal_address(address))
        if not device.path.exists():
            raise OperationError(
                -errno.ENODEV, f"No such device: there is nothing at PCI address {device.address}"
            )
        return device

    def bus_addresses(self) -> list[tuple[int, int]]:
        """Return where devices and bridges are on the bus: first and last address of each."""
        found = []
        for resource in self.devices.glob("*/resource"):
            for line in self.read(resource).splitlines():
                first, last, flags = (int(number, 16) for number in line.split())
                if flags & _RESOURCE_MEMORY:
                    found.append((first, last))
        return found

    def nvme(self) -> list["PciDevice"]:
        """Return every NVMe controller, by address."""
        if not self.devices.is_dir():
            return []
        found = [PciDevice(self, path.name) for path in sorted(self.devices.iterdir())]
        return [device for device in found if device.is_nvme]


class PciDevice:
    """One device."""

    def __init__(self, sysfs: Sysfs, address: str) -> None:
        self.sysfs = sysfs
        self.address = address
        self.path = sysfs.devices / address

    def _number(self, name: str) -> int:
        text = self.sysfs.read(self.path / name)
        return int(text, 16) if text else 0

    @property
    def is_nvme(self) -> bool:
        """Whether it is an NVMe controller, by its class code."""
        return self._number("class") == CLASS_NVME

    @property
    def ids(self) -> str:
        """Vendor and device, as ``1b36:0010``."""
        return f"{self._number('vendor'):04x}:{self._number('device'):04x}"

    @property
    def driver(self) -> str:
        """The name of its driver, or ""."""
        link = self.path / "driver"
        return link.resolve().name if link.exists() else ""

    @property
    def group(self) -> str:
        """The number of its IOMMU group, or "" without an IOMMU."""
        link = self.path / "iommu_group"
        return link.resolve().name if link.exists() else ""

    @property
    def cdev(self) -> Path | None:
        """Return its own file of VFIO's (Linux 6.6), or None where the kernel has no such."""
        for entry in sorted((self.path / "vfio-dev").glob("vfio*")):
            node = self.sysfs.root / "dev/vfio/devices" / entry.name
            if node.exists() and (self.sysfs.root / "dev/iommu").exists():
                return node
        return None

    def config_space(self) -> bytes:
        """Return its configuration space, as much as we may read."""
        try:
            return (self.path / "config").read_bytes()
        except OSError:
            return b""

    def others_in_group(self) -> list["PciDevice"]:
        """Return the other devices that its IOMMU group has."""
        folder = self.sysfs.groups / self.group / "devices"
        if not self.group or not folder.is_dir():
            return []
        names = sorted(path.name for path in folder.iterdir())
        return [PciDevice(self.sysfs, name) for name in names if name != self.address]

    @property
    def is_bridge(self) -> bool:
        """Whether it is a bridge, which VFIO does not mind in a group."""
        return self._number("class") >> 16 == 0x06

    def block_devices(self) -> list[str]:
        """Return the kernel's block devices on it, with partitions: ``nvme0n1``, ``nvme0n1p1``."""
        names = []
        for controller in sorted((self.path / "nvme").glob("nvme*")):
            for disk in sorted(controller.glob("nvme*n*")):
                names.append(disk.name)
                names += sorted(p.name for p in disk.glob(f"{disk.name}p*"))
        return names

    def uses(self) -> list[str]:
        """Return what the system uses it for: mounts, swap, and devices stacked upon it."""
        names = self.block_devices()
        numbers = {self.sysfs.read(self._block(name) / "dev"): name for name in names}
        found = []
        for line in self.sysfs.read(self.sysfs.mounts).splitlines():
            fields = line.split()
            source = fields[fields.index("-") + 2] if "-" in fields[:-2] else ""
            name = numbers.get(fields[2]) or next((n for n in names if source == f"/dev/{n}"), "")
            if name:
                found.append(f"{name} is mounted on {fields[4]}")
        for line in self.sysfs.read(self.sysfs.swaps).splitlines()[1:]:
            name = line.split()[0].removeprefix("/dev/")
            if name in names:
                found.append(f"{name} is swap space")
        for name in names:
            holders = self._block(name) / "holders"
            if holders.is_dir():
                found += [
                    f"{name} is part of {holder.name}" for holder in sorted(holders.iterdir())
                ]
        return found

    def _block(self, name: str) -> Path:
        return self.sysfs.root / "sys/class/block" / name

    # --- drivers

    def bind(self) -> str:
        """Give it to vfio-pci and return the driver that it had; refused while in use."""
        self.check_takeable()
        before = self.driver
        if before == VFIO_DRIVER:
            return before
        if not (self.sysfs.drivers / VFIO_DRIVER).exists():
            raise OperationError(
                -errno.ENOENT, "the driver vfio-pci is not loaded; run: modprobe vfio-pci"
            )
        try:
            self._switch(VFIO_DRIVER)
        except OperationError:
            self._restore(before)
            raise
        return before

    def unbind(self, driver: str = "nvme") -> None:
        """Take it from vfio-pci and give it back to the kernel's driver."""
        if self.driver == driver:
            return
        if self.driver not in ("", VFIO_DRIVER):
            raise OperationError(
                -errno.EBUSY, f"{self.address}: has driver {self.driver}, not {VFIO_DRIVER}"
            )
        self._switch("", probe=driver)
        if (self.sysfs.drivers / driver).exists() and not self.driver:
            self.sysfs.write(self.sysfs.drivers / driver / "bind", self.address)

    def check_takeable(self) -> None:
        """Raise OperationError, with the remedy, unless it may be driven from here."""
        if not self.is_nvme:
            code = self._number("class")
            raise OperationError(
                -errno.ENODEV, f"{self.address}: is of PCI class {code:06x}, not an NVMe controller"
            )
        uses = self.uses()
        if uses:
            raise OperationError(-errno.EBUSY, f"{self.address}: is in use: {'; '.join(uses)}")
        if not self.group:
            raise OperationError(
                -errno.ENODEV,
                f"{self.address}: has no IOMMU group; switch the IOMMU on in the firmware and boot "
                "with intel_iommu=on (Intel; AMD's is on by default)",
            )
        others = [
            d
            for d in self.others_in_group()
            if not d.is_bridge and d.driver not in ("", VFIO_DRIVER)
        ]
        if others:
            names = ", ".join(f"{device.address} ({device.driver})" for device in others)
            raise OperationError(
                -errno.EBUSY,
                f"{self.address}: shares IOMMU group {self.group} with {names}; they must go to "
                "vfio-pci too, or the drive into another slot",
            )

    def _switch(self, driver: str, probe: str = "") -> None:
        """Release it from its driver, and have the kernel probe for another."""
        self.sysfs.write(self.path / "driver_override", driver or "\n")
        if self.driver:
            self.sysfs.write(self.path / "driver/unbind", self.address)
        self.sysfs.write(self.sysfs.root / "sys/bus/pci/drivers_probe", self.address)
        wanted = driver or probe
        if driver and self.driver != driver:
            raise OperationError(
                -errno.EIO,
                f"{self.address}: {wanted} did not take it; see the kernel's log (dmesg)",
            )

    def _restore(self, driver: str) -> None:
        """Do what is possible to have it as it was found."""
        try:
            self._switch("", probe=driver)
        except OperationError:
            return
