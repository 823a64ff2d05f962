"""virtio-blk: this target, its peers, and what the machine allows, round by round.

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
from benchmarks.series import IOPS, Case
from benchmarks.servers import QEMU_DAEMON, QUEUES, Disk, Ours, Peer, Qemu, Server, fio, listening
from benchmarks.suite import Benchmark, Options, Session
from vhost.frontend import BlkFrontend
from vhost.io import run_workload
from vhost.workload import Workload

MEMORY_SIZE = 64 << 20  # bytes of a malloc or null disk
FILL = 1 << 16  # bytes at a time
FILE_SIZE = 256 << 20
IN_FLIGHT = 256 << 20  # bytes of buffers that a case may need

BLOCKS = (512, 4096, 16384, 65536, 1 << 20)
DEPTHS = (1, 4, 16, 32, 64, 128, 256)
MODES = ("randread", "randwrite", "randrw", "read", "write")

Contender = Callable[[Case], None]


def _case(
    disk: str, block: int, mode: str, depth: int, ring: str = "split", queues: int = 1
) -> Case:
    return {
        "disk": disk, "block": block, "mode": mode, "ring": ring, "queues": queues, "depth": depth
    }  # fmt: skip


def quick() -> list[Case]:
    """Return one case of each kind."""
    return [
        _case("null", 512, "randread", 128),
        _case("malloc", 4096, "randrw", 32),
        _case("malloc", 4096, "randread", 8, "packed", 2),
        _case("file", 4096, "randread", 32),
    ]


def usual() -> list[Case]:
    """Return what the goals speak of, and samples of everything else."""
    some = (1, 32, 128)
    return [
        *(_case("null", 512, "randread", depth) for depth in (1, 8, 32, 128, 256)),
        *(_case("null", 4096, "randread", depth) for depth in (1, 128)),
        *(_case("malloc", 4096, m, depth) for m in ("randread", "randwrite") for depth in some),
        _case("malloc", 512, "randread", 128),
        _case("malloc", 4096, "randrw", 32),
        _case("malloc", 65536, "randread", 32),
        _case("malloc", 1 << 20, "read", 8),
        _case("null", 512, "randread", 128, "packed"),
        _case("malloc", 4096, "randread", 128, "packed"),
        *(_case("null", 512, "randread", 32, queues=queues) for queues in (2, QUEUES)),
        *(_case("file", 4096, "randread", depth) for depth in some),
        _case("file", 4096, "randwrite", 32),
    ]  # fmt: skip


def full() -> list[Case]:
    """Return the matrix."""
    matrix = itertools.product(
        ("null", "malloc", "file"), BLOCKS, MODES, DEPTHS, ("split", "packed"), (1, 2, 4, QUEUES)
    )
    return [_case(*each) for each in matrix if each[1] * each[3] * each[5] <= IN_FLIGHT]


class Bench:
    """The contenders, and where each measurement goes."""

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

    def server(self, server: Server) -> Contender:
        """Return a contender that puts the load on a target."""

        def measure(case: Case) -> None:
            with server.turn():
                listening(server, self.disks[str(case["disk"])])
                packed = case["ring"] == "packed"
                with BlkFrontend(server.socket(str(case["disk"])), packed=packed) as front:
                    load = Load(
                        front,
                        self.work(case),
                        queues=int(case["queues"]),
                        cpus=(self.options.driver_cpu,),
                    )
                    found = load.measure(self.options.seconds, server.cpu_seconds)
            record(self.session, case, server.name, found)

        return measure

    def ring(self, case: Case) -> None:
        """Measure a bare ring loop, with memory behind it for malloc."""
        done = bare.ring(
            self.work(case, MEMORY_SIZE),
            driver_cpu=self.options.driver_cpu,
            device_cpu=self.options.server_cpu,
            store=case["disk"] == "malloc",
        )
        record(self.session, case, "bare ring", Measured(done, 0.0, steady=True))

    def memcpy(self, *, huge: bool) -> Contender:
        """Return a contender that copies the same blocks, on one core."""

        def measure(case: Case) -> None:
            rate = bare.memcpy(
                int(case["block"]),
                int(case["depth"]),
                cpu=self.options.server_cpu,
                seconds=self.options.seconds / 2,
                huge=huge,
            )
            self.session.add(case, "memcpy from huge pages" if huge else "memcpy", IOPS, rate)

        return measure

    def fio(self, case: Case) -> None:
        """Measure fio on the file itself."""
        options = self.options
        rate = fio(
            self.disks["file"].path,
            str(case["mode"]),
            int(case["block"]),
            int(case["depth"]),
            options.seconds,
            options.server_cpu,
        )
        if rate is not None:
            self.session.add(case, "fio", IOPS, rate)

    def contenders(self, case: Case, servers: list[Server]) -> list[Contender]:
        """Return who competes in a case."""
        found = [self.server(each) for each in servers if each.packed or case["ring"] == "split"]
        if case["ring"] == "packed" or case["queues"] != 1:
            return found
        limits: dict[str, list[Contender]] = {
            "null": [self.ring],
            "malloc": [self.ring, self.memcpy(huge=False), self.memcpy(huge=True)],
            "file": [self.fio],
        }
        return found + limits[str(case["disk"])]


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


def fill(server: Server, disk: Disk) -> None:
    """Write all of a disk, as one that is in use has been, and let the server settle."""
    work = Workload(
        size=disk.size, mode="write", block_size=FILL, depth=16, requests=disk.size // FILL
    )
    with server.turn():
        listening(server, disk)
        with BlkFrontend(server.socket(disk.kind)) as front:
            done = run_workload(front, work)
        if not done.good:
            raise RuntimeError(f"{server.name}: {done.first_error}")
        server.settle()


def start_servers(stack: ExitStack, options: Options, disks: list[Disk]) -> list[Server]:
    """Start this target and its peers, each in a folder of its own."""

    def place() -> Path:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blk-")))

    servers: list[Server] = [stack.enter_context(Ours(disks, place(), options.server_cpu))]
    if QEMU_DAEMON:
        servers.append(stack.enter_context(Qemu(disks, place(), options.server_cpu)))
    for name, command in options.peers:
        peer = Peer(name, command, disks, place(), options.server_cpu)
        servers.append(stack.enter_context(peer))
    return servers


def run(session: Session) -> None:
    """Run all rounds."""
    options = session.options
    cases = list(filter(options.wanted, options.choose(quick(), usual(), full())))
    if not cases:
        return
    with ExitStack() as stack:
        made = stack.enter_context(files(options.folder))
        kinds = dict.fromkeys(str(case["disk"]) for case in cases)
        servers = start_servers(stack, options, [made[kind] for kind in kinds])
        if "malloc" in kinds:
            for server in servers:
                fill(server, made["malloc"])
        bench = Bench(session, made)
        for case in session.track(cases * options.rounds, "blk"):
            for contender in bench.contenders(case, servers):
                contender(case)


benchmark = Benchmark("blk", "virtio-blk", run, base="*", memory=1 << 30)
