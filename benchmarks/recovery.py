"""How long a front-end waits when the reactor that serves it is killed.

In each round a verified load runs on a disk, and the reactor is killed with SIGKILL at a random
moment of it. The pause is the longest that any request of the round took. Rounds without a kill, in
between, say how long the machine itself makes requests wait.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from benchmarks.blk import RESULTS, files
from benchmarks.servers import READY, Disk, Ours, listening
from reactor.cluster import CRASH_LOOP, CRASH_WINDOW
from reactor.rpc_client import RpcClient
from vhost.frontend import BlkFrontend
from vhost.workload import Runner, Workload, run

# Longer than what the cluster takes for a crash loop, in which it delays restarts.
ROUND = CRASH_WINDOW / (CRASH_LOOP - 1) + 0.1  # seconds


@dataclass(slots=True)
class Pauses:
    """The longest time that a request took, in seconds, for each round on a kind of disk."""

    killed: list[float] = field(default_factory=list)
    undisturbed: list[float] = field(default_factory=list)


def reactor_pid(server: Ours) -> int:
    """Return the process of the only reactor."""
    with RpcClient(server.folder / "run" / "rpc.sock", timeout=READY) as rpc:
        (reactor,) = rpc.call("framework_get_reactors")["reactors"]
    return int(reactor["pid"])


def longest_request(
    server: Ours, front: BlkFrontend, work: Workload, cpu: int, *, kill: bool
) -> float:
    """Run a load, during which the reactor is killed or not; return its longest latency."""
    pid = reactor_pid(server)
    moment = random.uniform(0.1, 0.4) * work.runtime
    killer = threading.Timer(moment, os.kill, (pid, signal.SIGKILL))
    if kill:
        killer.start()
    done = run(Runner(work, front.queues, front.memory, cpus=(cpu,)))
    if not done.good:
        raise RuntimeError(f"after a kill: {done.first_error or done.mismatch}")
    if kill and reactor_pid(server) == pid:
        raise RuntimeError(f"the reactor (pid {pid}) has not been replaced")
    return done.total.latency_max


def measure(server: Ours, disk: Disk, work: Workload, kills: int, cpu: int) -> Pauses:
    """Kill the reactor under load so many times."""
    pauses = Pauses()
    listening(server, disk)
    with BlkFrontend.connect(server.socket(disk.kind), queue_size=work.queue_size()) as front:
        for number in track(range(kills), disk.kind, console=Console(stderr=True)):
            pauses.killed.append(longest_request(server, front, work, cpu, kill=True))
            if number % 4 == 0:
                pauses.undisturbed.append(longest_request(server, front, work, cpu, kill=False))
    return pauses


def table(found: dict[str, Pauses]) -> Table:
    """Return medians and the worst, in milliseconds."""
    result = Table(
        box=box.SIMPLE, caption="ms: the longest that a request of a round took; median, worst"
    )
    for name in ("disk", "kills", "median", "worst", "undisturbed", "worst"):
        result.add_column(name, justify="left" if name == "disk" else "right")
    for disk, pauses in found.items():
        columns = [pauses.killed, pauses.undisturbed]
        figures = [f"{1e3 * of(each):.1f}" for each in columns for of in (statistics.median, max)]
        result.add_row(disk, str(len(pauses.killed)), *figures)
    return result


@click.command("recovery")
@click.option(
    "--kills", type=click.IntRange(1), default=20, show_default=True, help="Of each disk."
)
@click.option("--depth", type=click.IntRange(1), default=32, show_default=True)
@click.option("--disk", "disks", type=click.Choice(["malloc", "file"]), multiple=True)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path.cwd,
    help="Where the file disk is; default: here.",
)
@click.option("--driver-cpu", type=int, default=0, show_default=True, help="Of the front-end.")
@click.option("--server-cpu", type=int, default=1, show_default=True, help="Of the target.")
def command(
    kills: int, depth: int, disks: tuple[str, ...], folder: Path, driver_cpu: int, server_cpu: int
) -> None:
    """Measure the pause when a reactor is killed under a verified load."""
    found: dict[str, Pauses] = {}
    with files(folder) as made, tempfile.TemporaryDirectory(prefix="recovery-") as place:
        wanted = [made[kind] for kind in disks or ("malloc", "file")]
        with Ours(wanted, Path(place), server_cpu) as server:
            for disk in wanted:
                work = Workload(
                    disk.size, "randrw", depth=depth, runtime=ROUND, verify=True, seed=1
                )
                found[disk.kind] = measure(server, disk, work, kills, driver_cpu)
    Console(width=120).print(table(found))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"recovery-{time.strftime('%Y%m%d-%H%M%S')}.json"
    seconds = {
        disk: {"killed": pauses.killed, "undisturbed": pauses.undisturbed}
        for disk, pauses in found.items()
    }
    report = {"machine": machine.facts(), "depth": depth, "pauses_seconds": seconds}
    path.write_text(json.dumps(report, indent=2))
    click.echo(f"every figure: {path}")
