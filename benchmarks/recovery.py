"""How long a front-end waits when a part of the target dies, or all of it is upgraded.

In each round a verified load runs on a disk, and at a random moment of it the reactor is killed
with SIGKILL, or the control process is and the next one started, or ``vhost-reactor upgrade`` run.
The pause is the longest that any request of the round took. Rounds in which nothing happens, in
between, say how long the machine itself makes requests wait.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from vhost.upgrade import ask_for_upgrade
from vhost.workload import Runner, Workload, run

# Longer than what the cluster takes for a crash loop, in which it delays restarts.
ROUND = CRASH_WINDOW / (CRASH_LOOP - 1) + 0.1  # seconds


NOTHING = "nothing"

Pauses = dict[str, list[float]]
"""By what happened: the longest time that a request took in each round, in seconds."""


def rpc_socket(server: Ours) -> Path:
    """Return where JSON-RPC is."""
    return server.folder / "run" / "rpc.sock"


def reactor_pid(server: Ours) -> int:
    """Return the process of the only reactor."""
    with RpcClient(rpc_socket(server), timeout=READY) as rpc:
        (reactor,) = rpc.call("framework_get_reactors")["reactors"]
    return int(reactor["pid"] or 0)


def control_pid(server: Ours) -> int:
    """Return the control process, once it has taken over."""
    end = time.monotonic() + READY
    while True:
        try:
            with RpcClient(rpc_socket(server), timeout=READY) as rpc:
                rpc.call("framework_wait_init")
                return int(rpc.call("framework_get_reactors")["pid"])
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def wait_for_standby(server: Ours) -> None:
    """Return when there is a process in reserve, which takes time to start on a busy CPU."""
    end = time.monotonic() + READY
    while not any(child.name() == "reactor-standby" for child in server.process.children()):
        if time.monotonic() > end:
            raise RuntimeError("there is no standby")
        time.sleep(0.02)


def kill_reactor(server: Ours) -> None:
    """Kill the reactor, and wait for the next one."""
    pid = reactor_pid(server)
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + READY
    while reactor_pid(server) in (pid, 0):
        if time.monotonic() > end:
            raise RuntimeError(f"the reactor (pid {pid}) has not been replaced")
        time.sleep(0.01)


def kill_control(server: Ours) -> None:
    """Kill the control process, start another, and wait until it has taken over."""
    server.kill_control()
    if control_pid(server) != server.process.pid:
        raise RuntimeError("the control process has not been replaced")


def upgrade(server: Ours) -> None:
    """Upgrade to the same version."""
    ask_for_upgrade(rpc_socket(server), READY)


EVENTS: dict[str, Callable[[Ours], None]] = {
    "reactor killed": kill_reactor,
    "control killed": kill_control,
    "upgrade": upgrade,
}


def longest_request(
    server: Ours, front: BlkFrontend, work: Workload, cpu: int, event: str = NOTHING
) -> float:
    """Run a load for at least a round, and until what happens is over; return the worst latency."""
    wait_for_standby(server)
    runner = Runner(work, front.queues, front.memory, cpus=(cpu,))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, runner)
        try:
            end = time.monotonic() + ROUND
            time.sleep(random.uniform(0.1, 0.4) * ROUND)
            if event != NOTHING:
                EVENTS[event](server)
            time.sleep(max(0.0, end - time.monotonic()))
        finally:
            runner.stop()
            done = running.result()
    if not done.good:
        raise RuntimeError(f"{event}: {done.first_error or done.mismatch}")
    return done.total.latency_max


def measure(server: Ours, disk: Disk, work: Workload, rounds: int, cpu: int) -> Pauses:
    """Have everything happen under load so many times, and nothing a quarter as often."""
    pauses: Pauses = {event: [] for event in (*EVENTS, NOTHING)}
    listening(server, disk)
    with BlkFrontend.connect(server.socket(disk.kind), queue_size=work.queue_size()) as front:
        for number in track(range(rounds), disk.kind, console=Console(stderr=True)):
            for event in EVENTS:
                pauses[event].append(longest_request(server, front, work, cpu, event))
            if number % 4 == 0:
                pauses[NOTHING].append(longest_request(server, front, work, cpu))
    return pauses


def table(found: dict[str, Pauses]) -> Table:
    """Return the best, the median and the worst, in milliseconds."""
    result = Table(box=box.SIMPLE, caption="ms: the longest that a request of a round took")
    for name in ("disk", "what happens", "rounds", "best", "median", "worst"):
        result.add_column(name, justify="left" if name in ("disk", "what happens") else "right")
    for disk, pauses in found.items():
        for event, took in pauses.items():
            figures = [f"{1e3 * of(took):.1f}" for of in (min, statistics.median, max)]
            result.add_row(disk, event, str(len(took)), *figures)
    return result


@click.command("recovery")
@click.option(
    "--rounds", type=click.IntRange(1), default=20, show_default=True, help="Of each kind."
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
    rounds: int, depth: int, disks: tuple[str, ...], folder: Path, driver_cpu: int, server_cpu: int
) -> None:
    """Measure the pause of guests when something dies or is upgraded under a verified load."""
    found: dict[str, Pauses] = {}
    with files(folder) as made, tempfile.TemporaryDirectory(prefix="recovery-") as place:
        wanted = [made[kind] for kind in disks or ("malloc", "file")]
        with Ours(wanted, Path(place), server_cpu) as server:
            for disk in wanted:
                work = Workload(disk.size, "randrw", depth=depth, runtime=1e6, verify=True, seed=1)
                found[disk.kind] = measure(server, disk, work, rounds, driver_cpu)
    Console(width=120).print(table(found))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"recovery-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report = {"machine": machine.facts(), "depth": depth, "pauses_seconds": found}
    path.write_text(json.dumps(report, indent=2))
    click.echo(f"every figure: {path}")
