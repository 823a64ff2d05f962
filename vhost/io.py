"""``vhost-reactor io``: load on a vhost-user-blk or -scsi server; figures, verification."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from dataclasses import replace
from typing import Any, TypeAlias

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reactor.errors import OperationError
from reactor.failure import Failure
from vhost.frontend import WANTED_FEATURES, BlkFrontend
from vhost.frontend_link import FrontendError
from vhost.frontend_memory import FrontendMemory
from vhost.frontend_scsi_disk import ScsiDisk
from vhost.messages import Feature
from vhost.results import Direction, Results
from vhost.virtio_blk import SECTOR, BlkFeature
from vhost.workload import MODES, Runner, Workload, run

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SHOWN_PERCENTILES = (50.0, 90.0, 99.0, 99.9)
MAX_QUEUE_SIZE = 32768  # virtio 1.2, section 2.7


def parse_size(text: str) -> int:
    """Return bytes of "512", "4k", "1MiB"; units are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 512, 4k, 1m or 2g")
    return int(match[1]) * _UNITS[match[2].lower()]


def format_size(size: float) -> str:
    """Return "4 KiB", "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size % 1 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return the numbers of "0,2"; BadParameter for anything else, or a CPU that is not there."""
    try:
        cpus = tuple(int(cpu) for cpu in text.split(",") if cpu)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no list of CPUs: write 0,2", param_hint="--cpus"
        ) from None
    for cpu in cpus:
        if not 0 <= cpu < (os.cpu_count() or 1):
            raise click.BadParameter(f"there is no CPU {cpu}", param_hint="--cpus")
    return cpus


