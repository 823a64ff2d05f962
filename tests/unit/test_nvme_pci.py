"""Drives on the PCI bus: what is said of them, and how they change drivers. On a sysfs of files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdev.check import examine, examine_drive
from bdev.pci import PciDevice, normal_address
from bdev.vfio import open_device
from bdev.vfio_space import Addresses
from reactor.errors import OperationError
from tests.support.nvme_controller import PAGE
from tests.support.sysfs import FakeSysfs

DRIVE = "0000:01:00.0"


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path)


def test_a_drive_goes_to_vfio_and_back(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    assert drive.bind() == "nvme"
    assert drive.driver == "vfio-pci"
    assert drive.bind() == "vfio-pci", "once more changes nothing"
    drive.unbind()
    assert drive.driver == "nvme"
    assert sysfs.read(drive.path / "driver_override") == ""


def refused(drive: PciDevice) -> OperationError:
    before = drive.driver
    with pytest.raises(OperationError) as caught:
        drive.bind()
    assert drive.driver == before, "a refusal leaves everything as it was"
    return caught.value


def test_a_mounted_drive_is_never_taken(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    sysfs.add_disk(drive)
    sysfs.mounts.write_text("25 1 259:0 / /home rw,relatime shared:1 - ext4 /dev/nvme0n1 rw\n")
    error = refused(drive)
    assert error.code == -errno.EBUSY
    assert "nvme0n1 is mounted on /home" in error.message


def test_a_file_system_over_several_drives_is_found_by_its_source(sysfs: FakeSysfs) -> None:
    """btrfs has a device number of its own in mountinfo."""
    drive = sysfs.add(DRIVE)
    sysfs.add_disk(drive)
    sysfs.mounts.write_text("25 1 0:31 / /srv rw - btrfs /dev/nvme0n1 rw\n")
    assert "mounted on /srv" in refused(drive).message


def test_swap_space_and_parts_of_an_array_are_in_use(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    sysfs.add_disk(drive)
    with sysfs.swaps.open("a") as file:
        file.write("/dev/nvme0n1 partition 1 0 -2\n")
    (sysfs.root / "sys/class/block/nvme0n1/holders/md0").touch()
    message = refused(drive).message
    assert "nvme0n1 is swap space" in message
    assert "nvme0n1 is part of md0" in message


def test_a_mounted_partition_counts(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    sysfs.add_disk(drive)
    (drive.path / "nvme/nvme0/nvme0n1/nvme0n1p2").mkdir()
    part = sysfs.root / "sys/class/block/nvme0n1p2"
    part.mkdir()
    (part / "dev").write_text("259:2\n")
    sysfs.mounts.write_text("25 1 259:2 / / rw - ext4 /dev/root rw\n")
    assert "nvme0n1p2 is mounted on /" in refused(drive).message


def test_a_drive_without_iommu_is_refused_with_the_kernel_parameter(sysfs: FakeSysfs) -> None:
    assert "intel_iommu=on" in refused(sysfs.add(DRIVE, group="")).message


def test_a_group_with_another_device_is_refused(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    sysfs.add("0000:01:00.1", code=0x010601, driver="ahci")
    assert "0000:01:00.1 (ahci)" in refused(drive).message


def test_bridges_and_free_devices_in_the_group_do_no_harm(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    sysfs.add("0000:00:01.0", code=0x060400, driver="")
    sysfs.add("0000:01:00.1", code=0x010601, driver="")
    assert drive.bind() == "nvme"


def test_what_is_no_nvme_controller_is_refused(sysfs: FakeSysfs) -> None:
    assert "PCI class 010601" in refused(sysfs.add(DRIVE, code=0x010601, driver="ahci")).message


def test_without_vfio_pci_nothing_is_changed(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    (sysfs.drivers / "vfio-pci").rmdir()
    assert "modprobe vfio-pci" in refused(drive).message


def test_a_drive_that_vfio_does_not_take_goes_back(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    sysfs.refuse = "vfio-pci"
    assert "did not take it" in refused(drive).message


def test_an_address_where_nothing_is(sysfs: FakeSysfs) -> None:
    with pytest.raises(OperationError) as caught:
        sysfs.find(DRIVE)
    assert caught.value.code == -errno.ENODEV


def test_a_drive_that_the_kernel_has_is_not_opened(sysfs: FakeSysfs) -> None:
    sysfs.add(DRIVE)
    with pytest.raises(OperationError, match=f"vhost-reactor nvme bind {DRIVE}"):
        open_device(DRIVE, sysfs)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("01:00.0", DRIVE),
        ("0000:01:00.0", DRIVE),
        ("1:0.0", DRIVE),
        ("10000:AB:1f.7", "10000:ab:1f.7"),
    ],
)
def test_addresses_have_one_form(text: str, address: str) -> None:
    assert normal_address(text) == address


@given(st.text(max_size=20))
def test_what_is_no_address_is_refused_and_never_a_path(text: str) -> None:
    try:
        address = normal_address(text)
    except OperationError:
        return
    assert os.sep not in address
    assert normal_address(address) == address


def test_check_says_what_to_do_with_each_drive(sysfs: FakeSysfs) -> None:
    free = sysfs.add("0000:01:00.0", group="1")
    bound = sysfs.add("0000:02:00.0", group="2", driver="vfio-pci")
    used = sysfs.add("0000:03:00.0", group="3")
    sysfs.add_disk(used)
    sysfs.mounts.write_text("25 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n")
    states = [(examine_drive(d).state, str(examine_drive(d))) for d in (free, bound, used)]
    assert [state for state, _ in states] == ["note", "ok", "note"]
    assert "vhost-reactor nvme bind 0000:01:00.0" in states[0][1]
    assert "bdev_nvme_attach_controller" in states[1][1]
    assert "never taken: nvme0n1 is mounted on /" in states[2][1]


def test_check_names_the_kernel_parameter_where_the_iommu_is_off(sysfs: FakeSysfs) -> None:
    lines = [str(finding) for finding in examine(sysfs)]
    assert any("MISSING IOMMU: off" in line and "intel_iommu=on" in line for line in lines)
    (sysfs.root / "proc/cmdline").write_text("root=/dev/sda intel_iommu=on\n")
    lines = [str(finding) for finding in examine(sysfs)]
    assert any("MISSING IOMMU: off" in line and "VT-d on in the firmware" in line for line in lines)


def test_check_shows_a_quota(sysfs: FakeSysfs) -> None:
    (sysfs.root / "proc/self/cgroup").write_text("0::/box\n")
    (sysfs.root / "sys/fs/cgroup/box").mkdir(parents=True)
    (sysfs.root / "sys/fs/cgroup/box/cpu.max").write_text("50000 100000\n")
    assert any("the time of 0.5 CPUs" in str(finding) for finding in examine(sysfs))


# --- addresses of devices

WINDOWS = [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 39) - 1)]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 20)), max_size=60))
def test_device_addresses_never_overlap_nor_leave_their_windows(
    steps: list[tuple[bool, int]],
) -> None:
    addresses = Addresses(WINDOWS)
    live: dict[int, int] = {}
    for free, pages in steps:
        if free and live:
            address = next(iter(live))
            assert addresses.free(address) == live.pop(address)
            continue
        size = pages * 4096
        at = addresses.allocate(size)
        assert at % 4096 == 0
        assert any(first <= at and at + size - 1 <= last for first, last in WINDOWS)
        assert all(at + size <= other or other + n <= at for other, n in live.items())
        live[at] = size


def test_device_addresses_keep_away_from_those_of_devices(sysfs: FakeSysfs) -> None:
    drive = sysfs.add(DRIVE)
    ports = "0x000000000000e000 0x000000000000e0ff 0x0000000000040101"
    memory = "0x0000001000000000 0x00000010000fffff 0x0000000000140204"
    (drive.path / "resource").write_text(f"{memory}\n{'0x0 ' * 3}\n{ports}\n")
    assert sysfs.bus_addresses() == [(0x10_0000_0000, 0x10_000F_FFFF)]
    addresses = Addresses([(1 << 36, (1 << 39) - 1)], sysfs.bus_addresses)
    assert addresses.allocate(PAGE) == 0x10_0010_0000
    assert addresses.allocate(1 << 30) == 0x10_0020_0000


def test_no_room_is_an_error() -> None:
    addresses = Addresses([(0, (4 << 20) - 1)])
    addresses.allocate(2 << 20)
    with pytest.raises(OSError, match="device addresses"):
        addresses.allocate(2 << 20)
