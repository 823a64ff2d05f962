"""virtio-blk: this target, qemu-storage-daemon, and what the machine allows, round by round.

The front-end polls on one CPU, the target has another. Contenders take turns in each round, so that
whatever else the machine does meets all of them; what to look at is ratios of medians.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import bare, machine
from benchmarks.servers import Disk, Ours, Qemu, Server, fio, listening
from vhost.frontend import BlkFrontend
from vhost.io import format_size, run_workload
from vhost.workload import Workload

RESULTS = Path(__file__).parent.parent / "results"
MEMORY_SIZE = 64 << 20  # bytes of a malloc or null disk
FILL = 1 << 16  # bytes at a time
FILE_SIZE = 256 << 20
DEPTHS = (1, 32, 128)
BLOCK_SIZES = (512, 4096)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    disk: str
    block_size: int
    depth: int
    mode: str


@dataclass(slots=True)
class Series:
    """What one contender did in the rounds of one case."""

    iops: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    cpu_us_per_io: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the IOPS."""
        return statistics.median(self.iops)

    @property
    def spread(self) -> float:
        """Distance between the best and the worst round, as a part of the median."""
        return (max(self.iops) - min(self.iops)) / self.median


Contender = Callable[[Case, Series], None]


class Bench:
    """The contenders, and where each measurement goes."""

    def __init__(
        self, seconds: float, driver_cpu: int, server_cpu: int, *, packed: bool = False
    ) -> None:
        self.seconds = seconds
        self.packed = packed
        self.driver_cpu = driver_cpu
        self.server_cpu = server_cpu
        self.files: dict[str, Disk] = {}

    def _work(self, case: Case, size: int) -> Workload:
        return Workload(
            size=size,
            mode=case.mode,
            block_size=case.block_size,
            depth=case.depth,
            runtime=self.seconds,
            seed=1,
        )

    def server(self, server: Server, *, packed: bool = False) -> Contender:
        """Return a contender that puts the load on a target, through split or packed rings."""

        def measure(case: Case, series: Series) -> None:
            disk = self.files[case.disk]
            listening(server, disk)
            with BlkFrontend(server.socket(case.disk), packed=packed) as front:
                before = server.cpu_seconds()
                done = run_workload(front, self._work(case, 0), cpus=(self.driver_cpu,))
                used = server.cpu_seconds() - before
            if not done.good:
                raise RuntimeError(f"{server.name}: {case}: {done.first_error}")
            total = done.total
            series.iops.append(total.iops)
            series.p50_us.append(total.percentile(50) * 1e6)
            series.p99_us.append(total.percentile(99) * 1e6)
            series.cpu_us_per_io.append(used / total.ops * 1e6)

        return measure

    def ring(self, case: Case, series: Series) -> None:
        """Measure a bare ring loop, with memory behind it for malloc."""
        done = bare.ring(
            self._work(case, MEMORY_SIZE),
            driver_cpu=self.driver_cpu,
            device_cpu=self.server_cpu,
            store=case.disk == "malloc",
        ).total
        series.iops.append(done.iops)
        series.p50_us.append(done.percentile(50) * 1e6)
        series.p99_us.append(done.percentile(99) * 1e6)

    def memcpy(self, *, huge: bool) -> Contender:
        """Return a contender that copies the same blocks, on one core."""

        def measure(case: Case, series: Series) -> None:
            rate = bare.memcpy(
                *(case.block_size, case.depth),
                cpu=self.server_cpu,
                seconds=self.seconds / 2,
                huge=huge,
            )
            series.iops.append(rate)

        return measure

    def fio(self, case: Case, series: Series) -> None:
        """Measure fio on the file itself."""
        disk = self.files["file"]
        rate = fio(disk.path, case.mode, case.block_size, case.depth, self.seconds, self.server_cpu)
        if rate is not None:
            series.iops.append(rate)

    def contenders(self, disk: str, servers: list[Server]) -> dict[str, Contender]:
        """Return who competes on a kind of disk."""
        found = {server.name: self.server(server) for server in servers}
        if self.packed:  # the peer has none
            ours = next(server for server in servers if server.name == Ours.name)
            found["packed rings"] = self.server(ours, packed=True)
        bare_limits: dict[str, dict[str, Contender]] = {
            "null": {"bare ring": self.ring},
            "malloc": {
                "bare ring": self.ring,
                "memcpy": self.memcpy(huge=False),
                "memcpy from huge pages": self.memcpy(huge=True),
            },
            "file": {"fio": self.fio},
        }
        return found | bare_limits[disk]


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
    listening(server, disk)
    with BlkFrontend(server.socket(disk.kind)) as front:
        done = run_workload(front, work)
    if not done.good:
        raise RuntimeError(f"{server.name}: {done.first_error}")
    server.settle()


