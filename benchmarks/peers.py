"""Other targets beside ours: qemu-storage-daemon, whatever a command starts; and fio on a file."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.servers import QUEUES, Disk, Server, cpu_seconds

QEMU_DAEMON = shutil.which("qemu-storage-daemon")


class Qemu(Server):
    """qemu-storage-daemon: null-co, a file in memory for malloc, O_DIRECT for files."""

    name = "qemu-storage-daemon"

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

    In the command ``{socket}`` is where it shall listen, ``{device}`` blk or scsi, ``{disk}`` null,
    malloc or file, ``{size}`` its bytes, ``{file}`` the file's path, ``{cpu}`` the CPU that it
    shall run on. A server that polls would else take CPU time from whoever's turn it is.
    """

    def __init__(
        self,
        name: str,
        command: str,
        disks: Sequence[Disk],
        folder: Path,
        cpu: int,
        device: str = "blk",
    ) -> None:
        self.name = name
        self.folder = folder
        self._processes: dict[str, psutil.Popen] = {}
        self._log = (folder / "log").open("wb")
        try:
            for disk in disks:
                self._begin(command, disk, cpu, device)
                self.wait_for(folder / disk.kind)
                self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def serves(command: str, device: str) -> bool:
        """Whether a command can be asked for such devices: it says which, or always makes blk."""
        return device == "blk" or "{device}" in command

    def _begin(self, command: str, disk: Disk, cpu: int, device: str) -> None:
        values = {
            "socket": self.folder / disk.kind,
            "device": device,
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
        self._processes[disk.kind] = self.process

    def _signal(self, number: signal.Signals, *kinds: str) -> None:
        for kind in kinds or self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[kind].pid, number)

    @contextlib.contextmanager
    def turn(self, kind: str) -> Iterator[None]:
        """Have the process of one disk run while it lasts."""
        self._signal(signal.SIGCONT, kind)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP, kind)

    def pids(self) -> dict[str, int]:
        """Return the process of each disk."""
        return {kind: process.pid for kind, process in self._processes.items()}

    def cpu_seconds(self) -> float:
        """Return what all of its processes have used so far."""
        return sum(cpu_seconds(process) for process in self._processes.values())

    def close(self) -> None:
        """End all processes."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        processes = list(self._processes.values())
        _gone, alive = psutil.wait_procs(processes, timeout=5)
        if alive:
            self._signal(signal.SIGKILL)
            psutil.wait_procs(alive, timeout=5)
        self._log.close()


@dataclass(frozen=True)
class Fio:
    """What fio reaches on the file itself."""

    iops: float
    cpu: float  # µs of its thread a request, user and system


def fio(path: Path, mode: str, block: int, depth: int, seconds: float, cpu: int) -> Fio | None:
    """Have fio use a file with io_uring, from one CPU; None without fio."""
    program = shutil.which("fio")
    if program is None:
        return None
    command = [
        *(program, "--name=bare", f"--filename={path}", "--ioengine=io_uring", "--direct=1"),
        *(f"--rw={mode}", f"--bs={block}", f"--iodepth={depth}", "--time_based"),
        *(f"--runtime={max(1, round(seconds))}", f"--cpus_allowed={cpu}", "--norandommap"),
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    (job,) = json.loads(done.stdout)["jobs"]
    iops = job["read"]["iops"] + job["write"]["iops"]
    return Fio(iops, (job["usr_cpu"] + job["sys_cpu"]) / 100 / iops * 1e6)
