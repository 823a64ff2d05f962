"""The guest's root file system: busybox, some tools of the host, drivers, and an agent."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.guest import kernel as kernels
from tests.guest.cpio import Archive

ROOTFS = Path(__file__).with_name("rootfs")
DRIVERS = ("virtio_pci", "virtio_blk", "ext4")
TOOLS = ("mke2fs", "e2fsck", "blkdiscard", "fstrim")
SCSI_DRIVERS = ("virtio_scsi", "sd_mod", "sg")
SCSI_TOOLS = (
    *("sg_inq", "sg_vpd", "sg_readcap", "sg_modes", "sg_opcodes", "sg_persist", "sg_unmap"),
    *("sg_write_same", "sg_compare_and_write", "sg_verify", "sg_reset", "sg_luns", "sg_logs"),
    *(
        "sg_turs",
        "sg_sync",
        "sg_raw",
        "sg_requests",
        "sg_get_lba_status",
        "iscsi-test-cu",
        "sg_xcopy",
    ),
)
_LIBRARY = re.compile(r"(/\S+) \(0x")


class ToolMissingError(RuntimeError):
    """The host has no such program; the message says which and where it comes from."""


def find_tool(name: str) -> Path:
    """Return the path of a program of the host, administrators' programs included."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise ToolMissingError(f"{name} is needed for the guest tests: run make setup-test")
    return Path(found)


def build(kernel: kernels.Kernel, *, scsi: bool = False, more: Sequence[str] = ()) -> bytes:
    """Return an uncompressed archive: emulated processors are slow to unpack.

    ``scsi`` adds the drivers of SCSI disks, and programs that send commands to them; ``more`` are
    further programs of the host.
    """
    archive = base(kernel, (*DRIVERS, *(SCSI_DRIVERS if scsi else ())))
    for tool in (*TOOLS, *(SCSI_TOOLS if scsi else ()), *more):
        _add_program(archive, find_tool(tool))
    return archive.to_bytes()


def base(kernel: kernels.Kernel, drivers: Sequence[str]) -> Archive:
    """Return busybox, the agent, the load, and ``drivers`` with what they need."""
    archive = Archive()
    for empty in ("dev", "proc", "sys", "tmp", "mnt"):
        archive.add_directory(empty)
    for script in ("init", "agent"):
        where = "init" if script == "init" else f"bin/{script}"
        archive.add_file(where, (ROOTFS / script).read_bytes(), 0o755)
    archive.add_file("bin/busybox", find_tool("busybox").read_bytes(), 0o755)
    archive.add_file("bin/blkverify", _compile(ROOTFS / "blkverify.c"), 0o755)
    archive.add_link("etc/mtab", "/proc/mounts")
    order = []
    for path in kernel.load_order(*drivers):
        name = path.name.partition(".ko")[0] + ".ko"
        archive.add_file(f"modules/{name}", kernels.read_module(path))
        order.append(name)
    archive.add_file("modules/order", "".join(f"{name}\n" for name in order).encode())
    return archive


def _add_program(archive: Archive, program: Path) -> None:
    # /sbin comes first in the PATH of the guest: busybox has some of these too, with fewer options.
    archive.add_file(f"sbin/{program.name}", program.resolve().read_bytes(), 0o755)
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in _LIBRARY.findall(listing):
        if library not in archive:
            archive.add_file(library, Path(library).resolve().read_bytes(), 0o755)


@functools.cache
def _compile(source: Path) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / source.stem
        flags = ["-std=gnu17", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror"]
        command = [str(find_tool("gcc")), *flags, str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        return program.read_bytes()