def measure(bench: Bench, cases: list[Case], rounds: int, folder: Path) -> dict[Case, Any]:
    """Run all rounds; returns the series of each contender by case and name."""
    found: dict[Case, dict[str, Series]] = {case: {} for case in cases}
    with ExitStack() as stack:
        bench.files = stack.enter_context(files(folder))
        disks = [bench.files[kind] for kind in dict.fromkeys(case.disk for case in cases)]
        servers: list[Server] = []
        for kind in (Ours, Qemu):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blk-")))
            servers.append(stack.enter_context(kind(disks, place, bench.server_cpu)))
            if any(disk.kind == "malloc" for disk in disks):
                fill(servers[-1], bench.files["malloc"])
        # A bar that refreshes itself would do so in a thread that takes time from the load.
        with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
            bar = progress.add_task("measuring", total=rounds * len(cases))
            for case in cases * rounds:
                for name, contender in bench.contenders(case.disk, servers).items():
                    contender(case, found[case].setdefault(name, Series()))
                progress.update(bar, advance=1, refresh=True)
    return found


def table(found: dict[Case, dict[str, Series]]) -> Table:
    """Return medians, spreads and ratios."""
    result = Table(
        box=box.SIMPLE,
        caption="k IOPS: median ± half of the spread; CPU: µs of the target for each request",
    )
    for name in ("disk", "block", "depth", "ours", "p50 µs", "CPU", "qemu", "CPU", "ratio"):
        result.add_column(name, justify="left" if name == "disk" else "right", no_wrap=True)
    result.add_column("ratio to the limits, and to packed rings if measured")
    for case, series in found.items():
        ours, qemu = series[Ours.name], series[Qemu.name]
        limits = [
            _against(ours, name, limit)
            for name, limit in series.items()
            if name not in (Ours.name, Qemu.name) and limit.iops
        ]
        result.add_row(
            case.disk,
            format_size(case.block_size),
            str(case.depth),
            _rate(ours),
            f"{statistics.median(ours.p50_us):.2f}",
            f"{statistics.median(ours.cpu_us_per_io):.2f}",
            _rate(qemu),
            f"{statistics.median(qemu.cpu_us_per_io):.2f}",
            f"{ours.median / qemu.median:.2f}",
            ", ".join(limits),
        )
    return result


def _against(ours: Series, name: str, limit: Series) -> str:
    """Compare with a limit: the rate, and the latency that half of the requests did not exceed."""
    text = f"{name} {ours.median / limit.median:.2f}"
    if limit.p50_us:
        times = statistics.median(ours.p50_us) / statistics.median(limit.p50_us)
        text += f" (p50 {times:.2f} times)"
    return text


def _rate(series: Series) -> str:
    return f"{series.median / 1e3:,.0f} ± {series.spread * 50:.0f} %"


def to_json(found: dict[Case, dict[str, Series]]) -> list[dict[str, Any]]:
    """Return every figure of every round."""
    return [
        {**asdict(case), "contenders": {name: asdict(each) for name, each in series.items()}}
        for case, series in found.items()
    ]


@click.command("blk")
@click.option("--quick", is_flag=True, help="One short round, to see that everything runs.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Of each measurement.")
@click.option(
    "--rw",
    type=click.Choice(["randread", "randwrite", "read", "write"]),
    default="randread",
    show_default=True,
)
@click.option(
    "--disk",
    "disks",
    type=click.Choice(["null", "malloc", "file"]),
    multiple=True,
    help="Only these; may be repeated.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path.cwd,
    help="Where the file disk is; default: here.",
)
@click.option("--packed", is_flag=True, help="Measure this target with packed rings, too.")
@click.option("--driver-cpu", type=int, default=0, show_default=True, help="Of the front-end.")
@click.option("--server-cpu", type=int, default=1, show_default=True, help="Of the targets.")
def command(
    quick: bool,
    rounds: int,
    seconds: float,
    rw: str,
    disks: tuple[str, ...],
    folder: Path,
    packed: bool,
    driver_cpu: int,
    server_cpu: int,
) -> None:
    """Measure virtio-blk disks: null, malloc and file."""
    if quick:
        rounds, seconds = 1, 0.3
    cases = [
        Case(disk, block, depth, rw)
        for disk in disks or ("null", "malloc", "file")
        for block in BLOCK_SIZES
        for depth in DEPTHS
    ]
    bench = Bench(seconds, driver_cpu, server_cpu, packed=packed)
    os.sched_setaffinity(0, {driver_cpu})  # targets and bare devices move to the other
    found = measure(bench, cases, rounds, folder)
    Console(width=120).print(table(found))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"blk-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report = {"machine": machine.facts(), "rounds": rounds, "seconds": seconds}
    path.write_text(json.dumps({**report, "cases": to_json(found)}, indent=2))
    click.echo(f"every figure: {path}")