class SizeType(click.ParamType[int]):
    """An option that is a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See parse_size."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


Disk: TypeAlias = BlkFrontend | ScsiDisk


def most_buffers(disk: Disk) -> int:
    """Return how many data buffers a request may have, 0 if the device does not say."""
    if isinstance(disk, ScsiDisk):
        return disk.max_buffers
    return disk.config.seg_max if disk.features & BlkFeature.SEG_MAX else 0


def check_workload(disk: Disk, work: Workload, queue_size: int) -> None:
    """Raise FrontendError, saying what to change, if the device cannot do what is asked."""
    if work.reads < 100 and disk.read_only:
        raise FrontendError(f"{disk.path}: the device is read-only: use --rw read or randread")
    if work.block_size == 0 or work.block_size % disk.block_size:
        raise FrontendError(
            f"--bs {work.block_size} is not a multiple of the device's block size {disk.block_size}"
        )
    if work.offset % disk.block_size:
        raise FrontendError(
            f"--offset {work.offset} is not a multiple of the device's block size {disk.block_size}"
        )
    if work.size < work.block_size or work.offset + work.size > disk.size:
        raise FrontendError(
            f"--offset {work.offset} and --size {work.size} with blocks of {work.block_size} do "
            f"not fit on the device, which has {disk.size} bytes"
        )
    limit = most_buffers(disk)
    buffers = -(-work.block_size // work.segment_size)
    if limit and buffers > limit:
        raise FrontendError(
            f"--bs {work.block_size} needs {buffers} buffers of {work.segment_size} bytes, the "
            f"device takes {limit} a request"
        )
    needed = work.depth * work.descriptors
    if needed > queue_size:
        raise FrontendError(
            f"--iodepth {work.depth} needs {needed} descriptors, the queue has {queue_size}: use "
            f"a larger --queue-size{'' if work.indirect else ', or --indirect'}"
        )


def plan(disk: Disk, work: Workload, queues: int, queue_size: int) -> tuple[Workload, int]:
    """Fill in what the device decides: returns the workload and the size of the queues."""
    whole = work.block_size or 1
    size = work.size or max(0, disk.size - work.offset) // whole * whole
    largest = 0
    if isinstance(disk, ScsiDisk):
        work = replace(work, lun=disk.address, logical_block=disk.block_size)
    elif disk.features & BlkFeature.SIZE_MAX:
        largest = disk.config.size_max
    segment = min(work.block_size, largest // SECTOR * SECTOR or work.block_size)
    work = replace(work, size=size // whole * whole, segment_size=segment)
    if work.indirect and not disk.features & Feature.INDIRECT_DESC:
        raise FrontendError(f"{disk.path}: the device does not offer indirect descriptors")
    if queue_size == 0:
        queue_size = min(work.queue_size(), MAX_QUEUE_SIZE)
    check_workload(disk, work, queue_size)
    if work.size // work.block_size < queues:
        raise FrontendError(
            f"--size {work.size} has {work.size // work.block_size} blocks for {queues} queues"
        )
    if work.verify and work.size // work.block_size // queues <= work.depth:
        raise FrontendError(
            f"--verify needs more blocks than are in flight: --size {work.size} has "
            f"{work.size // work.block_size // queues} blocks a queue, --iodepth is {work.depth}"
        )
    return work, queue_size


def run_workload(
    disk: Disk,
    work: Workload,
    *,
    queues: int = 1,
    queue_size: int = 0,
    regions: int = 1,
    threads: int = 1,
    cpus: tuple[int, ...] = (),
    progress: Progress | None = None,
) -> Results:
    """Set a negotiated disk up for a workload, and run that. Raises FrontendError."""
    work, queue_size = plan(disk, work, queues, queue_size)
    memory = work.memory(queues, queue_size) * (2 if regions > 1 else 1)
    disk.set_up(queues, queue_size, FrontendMemory(memory, regions=regions))
    runner = Runner(work, disk.queues, disk.memory, threads=threads, cpus=cpus)
    if progress is None:
        return run(runner, alive=disk.raw.alive)
    task = progress.add_task(
        f"{work.mode} {format_size(work.block_size)}", total=work.runtime, rate=""
    )
    started = time.monotonic()
    last = (started, 0)

    def show(ops: int) -> None:
        nonlocal last
        now = time.monotonic()
        rate = (ops - last[1]) / max(now - last[0], 1e-9)
        last = (now, ops)
        done = min(now - started, work.runtime)
        progress.update(task, completed=done, rate=f"{rate:,.0f} IOPS", refresh=True)

    with progress:
        return run(runner, progress=show, alive=disk.raw.alive)


def report(results: Results, work: Workload, console: Console) -> None:
    """Print the results for people."""
    table = Table(
        title=f"{work.mode}, {format_size(work.block_size)}, depth {work.depth}",
        caption="latencies in µs",
        box=box.SIMPLE,
    )
    table.add_column("")
    for name in ("IOPS", "MiB/s", "mean", *(f"p{p:g}" for p in SHOWN_PERCENTILES), "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, direction in (("read", results.read), ("write", results.write)):
        if direction.ops:
            table.add_row(name, *_row(direction))
    if results.read.ops and results.write.ops:
        table.add_row("both", *_row(results.total))
    console.print(table)
    if work.verify:
        console.print(
            f"verified {results.verified:,} blocks, {results.mismatches:,} wrong"
            + (f", {results.unwritten:,} sectors hold no pattern" if results.unwritten else "")
        )


def _row(direction: Direction) -> list[str]:
    times = [direction.mean, *(direction.percentile(p) for p in SHOWN_PERCENTILES)]
    return [
        f"{direction.iops:,.0f}",
        f"{direction.bandwidth / (1 << 20):,.1f}",
        *(_microseconds(t) for t in (*times, direction.latency_max)),
    ]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.2f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def complaints(results: Results, work: Workload) -> list[str]:
    """Return a line for each thing that went wrong."""
    lines = []
    if results.errors:
        lines.append(f"{results.errors:,} requests failed; the first: {results.first_error}")
    lines += [
        f"wrong data at byte {m.offset}: expected {m.expected.hex()}, got {m.got.hex()}"
        for m in results.mismatch
    ]
    if work.verify and work.reads == 100 and not results.verified and not results.mismatches:
        lines.append(
            "nothing was verified: the range holds no pattern, write it first with "
            "--rw write --verify"
        )
    return lines


@click.command("io")
@click.argument("socket", type=click.Path())
@click.option("--rw", type=click.Choice(MODES), default="randread", show_default=True)
@click.option("--bs", type=SizeType(), default="4k", show_default=True, help="Bytes a request.")
@click.option(
    "--iodepth",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Requests in flight on each queue.",
)
@click.option(
    "--runtime",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds.",
)
@click.option("--size", type=SizeType(), default=0, help="Bytes to use; default: the device.")
@click.option("--offset", type=SizeType(), default=0, help="Where they begin.")
@click.option("--queues", "--numjobs", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Threads that drive the queues.",
)
@click.option("--cpus", default="", help="CPUs to pin those to, as 0,2.")
@click.option(
    "--queue-size",
    type=click.IntRange(2, MAX_QUEUE_SIZE),
    default=None,
    help="Entries of a queue; default: what the depth needs.",
)
@click.option(
    "--rwmixread",
    type=click.IntRange(0, 100),
    default=50,
    show_default=True,
    help="Percentage of reads for rw and randrw.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0),
    default=0,
    help="Requests a second (open loop); latency counts from when each was due.",
)
@click.option("--number-ios", type=click.IntRange(0), default=0, help="End after that many.")
@click.option(
    "--verify",
    is_flag=True,
    help="Write recognisable data, read all of it back, and check what is read.",
)
@click.option("--scsi", is_flag=True, help="The server is vhost-user-scsi; default: -blk.")
@click.option("--target", type=click.IntRange(0, 255), default=0, help="SCSI target.")
@click.option("--lun", type=click.IntRange(0, 16383), default=0, help="Logical unit of it.")
@click.option("--interrupt", is_flag=True, help="Sleep until the device signals; default: poll.")
@click.option("--indirect", is_flag=True, help="Use indirect descriptors.")
@click.option("--packed", is_flag=True, help="Use packed rings; default: split ones.")
@click.option("--event-idx/--no-event-idx", default=True, show_default=True)
@click.option("--regions", type=click.IntRange(1), default=1, help="Regions of guest memory.")
@click.option("--seed", type=int, default=None, help="Of offsets and data; default: random.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds that the device may be silent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def io_command(
    socket: str,
    rw: str,
    bs: int,
    iodepth: int,
    runtime: float,
    size: int,
    offset: int,
    queues: int,
    threads: int,
    cpus: str,
    queue_size: int | None,
    rwmixread: int,
    rate: float,
    number_ios: int,
    verify: bool,
    scsi: bool,
    target: int,
    lun: int,
    interrupt: bool,
    indirect: bool,
    packed: bool,
    event_idx: bool,
    regions: int,
    seed: int | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Put load on the vhost-user-blk (or --scsi) server at SOCKET and print what it did.

    Writing modes overwrite the device's data. The exit status is 1 when a request failed or data
    were wrong. Ctrl-C ends early, with results.
    """
    work = Workload(
        size=size,
        mode=rw,
        block_size=bs,
        depth=iodepth,
        runtime=runtime,
        offset=offset,
        read_percent=rwmixread,
        verify=verify,
        interrupt=interrupt,
        indirect=indirect,
        rate=rate,
        requests=number_ios,
        seed=secrets.randbits(32) if seed is None else seed & 0xFFFFFFFF,
        stall=timeout,
    )
    console = Console()
    progress = None if as_json or not sys.stderr.isatty() else _progress()
    pinned = parse_cpus(cpus)
    wanted = WANTED_FEATURES if event_idx else WANTED_FEATURES & ~Feature.EVENT_IDX
    options: dict[str, Any] = {
        "features": wanted,
        "packed": packed,
        "timeout": min(timeout, 10.0),
    }
    try:
        with (
            ScsiDisk(socket, target=target, lun=lun, **options)
            if scsi
            else BlkFrontend(socket, **options)
        ) as disk:
            results = run_workload(
                disk,
                work,
                queues=queues,
                queue_size=queue_size or 0,
                regions=regions,
                threads=threads,
                cpus=pinned,
                progress=progress,
            )
    except (FrontendError, OperationError, OSError, MemoryError) as error:
        raise Failure(str(error)) from None
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=2))
    else:
        report(results, work, console)
    lines = complaints(results, work)
    for line in lines:
        click.echo(line, err=True)
    if lines:
        sys.exit(1)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # in a thread that would take time from the load
    )


if __name__ == "__main__":
    io_command()
