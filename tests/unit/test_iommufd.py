"""iommufd, the kernel's newer interface to devices.

The kernels of the test machines have no IOMMU, and that of the guest no iommufd: what is asked of
the kernel is seen here at the system calls, by the offsets of the kernel's headers, and answered in
its place. That a device then does DMA is not shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bdev.pci import PciDevice
from tests.support.sysfs import FakeSysfs

ROOT = Path(__file__).resolve().parents[2]
DRIVE = "0000:01:00.0"
SCRIPT = """
import os, sys
from pathlib import Path
from bdev.pci import Sysfs
from bdev import vfio_space
from reactor.errors import OperationError
import logging
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
device = Sysfs(Path(sys.argv[1])).find("0000:01:00.0")
try:
    space, fd = vfio_space.open_in_space(device)
except OperationError as error:
    sys.exit(f"refused: {error.message}")
print(type(space).__name__)
memory = os.memfd_create("memory")
os.write(memory, b"x" * 8192)
ours = space.map(memory, 0, 8192)
guest = space.map(memory, 4096, 4096, 1 << 36)
print(f"{ours:#x} {guest:#x}")
space.unmap(guest)
space.unmap(ours)
os.close(memory)
vfio_space.close_in_space(device, fd)
print(sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if n > "2" and os.path.lexists(f"/proc/self/fd/{n}")))
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that answers in the kernel's place."""
    library = tmp_path_factory.mktemp("kernel") / "iommufd_kernel.so"
    source = ROOT / "tests/support/iommufd_kernel.c"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", source, "-o", library]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    sysfs = FakeSysfs(tmp_path)
    sysfs.add(DRIVE, driver="vfio-pci")
    (sysfs.devices / DRIVE / "vfio-dev/vfio3").mkdir(parents=True)
    (tmp_path / "dev/vfio/devices").mkdir(parents=True)
    (tmp_path / "dev/vfio/devices/vfio3").touch()
    (tmp_path / "dev/iommu").touch()
    return sysfs


def run(kernel: Path, sysfs: FakeSysfs, **environment: str) -> tuple[str, list[str]]:
    """Open a device, map memory and unmap it; return the output, and what the kernel was asked."""
    log = sysfs.root / "log"
    added = {"LD_PRELOAD": str(kernel), "IOMMUFD_LOG": str(log), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sysfs.root)],
        cwd=ROOT,
        env=os.environ | added,
        capture_output=True,
        text=True,
        check=False,
    )
    asked = log.read_text().splitlines() if log.exists() else []
    return done.stdout + done.stderr, asked


needs_preload = pytest.mark.skipif(
    "LD_PRELOAD" in os.environ, reason="the sanitizers have the place of what is preloaded"
)


@needs_preload
def test_what_the_kernel_is_asked_is_what_its_headers_say(kernel: Path, sysfs: FakeSysfs) -> None:
    output, asked = run(kernel, sysfs)
    assert "IommufdSpace\n0x100000 0x1000000000\n" in output
    assert "iommu" not in output.splitlines()[-1], "nothing stays open"
    assert "device" not in output.splitlines()[-1]
    assert asked == [
        "alloc 12 0",
        "bind 16 0 1",
        "attach 12 0 7",
        "ranges 32 0",
        "map 40 0x7 7 0 0x2000 0x100000",
        "map 40 0x7 7 0 0x1000 0x1000000000",
        "unmap 24 7 0x1000000000 0x1000",
        "unmap 24 7 0x100000 0x2000",
    ]


@needs_preload
@pytest.mark.parametrize("request_number", ["0x3b81", "0x3b76", "0x3b77"])
def test_where_iommufd_fails_the_older_interface_is_used(
    kernel: Path, sysfs: FakeSysfs, request_number: str
) -> None:
    output, _ = run(kernel, sysfs, IOMMUFD_REFUSE=request_number)
    assert "iommufd is not used: " in output
    # This machine may have no VFIO at all: that is what the older interface is refused for.
    assert "GroupSpace" in output or "refused: /dev/vfio" in output


def test_a_device_has_a_file_of_its_own_where_the_kernel_makes_one(sysfs: FakeSysfs) -> None:
    device = PciDevice(sysfs, DRIVE)
    assert device.cdev == sysfs.root / "dev/vfio/devices/vfio3"
    (sysfs.root / "dev/iommu").unlink()
    assert device.cdev is None


def test_without_such_a_file_there_is_none(tmp_path: Path) -> None:
    assert FakeSysfs(tmp_path).add(DRIVE, driver="vfio-pci").cdev is None
