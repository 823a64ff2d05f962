"""Targets to measure: this one, qemu-storage-daemon, and any other, doing the same work."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from reactor.native import lib
from reactor.rpc_client import RpcClient
from vhost.frontend_link import FrontendError, Link

QEMU_DAEMON = shutil.which("qemu-storage-daemon")
READY = 15.0  # seconds that a target may take to listen
QUEUES = 8  # of each disk
SETTLED = 5.0  # seconds that it gets to settle after its disks were filled


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to serve: ``kind`` is null, malloc or file; ``size`` in bytes."""

    kind: str
    size: int
    path: Path
    """Of the file; for malloc the place where a peer without such a disk keeps a file in memory."""


class Server:
    """A process that serves each disk at the socket ``folder / kind``, pinned on ``cpus``."""

    name = ""
    packed = True
    """Whether it serves packed rings."""

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

    def socket(self, kind: str) -> str:
        """Return the path of the vhost-user socket of a disk."""
        return str(self.folder / kind)

    def cpu_seconds(self) -> float:
        """Return user and system time of the process and its children so far."""
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
        return total

    def settle(self) -> None:
        """Return when what the server does in the background is done."""

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Be measured: the others share the CPU, and must not take any of it."""
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


class OursScsi(Ours):
    """The same, with each disk behind virtio-blk, and another one behind virtio-scsi."""

    def _serve(self, rpc: RpcClient, disk: Disk) -> None:
        super()._serve(rpc, disk)
        blocks = {"num_blocks": disk.size // 512, "block_size": 512}
        name = scsi_name(disk.kind)
        rpc.call(f"bdev_{disk.kind}_create", {"name": name, **blocks})
        rpc.call("vhost_create_scsi_controller", {"ctrlr": name})
        place = {"ctrlr": name, "scsi_target_num": 0, "bdev_name": name}
        rpc.call("vhost_scsi_controller_add_target", place)


def scsi_name(kind: str) -> str:
    """Return the name of the controller that serves a disk as SCSI."""
    return f"{kind}-scsi"


class Qemu(Server):
    """qemu-storage-daemon: null-co, a file in memory for malloc, O_DIRECT for files."""

    name = "qemu-storage-daemon"
    packed = False

    def __init__(self, disks: Sequence[Disk], folder: Path, cpu: int) -> None:
        if QEMU_DAEMON is None:
            raise RuntimeError("qemu-storage-daemon is not installed")
        command = [QEMU_DAEMON]
        for disk in disks:
            command += ["--blockdev", f"node-name={disk.kind},{self._how(disk)}"]
            export = f"id={disk.kind},node-name={disk.kind},addr.path={folder / disk.kind}"
            command += [
                "--export",
                f"type=vhost-user-blk,{export},addr.type=unix,writable=on,num-queues={QUEUES}",
            ]
        super().__init__(command, folder, cpu)
        for disk in disks:
            self.wait_for(folder / disk.kind)

    @staticmethod
    def _how(disk: Disk) -> str:
        match disk.kind:
            case "null":
                return f"driver=null-co,size={disk.size},read-zeroes=off"
            case "malloc":  # tmpfs has no O_DIRECT
                return f"driver=file,aio=io_uring,filename={disk.path}"
            case _:
                return f"driver=file,aio=io_uring,cache.direct=on,filename={disk.path}"


class Peer(Server):
    """Any server that a shell command starts, once for each disk; stopped (SIGSTOP) between turns.

    In the command ``{socket}`` is where it shall listen, ``{disk}`` null, malloc or file,
    ``{size}`` its bytes, ``{file}`` the file's path, ``{cpu}`` the CPU that it shall run on. A
    server that polls would else take CPU time from whoever's turn it is.
    """

    def __init__(
        self, name: str, command: str, disks: Sequence[Disk], folder: Path, cpu: int
    ) -> None:
        self.name = name
        self.folder = folder
        self._processes: list[psutil.Popen] = []
        self._log = (folder / "log").open("wb")
        try:
            for disk in disks:
                self._begin(command, disk, cpu)
                self.wait_for(folder / disk.kind)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def _begin(self, command: str, disk: Disk, cpu: int) -> None:
        values = {
            "socket": self.folder / disk.kind,
            "disk": disk.kind,
            "size": disk.size,
            "file": disk.path,
            "cpu": cpu,
        }
        for key, value in values.items():
            command = command.replace(f"{{{key}}}", shlex.quote(str(value)))
        self.process = psutil.Popen(
            ["/bin/sh", "-c", command],
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        )
        self._processes.append(self.process)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Run while it lasts."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Return what all of its processes have used so far."""
        total = 0.0
        for process in self._processes:
            for each in [process, *process.children(recursive=True)]:
                times = each.cpu_times()
                total += times.user + times.system
        return total

    def close(self) -> None:
        """End all processes."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        _gone, alive = psutil.wait_procs(self._processes, timeout=5)
        if alive:
            self._signal(signal.SIGKILL)
            psutil.wait_procs(alive, timeout=5)
        self._log.close()


def listening(server: Server, disk: Disk) -> None:
    """Wait until a server accepts front-ends for a disk (one at a time, for some)."""
    end = time.monotonic() + READY
    while True:
        try:
            Link(server.socket(disk.kind)).close()
        except FrontendError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def fio(path: Path, mode: str, block: int, depth: int, seconds: float, cpu: int) -> float | None:
    """Return the IOPS that fio reaches on the file itself with io_uring; None without fio."""
    program = shutil.which("fio")
    if program is None:
        return None
    command = [
        *(program, "--name=bare", f"--filename={path}", "--ioengine=io_uring", "--direct=1"),
        *(f"--rw={mode}", f"--bs={block}", f"--iodepth={depth}", "--time_based", "--minimal"),
        *(f"--runtime={max(1, round(seconds))}", f"--cpus_allowed={cpu}", "--norandommap"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    fields = done.stdout.splitlines()[-1].split(";")
    return float(fields[7]) + float(fields[48])  # fio(1), terse version 3: IOPS of reads, of writes
