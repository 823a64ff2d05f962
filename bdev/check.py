"""What this machine can do, and drives changing drivers: the commands ``check`` and ``nvme``."""

import json
import os
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from bdev.pci import VFIO_DRIVER, PciDevice, Sysfs
from reactor.cpumask import available, format_list
from reactor.errors import OperationError
from reactor.failure import Failure
from reactor.native import lib

_DRIVE_MEMORY = 64 << 20  # bytes that a drive's queues and buffers take on a few reactors
_MARKS = {"ok": "ok", "note": "note", "missing": "MISSING"}


@dataclass(frozen=True)
class Finding:
    """One line: ``missing`` is what keeps something from working, ``note`` is worth knowing."""

    state: Literal["ok", "note", "missing"]
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the line."""
        line = f"{_MARKS[self.state]:8}{self.subject}: {self.text}"
        return f"{line}; {self.remedy}" if self.remedy else line


def examine(sysfs: Sysfs) -> Iterator[Finding]:
    """Look at everything."""
    yield from _cpus(sysfs)
    yield _io_uring(sysfs)
    yield _huge_pages(sysfs)
    yield _memlock()
    yield _iommu(sysfs)
    yield _vfio(sysfs)
    drives = sysfs.nvme()
    if not drives:
        yield Finding("note", "NVMe", "there is no drive on the PCI bus")
    for drive in drives:
        yield examine_drive(drive)


def _cpus(sysfs: Sysfs) -> Iterator[Finding]:
    cpus = available()
    yield Finding("ok", "CPUs", f"{len(cpus)} for reactors: {format_list(cpus)}")
    quota, _, period = sysfs.read(_cgroup(sysfs) / "cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        share = int(quota) / int(period)
        state: Literal["ok", "note"] = "note" if share < len(cpus) else "ok"
        remedy = "a reactor that polls uses it up; raise cpu.max, or start with --poll never"
        text = f"the cgroup allows the time of {share:g} CPUs"
        yield Finding(state, "CPU quota", text, remedy if state == "note" else "")


def _cgroup(sysfs: Sysfs) -> Path:
    """Return the folder of our cgroup, of version 2."""
    for line in sysfs.read(sysfs.root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            return sysfs.root / "sys/fs/cgroup" / line[3:].lstrip("/")
    return sysfs.root / "sys/fs/cgroup"


def _io_uring(sysfs: Sysfs) -> Finding:
    rc = lib.uring_probe()
    if rc == 0:
        return Finding("ok", "io_uring", "allowed")
    switch = sysfs.read(sysfs.root / "proc/sys/kernel/io_uring_disabled")
    if switch not in ("", "0"):
        remedy = "run: sysctl kernel.io_uring_disabled=0"
        return Finding("note", "io_uring", f"kernel.io_uring_disabled is {switch}", remedy)
    remedy = (
        "file disks are faster with it: allow its system calls in the container's seccomp profile"
    )
    return Finding("note", "io_uring", f"refused: {os.strerror(-rc)}", remedy)


def _huge_pages(sysfs: Sysfs) -> Finding:
    found = []
    for folder in sorted((sysfs.root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        free = sysfs.read(folder / "free_hugepages")
        if free not in ("", "0"):
            size = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
            found.append(f"{free} of {size // 1024} MiB")
    text = f"{', '.join(found)} are free" if found else "none are free; nothing here needs any"
    return Finding("ok", "huge pages", text)


def _memlock() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("ok", "locked memory", "unlimited")
    if _may_lock():
        return Finding("ok", "locked memory", "unlimited for us, who have CAP_IPC_LOCK")
    text = f"{limit >> 10} KiB; drives lock their queues and, with dma=guest, guests' memory"
    remedy = "raise it: ulimit -l, LimitMEMLOCK= of a systemd unit, or /etc/security/limits.conf"
    return Finding("note" if limit >= _DRIVE_MEMORY else "missing", "locked memory", text, remedy)


def _may_lock() -> bool:
    """Whether CAP_IPC_LOCK (14) is among our effective capabilities."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 14 & 1)
    return False


