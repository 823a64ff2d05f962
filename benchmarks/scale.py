"""How speed depends on how much there is: idle devices, busy devices, reactors."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import many
from benchmarks.load import Load, record
from benchmarks.series import CPU, IOPS, P99, Case
from benchmarks.servers import Disk, Ours
from benchmarks.suite import OURS, Benchmark, Session, require_memory
from vhost.frontend import BlkFrontend
from vhost.results import Results
from vhost.workload import Workload

BLOCK, DEPTH = 512, 128
WORK = Workload(size=0, block_size=BLOCK, depth=DEPTH, seed=1)
NULL = Disk("null", 64 << 20, Path())


def among_idle(session: Session, counts: Sequence[int], rounds: int) -> None:
    """Measure one busy disk among others that are connected and idle.

    There is a cluster for each count, and all take turns: what they are to be compared by is
    measured next to each other. Those whose turn it is not sleep.
    """
    options = session.options
    counts = [count for count in counts if options.wanted({"devices": count})]
    require_memory(sum(counts) * many.COST)
    with ExitStack() as stack:
        loads = {}
        for count in session.track(counts, "scale: connecting idle devices"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-")))
            server = stack.enter_context(Ours([NULL], folder, options.server_cpu))
            with many.rpc(server) as client:
                many.create(client, count)
            many.connect(stack, server, count)
            front = stack.enter_context(BlkFrontend(server.socket("null")))
            loads[count] = Load(front, WORK, cpus=(options.driver_cpu,)), server
        for _, server in loads.values():
            many.settle(server)
        for _ in session.track(range(rounds), "scale: one busy among idle devices"):
            for count, (load, server) in loads.items():
                found = load.measure(options.seconds, server.cpu_seconds)
                record(session, {"devices": count}, OURS, found)


def run_together(loads: Sequence[Load], seconds: float) -> list[Results]:
    """Run loads at the same time, each in a thread of its own; returns their results."""
    done: list[Results] = []
    threads = [
        threading.Thread(target=lambda load=load: done.append(load.run(seconds))) for load in loads
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) != len(loads):
        raise RuntimeError(f"{len(loads) - len(done)} of {len(loads)} loads failed")
    return done


def busy(session: Session, case: Case, disks: int, cpus: Sequence[int]) -> None:
    """Measure so many busy disks on reactors on ``cpus``, disk by disk on one of them."""
    options = session.options
    drivers = options.driver_cpus(cpus)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-")))
        server = stack.enter_context(Ours([], folder, *cpus))
        with many.rpc(server) as client:
            for i in range(disks):
                many.create_one(client, f"b{i}", cpumask=f"{1 << cpus[i % len(cpus)]:#x}")
        loads = []
        for i in range(disks):
            front = stack.enter_context(BlkFrontend(server.socket(f"b{i}")))
            loads.append(Load(front, WORK, cpus=(drivers[i % len(drivers)],)))
        run_together(loads, options.seconds / 5)  # to warm up
        before = server.cpu_seconds()
        done = run_together(loads, options.seconds)
        used = server.cpu_seconds() - before
    note = "" if set(drivers).isdisjoint(cpus) else "front-ends and reactors share CPUs"
    session.add(case, OURS, IOPS, sum(each.total.iops for each in done), note)
    session.add(case, OURS, P99, max(each.total.percentile(99) for each in done) * 1e6)
    session.add(case, OURS, CPU, used / sum(each.total.ops for each in done) * 1e6)


def run(session: Session) -> None:
    """Run all rounds; in each, everything once."""
    options = session.options
    idle = options.choose((0, 10), (0, 10, 100, 1000), (0, 1, 10, 100, 300, 1000))
    together = options.choose((2,), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32))
    everyone = sorted({options.driver_cpu, options.server_cpu} | options.cpus())
    reactors = sorted({1, 2, len(everyone) // 2, len(everyone)} - {0})
    among_idle(session, idle, options.rounds)
    for _ in session.track(range(min(options.rounds, 3)), "scale: busy devices"):
        for disks in together:
            busy(session, {"busy": disks}, disks, [options.server_cpu])
        for count in options.choose((2,), reactors, reactors):
            if count <= len(everyone):
                busy(session, {"reactors": count}, count, everyone[-count:])


benchmark = Benchmark("scale", "Speed and how much there is (null, 512 B, depth 128)", run)
