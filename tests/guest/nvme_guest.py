"""A machine with an IOMMU and NVMe drives, in which a cluster of ours drives them through VFIO."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.guest import initramfs
from tests.guest import kernel as kernels
from tests.guest.guest import Guest, GuestError, Result
from tests.guest.python_image import HOME, PROJECT, add_python

MIB = 1 << 20
DRIVE_MIB = 64
DRIVERS = ("nvme", "vfio_pci", "vfio_iommu_type1", "ext4")
RUN = "/tmp/cluster"
LOG = "/tmp/cluster.log"
AGENT, REQUESTS, ANSWERS = "/tmp/inside.log", "/tmp/inside.requests", "/tmp/inside.answers"
_ENVIRONMENT = f"cd /{PROJECT}; export HOME=/tmp PYTHONHOME=/{HOME} PYTHONPATH=/{PROJECT}; "
_PYTHON = f"/{HOME}/bin/python3"
_OURS = f"{_PYTHON} -c 'from vhost.cli import main; main()'"
# The same, with more patience for reactors: an emulated processor starts several of them at once.
_WAIT = "import reactor.cluster as c; c.READY_TIMEOUT = 90"
_PATIENT = f"{_PYTHON} -c '{_WAIT}; from vhost.cli import main; main()'"
_SLOW = 60.0  # seconds: an emulated processor takes its time to start Python


def _root(kernel: kernels.Kernel) -> bytes:
    archive = initramfs.base(kernel, DRIVERS)
    add_python(archive)
    archive.add_file(f"{PROJECT}/inside.py", (initramfs.ROOTFS / "inside.py").read_bytes())
    return archive.to_bytes()


class NvmeGuest:
    """The first drive has two namespaces of 512-byte blocks, the second one of 4096-byte blocks."""

    FIRST, SECOND = "0000:00:10.0", "0000:00:11.0"

    def __init__(self, directory: Path) -> None:
        self.images = [directory / f"drive{i}.img" for i in range(3)]
        devices = ["-device", "intel-iommu,intremap=on,caching-mode=on"]
        for index, image in enumerate(self.images):
            image.write_bytes(bytes(DRIVE_MIB * MIB))
            devices += ["-drive", f"id=d{index},if=none,format=raw,discard=unmap,file={image}"]
        for number, blocks in ((0, [0, 1]), (1, [2])):
            devices += ["-device", f"nvme,id=n{number},serial=TEST{number},addr={16 + number:#x}"]
            for nsid, index in enumerate(blocks, 1):
                size = 4096 if index == 2 else 512
                sizes = f"logical_block_size={size},physical_block_size={size}"
                devices += ["-device", f"nvme-ns,drive=d{index},bus=n{number},nsid={nsid},{sizes}"]
        self.guest = Guest(
            directory,
            [],
            machine="q35,kernel-irqchip=split",
            memory_mib=768,
            cpus=2,
            devices=devices,
            parameters="intel_iommu=on",
            root=_root,
        )
        self.guest.run(f"ifconfig lo up; mkfifo {REQUESTS} {ANSWERS}")
        self._serves = False

    def __enter__(self) -> NvmeGuest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.guest.kill()

    def run(self, command: str) -> Result:
        """Run a shell command."""
        return self.guest.run(command, _SLOW)

    def ask(self, *request: str, status: int | None = 0) -> Result:
        """Have the process that inside.py is in the guest do something."""
        if not self._serves:  # not while a cluster starts: there is little processor to share
            serve = f"{_ENVIRONMENT}{_PYTHON} -m inside serve {REQUESTS} {ANSWERS}"
            self.guest.start(serve, AGENT)
            self._serves = True
        line = shlex.quote(json.dumps(request))
        answer = self.guest.run(f"echo {line} >{REQUESTS}; cat {ANSWERS}", _SLOW).output
        number, _, output = answer.partition("\n")
        if status is not None and number != str(status):
            log = self.guest.run(f"cat {LOG} {AGENT}", status=None).output
            raise GuestError(f"{request} ended with {number}:\n{output}\n--- cluster ---\n{log}")
        return Result(" ".join(request), int(number), output)

    def ours(self, arguments: str, *, status: int | None = 0) -> Result:
        """Run ``vhost-reactor``."""
        return self.ask("vhost-reactor", *shlex.split(arguments), status=status)

    def start_ours(self, arguments: str, output: str) -> None:
        """Start ``vhost-reactor`` in the background; see Guest.start()."""
        self.guest.start(f"{_ENVIRONMENT}{_OURS} {arguments}", output)

    def unbind(self, address: str, *disks: str) -> None:
        """Give a drive back to the kernel, and wait for what the kernel then has."""
        self.ours(f"nvme unbind {address}")
        self.wait_for_disks(*disks)

    def wait_for_disks(self, *disks: str) -> None:
        """Wait for block devices of the kernel, which looks at a drive in its own time."""
        for disk in disks:
            self.run(f"until [ -b {disk} ]; do usleep 20000; done")

    def start_cluster(self, cpus: str = "0x3") -> None:
        """Start a cluster and wait until it is ready."""
        self.guest.run(f"rm -rf {RUN} {LOG}*; mkdir -m 700 {RUN}")
        self._start_control(cpus)

    def replace_control(self, cpus: str = "0x3") -> None:
        """Kill the control process and start the next one, which takes over what is left."""
        self.guest.run(f"kill -9 $(cat {LOG}.pid); true")  # unless it has died already
        self.guest.wait(LOG, _SLOW)
        self.guest.run(f"mv {LOG} {LOG}.former; rm {LOG}.status")
        self._start_control(cpus)

    def _start_control(self, cpus: str) -> None:
        paths = f"--run-dir {RUN} -S {RUN} -r {RUN}/rpc.sock --lock-dir {RUN}"
        start = f"{_PATIENT} start -m {cpus} {paths}"
        self.guest.start(f"{_ENVIRONMENT}{start} & echo $! >{LOG}.pid; wait $!", LOG)
        ended = f"[ -e {LOG}.status ] && exit 1"
        wait = f"until grep -q 'is ready' {LOG}; do {ended}; usleep 200000; done"
        if self.guest.run(wait, 2 * _SLOW, status=None).status != 0:
            raise GuestError(self.guest.run(f"cat {LOG}").output)

    def stop_cluster(self) -> Result:
        """End it as an operator does, and return what it wrote."""
        self.guest.run(f"kill $(cat {LOG}.pid)")
        return self.guest.wait(LOG, _SLOW)

    def rpc(self, method: str, **params: Any) -> Any:
        """Call a method of the cluster."""
        given = " ".join(f"{k}={shlex.quote(str(v))}" for k, v in params.items())
        answer = self.ours(f"rpc -s {RUN}/rpc.sock {method} {given}").output
        return json.loads(answer)

    def serve(self, name: str, bdev: str, **params: Any) -> str:
        """Serve a device and return its socket."""
        self.rpc("vhost_create_blk_controller", ctrlr=name, dev_name=bdev, **params)
        return f"{RUN}/{name}"

    def serve_scsi(self, name: str, bdev: str) -> str:
        """Serve a device as target 0 of a vhost-scsi controller; return what inside.py calls it."""
        self.rpc("vhost_create_scsi_controller", ctrlr=name)
        self.rpc("vhost_scsi_controller_add_target", ctrlr=name, scsi_target_num=0, bdev_name=bdev)
        return f"scsi:{RUN}/{name}"

    def wait_for_bdevs(self, *names: str) -> None:
        """Wait until there are just these."""
        deadline = time.monotonic() + _SLOW
        while (found := [bdev["name"] for bdev in self.rpc("bdev_get_bdevs")]) != list(names):
            if time.monotonic() > deadline:
                log = self.guest.run(f"cat {LOG}").output
                raise GuestError(f"bdevs are {found}, not {names}\n{log}")

    def inside(self, verb: str, where: str, offset: int, length: int, seed: int = 0) -> str:
        """Run inside.py, and return its answer."""
        return self.ask("inside", verb, where, str(offset), str(length), str(seed)).output.strip()

    def queues(self, controller: str) -> Sequence[dict[str, Any]]:
        """Return what a controller says of its queue pairs."""
        (entry,) = self.rpc("bdev_nvme_get_controllers", name=controller)
        return list(entry["ctrlrs"][0]["queues"])

    def busy_queues(self, controller: str, count: int) -> Sequence[dict[str, Any]]:
        """Wait until ``count`` queue pairs have completed commands, and return them."""
        deadline = time.monotonic() + _SLOW
        while time.monotonic() < deadline:
            queues = self.queues(controller)
            if len(queues) == count and all(queue["completions"] for queue in queues):
                return queues
            time.sleep(0.5)  # asking takes as much of the processor as they have
        raise GuestError(f"{controller}: its queue pairs are {queues}")


def pattern(length: int, seed: int) -> bytes:
    """Return what inside.py writes."""
    return random.Random(seed).randbytes(length)


def digest(data: bytes) -> str:
    """Return what inside.py says of these bytes."""
    return hashlib.sha256(data).hexdigest()
