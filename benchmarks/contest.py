"""Disks under load, contender by contender: what ``blk``, ``scsi`` and ``latency`` have in common.

The front-end polls on one CPU, the target has another. Contenders take turns in each round, so that
whatever else the machine does meets all of them; what to look at is ratios of medians.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import bare
from benchmarks.load import Load, Measured, record
from benchmarks.peers import QEMU_DAEMON, Peer, Qemu, fio
from benchmarks.series import CPU, IOPS, Case
from benchmarks.servers import QUEUES, Disk, Ours, OursScsi, Server, listening
from benchmarks.suite import Options, Session
from vhost.io import run_workload
from vhost.messages import Feature
from vhost.workload import Workload

MEMORY_SIZE = 64 << 20  # bytes of a malloc or null disk
FILL = 1 << 16  # bytes at a time
FILE_SIZE = 256 << 20
IN_FLIGHT = 256 << 20  # bytes of buffers that a case may need

DISKS = ("null", "malloc", "file")
BLOCKS = (512, 4096, 16384, 65536, 1 << 20)
DEPTHS = (1, 4, 16, 32, 64, 128, 256)
MODES = ("randread", "randwrite", "randrw", "read", "write")
RINGS = ("split", "packed")
QUEUE_COUNTS = (1, 2, 4, QUEUES)

Contender = Callable[[Case], None]


def case(
    disk: str, block: int, mode: str, depth: int, ring: str = "split", queues: int = 1
) -> Case:
    """Return the labels of a case."""
    return {
        "disk": disk, "block": block, "mode": mode, "ring": ring, "queues": queues, "depth": depth
    }  # fmt: skip


def matrix() -> list[Case]:
    """Return every case."""
    every = itertools.product(DISKS, BLOCKS, MODES, DEPTHS, RINGS, QUEUE_COUNTS)
    return [case(*each) for each in every if each[1] * each[3] * each[5] <= IN_FLIGHT]


class Contest:
    """Who competes in a case, and where each measurement goes."""

    def __init__(self, session: Session, disks: dict[str, Disk]) -> None:
        self.session = session
        self.options = session.options
        self.disks = disks

    def work(self, case: Case, size: int = 0) -> Workload:
        """Return the workload of a case."""
        return Workload(
            size=size,
            mode=str(case["mode"]),
            block_size=int(case["block"]),
            depth=int(case["depth"]),
            runtime=self.options.seconds,
            seed=1,
        )

    def server(self, server: Server, device: str, name: str = "") -> Contender:
        """Return a contender, a target's blk or scsi device, called as it or by another name.

        It takes no part where it does not offer such rings.
        """

        def measure(case: Case) -> None:
            kind, packed = str(case["disk"]), case["ring"] == "packed"
            with server.turn(kind):
                offered = listening(server, self.disks[kind], device)
                if packed and not offered & Feature.RING_PACKED:
                    return
                with server.open(kind, device, packed=packed) as front:
                    load = Load(
                        front,
                        self.work(case),
                        queues=int(case["queues"]),
                        cpus=(self.options.driver_cpu,),
                        huge=self.options.huge,
                    )
                    found = load.measure(self.options.seconds, server.cpu_seconds)
            record(self.session, case, name or server.name, found)

        return measure

    def ring(self, case: Case) -> None:
        """Measure a bare ring loop, with memory behind it for malloc."""
        done = bare.ring(
            self.work(case, MEMORY_SIZE),
            driver_cpu=self.options.driver_cpu,
            device_cpu=self.options.server_cpu,
            store=case["disk"] == "malloc",
            huge=self.options.huge,
        )
        record(self.session, case, "bare ring", Measured(done, 0.0, steady=True))

    def memcpy(self, *, huge: bool) -> Contender:
        """Return a contender that copies the same blocks the same way, on one core."""

        def measure(case: Case) -> None:
            rate = bare.memcpy(
                int(case["block"]),
                int(case["depth"]),
                write=str(case["mode"]).endswith("write"),
                cpu=self.options.server_cpu,
                seconds=self.options.seconds / 2,
                huge=huge,
            )
            self.session.add(case, "memcpy from huge pages" if huge else "memcpy", IOPS, rate)

        return measure

    def fio(self, case: Case) -> None:
        """Measure fio on the file itself."""
        options = self.options
        found = fio(
            self.disks["file"].path,
            str(case["mode"]),
            int(case["block"]),
            int(case["depth"]),
            options.seconds,
            options.server_cpu,
        )
        if found is not None:
            self.session.add(case, "fio", IOPS, found.iops)
            self.session.add(case, "fio", CPU, found.cpu)

    def limits(self, case: Case) -> list[Contender]:
        """Return what the machine allows, where that has a single queue as well."""
        if case["ring"] == "packed" or case["queues"] != 1:
            return []
        found: dict[str, list[Contender]] = {
            "null": [],
            "malloc": [self.memcpy(huge=False), self.memcpy(huge=True)],
            "file": [self.fio],
        }
        return found[str(case["disk"])]

    def run(self, cases: list[Case], contenders: Callable[[Case], list[Contender]]) -> None:
        """Run all rounds; every other one in the opposite order."""
        turns = [(turn, case) for turn in range(self.options.rounds) for case in cases]
        for turn, case in self.session.track(turns, self.session.result.name):
            found = contenders(case)
            for contender in found if turn % 2 == 0 else reversed(found):
                contender(case)


@contextmanager
def files(folder: Path) -> Iterator[dict[str, Disk]]:
    """Make the files: one in ``folder``, one in memory; they are gone afterwards."""
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix="benchmark-") as on_disk,
        tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="benchmark-") as in_memory,
    ):
        for file, size in ((on_disk, FILE_SIZE), (in_memory, MEMORY_SIZE)):
            part = os.urandom(1 << 20)
            for _ in range(size >> 20):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        yield {
            "null": Disk("null", MEMORY_SIZE, Path()),
            "malloc": Disk("malloc", MEMORY_SIZE, Path(in_memory.name)),
            "file": Disk("file", FILE_SIZE, Path(on_disk.name)),
        }


def fill(server: Server, disk: Disk, device: str) -> None:
    """Write all of a disk, as one that is in use has been, and let the server settle."""
    work = Workload(
        size=disk.size, mode="write", block_size=FILL, depth=16, requests=disk.size // FILL
    )
    with server.turn(disk.kind):
        listening(server, disk, device)
        with server.open(disk.kind, device) as front:
            done = run_workload(front, work)
        if not done.good:
            raise RuntimeError(f"{server.name}: {done.first_error}")
        server.settle()


def start_servers(
    stack: ExitStack, options: Options, disks: list[Disk], device: str = "blk"
) -> list[Server]:
    """Start this target and the peers that have such devices, ours first, malloc disks filled."""

    def place() -> Path:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{device}-")))

    ours = OursScsi if device == "scsi" else Ours
    servers: list[Server] = [stack.enter_context(ours(disks, place(), options.server_cpu))]
    if QEMU_DAEMON and device == "blk":
        servers.append(stack.enter_context(Qemu(disks, place(), options.server_cpu)))
    for name, command in options.peers:
        if Peer.serves(command, device):
            peer = Peer(name, command, disks, place(), options.server_cpu, device)
            servers.append(stack.enter_context(peer))
    for disk in disks:
        if disk.kind == "malloc":
            for server in servers:
                fill(server, disk, device)
    return servers
