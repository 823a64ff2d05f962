"""Latency at rates below what a target can do, in an open loop: free of coordinated omission.

Requests are due at fixed times and their latency counts from then, so a target that stalls pays for
every request that should have been made meanwhile. Loads are parts of the rate that each contender
reached in a closed loop just before.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from benchmarks.contest import DISKS, files, start_servers
from benchmarks.load import Load
from benchmarks.series import IOPS, P50, P99, Case, Quantity
from benchmarks.servers import Server, listening
from benchmarks.suite import Benchmark, Session
from vhost.workload import Workload

P999 = Quantity("p99.9", "µs")
LOADS = (10, 30, 50, 70, 80, 90)  # percent of the closed loop's rate
DEPTH = 128  # requests that may wait
BLOCK = 4096


def measure(session: Session, server: Server, disk: str, loads: tuple[int, ...]) -> None:
    """Find the rate that a target can do, and then latencies at parts of it."""
    options = session.options
    work = Workload(size=0, block_size=BLOCK, depth=DEPTH, seed=1)
    with server.open(disk) as front:
        load = Load(front, work, cpus=(options.driver_cpu,), huge=options.huge)
        load.warm_up()
        most = load.run(options.seconds).total.iops
        for percent in loads:
            load.work = replace(load.work, rate=most * percent / 100)
            total = load.run(max(options.seconds, 100 / load.work.rate)).total
            case: Case = {"disk": disk, "load %": percent}
            session.add(case, server.name, IOPS, total.iops)
            for quantity, part in ((P50, 50), (P99, 99), (P999, 99.9)):
                session.add(case, server.name, quantity, total.percentile(part) * 1e6)


def run(session: Session) -> None:
    """Run all rounds, contenders in turn."""
    options = session.options
    loads = options.choose((50,), LOADS, LOADS)
    disks = options.choose(("null",), DISKS, DISKS)
    disks = tuple(disk for disk in disks if options.wanted({"disk": disk}))
    with ExitStack() as stack:
        made = stack.enter_context(files(options.folder))
        servers = start_servers(stack, options, [made[disk] for disk in disks])
        todo = [disk for _ in range(min(options.rounds, 3)) for disk in disks]
        for disk in session.track(todo, "latency"):
            for server in servers:
                with server.turn(disk):
                    listening(server, made[disk])
                    measure(session, server, disk, loads)


benchmark = Benchmark("latency", "Open-loop latency, 4 KiB reads", run, base="*", memory=1 << 30)