def _iommu(sysfs: Sysfs) -> Finding:
    count = len(list(sysfs.groups.iterdir())) if sysfs.groups.is_dir() else 0
    if count:
        return Finding("ok", "IOMMU", f"on, {count} groups")
    given = "intel_iommu=on" in sysfs.read(sysfs.root / "proc/cmdline").split()
    remedy = (
        "switch VT-d on in the firmware"
        if given
        else "switch it on in the firmware (VT-d, AMD-Vi) and boot with intel_iommu=on on Intel"
    )
    return Finding("missing", "IOMMU", "off: drives cannot be driven from user space", remedy)


def _vfio(sysfs: Sysfs) -> Finding:
    node = sysfs.root / "dev/vfio/vfio"
    if not node.exists():
        return Finding("missing", "VFIO", f"no {node}", "run: modprobe vfio-pci")
    if not (sysfs.drivers / VFIO_DRIVER).exists():
        return Finding("missing", "VFIO", "vfio-pci is not loaded", "run: modprobe vfio-pci")
    if not os.access(node, os.R_OK | os.W_OK):
        return Finding("missing", "VFIO", f"{node} is not ours to open", f"run: chmod 666 {node}")
    return Finding("ok", "VFIO", "vfio-pci is loaded")


def examine_drive(drive: PciDevice) -> Finding:
    """Say whether a drive can be taken over, or what is in the way."""
    subject = f"NVMe {drive.address}"
    names = ", ".join(drive.block_devices())
    what = f"{drive.ids}, driver {drive.driver or 'none'}, group {drive.group or 'none'}"
    if names:
        what += f", {names}"
    uses = drive.uses()
    if uses:
        return Finding("note", subject, f"{what}; in use, never taken: {'; '.join(uses)}")
    try:
        drive.check_takeable()
    except OperationError as error:
        reason = error.message.removeprefix(f"{drive.address}: ")
        return Finding("missing", subject, what, reason)
    if drive.driver != VFIO_DRIVER:
        remedy = f"to take it: vhost-reactor nvme bind {drive.address}"
        return Finding("note", subject, f"{what}; free", remedy)
    node = drive.sysfs.root / "dev/vfio" / drive.group
    if not os.access(node, os.R_OK | os.W_OK):
        remedy = f"run as root, or: chown $USER {node}"
        return Finding("missing", subject, f"{what}; {node} is not ours to open", remedy)
    remedy = f"attach it: bdev_nvme_attach_controller trtype=PCIe traddr={drive.address}"
    return Finding("ok", subject, what, remedy)


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print a list of findings.")
def check_command(*, as_json: bool) -> None:
    """Say what this machine can do, and what is missing for the rest, with the remedy.

    Exit status 1 if anything is missing.
    """
    findings = list(examine(Sysfs()))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(str(finding))
    raise SystemExit(any(finding.state == "missing" for finding in findings))


@click.group("nvme")
def nvme_group() -> None:
    """Move NVMe drives between the kernel's driver and vfio-pci."""


@nvme_group.command()
@click.argument("address")
def bind(address: str) -> None:
    """Give the drive at ADDRESS to vfio-pci. One that is in use is refused."""
    drive = _find(address)
    try:
        before = drive.bind()
    except OperationError as error:
        raise Failure(error.message) from None
    had = f"it had {before}" if before != VFIO_DRIVER else "as it was"
    click.echo(f"{drive.address}: has driver {VFIO_DRIVER} ({had}), group {drive.group}")


@nvme_group.command()
@click.argument("address")
@click.option("--driver", default="nvme", show_default=True, help="The driver to give it to.")
def unbind(address: str, driver: str) -> None:
    """Give the drive at ADDRESS back to the kernel's driver. Detach it first."""
    drive = _find(address)
    try:
        drive.unbind(driver)
    except OperationError as error:
        raise Failure(error.message) from None
    click.echo(f"{drive.address}: has driver {drive.driver or 'none'}")


@nvme_group.command("list")
def list_drives() -> None:
    """List the drives of this machine."""
    for drive in Sysfs().nvme():
        click.echo(str(examine_drive(drive)))


def _find(address: str) -> PciDevice:
    try:
        return Sysfs().find(address)
    except OperationError as error:
        raise Failure(error.message) from None
