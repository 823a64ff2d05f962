"""Targets to measure: what every one can do, and this one; see benchmarks.peers for others."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from reactor.native import lib
from reactor.rpc_client import RpcClient
from vhost.frontend import BlkFrontend
from vhost.frontend_link import FrontendError, Link
from vhost.frontend_scsi_disk import ScsiDisk
from vhost.io import Disk as Front
from vhost.messages import Feature, Request

READY = 30.0  # seconds that a target may take to listen
QUEUES = 8  # of each disk
SETTLED = 5.0  # seconds that it gets to settle after its disks were filled
REGISTERED = "registered"  # a controller of the same disk that registers guest memory with io_uring


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to serve: ``kind`` is null, malloc or file; ``size`` in bytes."""

    kind: str
    size: int
    path: Path
    """Of the file; for malloc the place where a peer without such a disk keeps a file in memory."""


def cpu_seconds(process: psutil.Process) -> float:
    """Return user and system time of a process and its children so far."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        times = each.cpu_times()
        total += times.user + times.system
    return total


class Server:
    """A process that serves each disk at the socket ``folder / kind``, pinned on ``cpus``."""

    name = ""

    def __init__(self, command: Sequence[str], folder: Path, *cpus: int) -> None:
        self.folder = folder
        self._log = (folder / "log").open("wb")
        self._command, self._cpus = command, cpus
        self._start()

    def _start(self) -> None:
        self.process = psutil.Popen(
            self._command,
            stdout=self._log,
            stderr=self._log,
            cwd=Path(__file__).parent.parent,
            preexec_fn=lambda: os.sched_setaffinity(0, self._cpus),
        )

    def socket(self, kind: str, _device: str = "blk") -> str:
        """Return the path of the vhost-user socket of a disk."""
        return str(self.folder / kind)

    def cpu_seconds(self) -> float:
        """Return user and system time of the process and its children so far."""
        return cpu_seconds(self.process)

    def settle(self) -> None:
        """Return when what the server does in the background is done."""

    def open(self, kind: str, device: str = "blk", *, packed: bool = False) -> Front:
        """Connect a front-end to a disk; ``device`` is blk, scsi or REGISTERED."""
        front = ScsiDisk if device == "scsi" else BlkFrontend
        return front(self.socket(kind, device), packed=packed)

    @contextlib.contextmanager
    def turn(self, _kind: str) -> Iterator[None]:
        """Have one disk measured: whoever shares the CPU must not take any of it meanwhile."""
        yield

    def wait_for(self, path: Path) -> None:
        """Wait until a socket is there; RuntimeError with the log if the process ends instead."""
        end = time.monotonic() + READY
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                log = (self.folder / "log").read_text()
                self.close()
                raise RuntimeError(f"{self.name} does not serve {path}:\n{log}")
            time.sleep(0.02)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Ours(Server):
    """A cluster with a reactor on each of ``cpus``, and a configuration to begin with."""

    name = "vhost-reactor"

    def __init__(
        self, disks: Sequence[Disk], folder: Path, *cpus: int, config: Path | None = None
    ) -> None:
        run_dir = folder / "run"
        run_dir.mkdir(mode=0o700)
        command = [
            *(sys.executable, "-m", "vhost.cli", "start"),
            *("-m", f"[{','.join(map(str, cpus))}]"),
            *("--run-dir", str(run_dir), "-S", str(folder), "--lock-dir", str(folder)),
            *("--log-level", "warning"),
            *(("-c", str(config)) if config else ()),
        ]
        super().__init__(command, folder, *cpus)
        self.wait_for(run_dir / "rpc.sock")
        try:
            with RpcClient(run_dir / "rpc.sock", timeout=READY) as rpc:
                for disk in disks:
                    self._serve(rpc, disk)
        except BaseException:
            self.close()
            raise

    def kill_control(self) -> None:
        """Kill the control process, and start the next one."""
        self.process.kill()
        self.process.wait()
        self._start()

    def settle(self) -> None:
        """Wait until what was written is in huge pages, if this system has any."""
        end = time.monotonic() + SETTLED
        with RpcClient(self.folder / "run" / "rpc.sock", timeout=READY) as rpc:
            while time.monotonic() < end:
                (disk,) = rpc.call("bdev_get_bdevs", {"name": "malloc"})
                pages = disk["driver_specific"]["malloc"]["transparent_huge_pages"]
                if pages * lib.COLLAPSE_EXTENT >= disk["num_blocks"] * disk["block_size"]:
                    return
                time.sleep(0.1)

    def _serve(self, rpc: RpcClient, disk: Disk) -> None:
        blocks = {"num_blocks": disk.size // 512, "block_size": 512}
        if disk.kind == "file":
            file = {"name": "file", "filename": str(disk.path), "block_size": 512}
            rpc.call("bdev_uring_create", file)
        else:
            rpc.call(f"bdev_{disk.kind}_create", {"name": disk.kind, **blocks})
        rpc.call(
            "vhost_create_blk_controller",
            {"ctrlr": disk.kind, "dev_name": disk.kind, "packed_ring": True},
        )
        if disk.kind == "file":
            params = {"ctrlr": self._name(disk.kind, REGISTERED), "dev_name": disk.kind}
            rpc.call("vhost_create_blk_controller", {**params, "registered_buffers": True})

    def socket(self, kind: str, device: str = "blk") -> str:
        """See Server."""
        return super().socket(self._name(kind, device))

    @staticmethod
    def _name(kind: str, device: str) -> str:
        return kind if device == "blk" else f"{kind}-{device}"


class OursScsi(Ours):
    """The same, with each disk behind virtio-blk and behind virtio-scsi."""

    def _serve(self, rpc: RpcClient, disk: Disk) -> None:
        super()._serve(rpc, disk)
        name = self._name(disk.kind, "scsi")
        rpc.call("vhost_create_scsi_controller", {"ctrlr": name})
        place = {"ctrlr": name, "scsi_target_num": 0, "bdev_name": disk.kind}
        rpc.call("vhost_scsi_controller_add_target", place)


def listening(server: Server, disk: Disk, device: str = "blk") -> Feature:
    """Wait until a server accepts front-ends for a disk (one at a time, for some).

    Returns the features that it offers; raises FrontendError when it has been waited for too long.
    """
    end = time.monotonic() + READY
    while True:
        try:
            link = Link(server.socket(disk.kind, device))
            try:
                return Feature(link.number(Request.GET_FEATURES))
            finally:
                link.close()
        except FrontendError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
