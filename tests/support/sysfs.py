"""A sysfs of files, with the PCI devices and drivers that a test puts there."""

from __future__ import annotations

import shutil
from pathlib import Path

from bdev.pci import PciDevice, Sysfs


class FakeSysfs(Sysfs):
    """Files that answer writes as the kernel does: drivers take and release devices."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.refuse = ""  # a driver that does not take devices
        for folder in (self.devices, self.groups, root / "proc/self", root / "sys/class/block"):
            folder.mkdir(parents=True)
        for driver in ("nvme", "vfio-pci", "ahci"):
            (self.drivers / driver).mkdir(parents=True)
        (root / "dev/vfio").mkdir(parents=True)
        (root / "dev/vfio/vfio").touch()
        self.mounts.touch()
        self.swaps.write_text("Filename Type Size Used Priority\n")

    def add(
        self, address: str, code: int = 0x010802, driver: str = "nvme", group: str = "7"
    ) -> PciDevice:
        path = self.devices / address
        path.mkdir()
        (path / "class").write_text(f"{code:#08x}\n")
        (path / "vendor").write_text("0x1b36\n")
        (path / "device").write_text("0x0010\n")
        (path / "driver_override").write_text("(null)\n")
        if group:
            (self.groups / group / "devices").mkdir(parents=True, exist_ok=True)
            (self.groups / group / "devices" / address).touch()
            (path / "iommu_group").symlink_to(self.groups / group)
            (self.root / "dev/vfio" / group).touch()
        if driver:
            (path / "driver").symlink_to(self.drivers / driver)
        return PciDevice(self, address)

    def remove(self, address: str) -> None:
        group = PciDevice(self, address).group
        (self.groups / group / "devices" / address).unlink()
        (self.devices / address / "iommu_group").unlink()
        shutil.rmtree(self.devices / address)

    def add_disk(self, device: PciDevice, name: str = "nvme0n1", number: str = "259:0") -> None:
        (device.path / "nvme/nvme0" / name).mkdir(parents=True)
        block = self.root / "sys/class/block" / name
        (block / "holders").mkdir(parents=True)
        (block / "dev").write_text(f"{number}\n")

    def write(self, path: Path, text: str) -> None:
        super().write(path, text)
        if path.name == "unbind":
            (self.devices / text / "driver" / "unbind").unlink()
            (self.devices / text / "driver").unlink()
        elif path.name == "drivers_probe":
            wanted = self.read(self.devices / text / "driver_override") or "nvme"
            if wanted != self.refuse:
                (self.devices / text / "driver").symlink_to(self.drivers / wanted)
