"""What serves disks to guests: our own cluster, and a peer that must pass the same tests."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.guest.initramfs import find_tool
from tests.support.cluster import Cluster
from tests.support.waiting import PATIENCE, wait_until

DISK_MIB = 64
BLOCK_SIZE = 512


@dataclass(frozen=True)
class Disk:
    """A disk that is served, and what a guest should see of it."""

    name: str
    kind: str
    socket: Path
    serial: str
    image: Path | None = None  # the file that holds the bytes


class DiskServer(Protocol):
    """Something that serves vhost-user-blk disks of DISK_MIB."""

    kinds: tuple[str, ...]
    packed: bool
    """Whether the disks offer packed rings."""

    def add_disk(
        self, name: str, kind: str, *, cpu: int | None = None, readonly: bool = False
    ) -> Disk:
        """Serve a new disk, full of zeroes; on the reactor of ``cpu`` if there are reactors."""

    def check_alive(self) -> None:
        """AssertionError if something has ended that should run."""


class ClusterServer:
    """Our cluster, through its JSON-RPC."""

    kinds: tuple[str, ...] = ("malloc", "file")

    def __init__(self, cluster: Cluster, directory: Path, *, packed: bool = False) -> None:
        self.cluster = cluster
        self.packed = packed
        self._directory = directory
        self._reactors = cluster.reactors()

    def add_disk(
        self,
        name: str,
        kind: str,
        *,
        cpu: int | None = None,
        readonly: bool = False,
        packed: bool = False,
    ) -> Disk:
        """Create a bdev and a controller, both called ``name``."""
        image: Path | None = None
        if kind == "malloc":
            blocks = DISK_MIB * 2**20 // BLOCK_SIZE
            self.cluster.rpc(
                "bdev_malloc_create", name=name, num_blocks=blocks, block_size=BLOCK_SIZE
            )
        else:
            image = _make_image(self._directory / f"{name}.img")
            self.cluster.rpc(
                "bdev_uring_create", name=name, filename=str(image), block_size=BLOCK_SIZE
            )
        place: dict[str, Any] = {} if cpu is None else {"cpumask": hex(1 << cpu)}
        self.cluster.rpc(
            "vhost_create_blk_controller",
            ctrlr=name,
            dev_name=name,
            readonly=readonly,
            packed_ring=self.packed or packed,
            **place,
        )
        return Disk(name, kind, self.cluster.socket(name), name, image)

    def check_alive(self) -> None:
        """AssertionError if the control process has ended, or a reactor was replaced."""
        assert self.cluster.running, self.cluster.log
        assert self.cluster.reactors() == self._reactors, self.cluster.log


class StorageDaemon:
    """qemu-storage-daemon: a process for each disk."""

    kinds: tuple[str, ...] = ("file",)
    packed = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    def add_disk(
        self,
        name: str,
        kind: str,
        *,
        cpu: int | None = None,  # noqa: ARG002  it has no reactors to choose from
        readonly: bool = False,
    ) -> Disk:
        """Start a daemon that serves a new file."""
        image = _make_image(self._directory / f"{name}.img")
        socket = self._directory / f"{name}.sock"
        flag = "off" if readonly else "on"
        block = f"driver=file,node-name=disk,filename={image},discard=unmap,read-only="
        export = "type=vhost-user-blk,id=export,node-name=disk,num-queues=4,"
        export += f"writable={flag},addr.type=unix,addr.path={socket}"
        command = [str(find_tool("qemu-storage-daemon"))]
        command += ["--blockdev", block + ("on" if readonly else "off"), "--export", export]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._processes.append(process)
        wait_until(
            lambda: socket.exists() or process.poll() is not None,
            lambda: f"{command} made no socket in time",
        )
        assert process.poll() is None, f"{command} ended with {process.returncode}"
        return Disk(name, kind, socket, "vhost_user_blk", image)

    def check_alive(self) -> None:
        """AssertionError if a daemon has ended."""
        assert all(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        """End the daemons."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(PATIENCE)


def _make_image(path: Path) -> Path:
    with path.open("wb") as image:
        image.truncate(DISK_MIB * 2**20)
    return path
