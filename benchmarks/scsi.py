"""virtio-scsi against virtio-blk of the same target, on the same kinds of disks, turn by turn."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import machine
from benchmarks.blk import BLOCK_SIZES, DEPTHS, MEMORY_SIZE, RESULTS, Case, Series
from benchmarks.servers import Disk, OursScsi, scsi_name
from vhost.frontend import BlkFrontend
from vhost.frontend_scsi_disk import ScsiDisk
from vhost.io import format_size, run_workload
from vhost.workload import Workload

DISKS = ("null", "malloc")
CONTENDERS = ("blk", "scsi")
TARGET = 0.85  # of the IOPS of virtio-blk


def measure_once(server: OursScsi, case: Case, name: str, series: Series, how: Workload) -> None:
    """Put the load on one of the two devices."""
    if name == "blk":
        front: BlkFrontend | ScsiDisk = BlkFrontend(server.socket(case.disk))
    else:
        front = ScsiDisk(server.socket(scsi_name(case.disk)))
    with front as disk:
        before = server.cpu_seconds()
        done = run_workload(disk, how, cpus=(min(os.sched_getaffinity(0)),))
        used = server.cpu_seconds() - before
    if not done.good:
        raise RuntimeError(f"{name}: {case}: {done.first_error}")
    series.iops.append(done.total.iops)
    series.p50_us.append(done.total.percentile(50) * 1e6)
    series.p99_us.append(done.total.percentile(99) * 1e6)
    series.cpu_us_per_io.append(used / done.total.ops * 1e6)


def measure(
    server: OursScsi, cases: list[Case], rounds: int, seconds: float
) -> dict[Case, dict[str, Series]]:
    """Run all rounds; each device begins as often as the other."""
    found = {case: {name: Series() for name in CONTENDERS} for case in cases}
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        bar = progress.add_task("measuring", total=rounds * len(cases))
        for turn in range(rounds):
            for case in cases:
                how = Workload(
                    size=0,
                    mode=case.mode,
                    block_size=case.block_size,
                    depth=case.depth,
                    runtime=seconds,
                    seed=1,
                )
                for name in CONTENDERS if turn % 2 == 0 else reversed(CONTENDERS):
                    measure_once(server, case, name, found[case][name], how)
                progress.update(bar, advance=1, refresh=True)
    return found


def table(found: dict[Case, dict[str, Series]]) -> Table:
    """Return medians, and what part of virtio-blk's rate virtio-scsi reaches."""
    result = Table(
        box=box.SIMPLE,
        caption="k IOPS: medians; CPU: µs of the target for each request; "
        f"a ratio of {TARGET} or more is what is aimed at",
    )
    for name in ("disk", "block", "depth", "blk", "CPU", "scsi", "CPU", "p50 µs", "ratio"):
        result.add_column(name, justify="left" if name == "disk" else "right", no_wrap=True)
    for case, series in found.items():
        blk, scsi = series["blk"], series["scsi"]
        result.add_row(
            case.disk,
            format_size(case.block_size),
            str(case.depth),
            f"{blk.median / 1e3:,.0f}",
            f"{statistics.median(blk.cpu_us_per_io):.2f}",
            f"{scsi.median / 1e3:,.0f}",
            f"{statistics.median(scsi.cpu_us_per_io):.2f}",
            f"{statistics.median(scsi.p50_us):.2f}",
            f"{scsi.median / blk.median:.2f}",
        )
    return result


def to_json(found: dict[Case, dict[str, Series]]) -> list[dict[str, Any]]:
    """Return every figure of every round."""
    return [
        {**asdict(case), "contenders": {name: asdict(each) for name, each in series.items()}}
        for case, series in found.items()
    ]


@click.command("scsi")
@click.option("--quick", is_flag=True, help="One short round, to see that everything runs.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Of each measurement.")
@click.option(
    "--rw",
    type=click.Choice(["randread", "randwrite", "read", "write"]),
    default="randread",
    show_default=True,
)
@click.option("--driver-cpu", type=int, default=0, show_default=True, help="Of the front-end.")
@click.option("--server-cpu", type=int, default=1, show_default=True, help="Of the target.")
def command(
    quick: bool, rounds: int, seconds: float, rw: str, driver_cpu: int, server_cpu: int
) -> None:
    """Measure virtio-scsi disks beside virtio-blk: null and malloc."""
    if quick:
        rounds, seconds = 1, 0.2
    cases = [
        Case(disk, block, depth, rw) for disk in DISKS for block in BLOCK_SIZES for depth in DEPTHS
    ]
    os.sched_setaffinity(0, {driver_cpu})  # the target moves to the other
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scsi-")))
        disks = [Disk(kind, MEMORY_SIZE, Path()) for kind in DISKS]
        server = stack.enter_context(OursScsi(disks, place, server_cpu))
        found = measure(server, cases, rounds, seconds)
    Console(width=120).print(table(found))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"scsi-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report = {"machine": machine.facts(), "rounds": rounds, "seconds": seconds}
    path.write_text(json.dumps({**report, "cases": to_json(found)}, indent=2))
    click.echo(f"every figure: {path}")
