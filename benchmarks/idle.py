"""What a cluster costs while nothing happens, and how fast it is awake."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import bare, many
from benchmarks.many import MIB
from benchmarks.series import Case, Quantity
from benchmarks.servers import Disk, Ours
from benchmarks.suite import OURS, Benchmark, Session, require_memory
from vhost.frontend import BlkFrontend
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.workload import Runner, Workload, run

IDLE = Quantity("idle CPU", "% of one CPU")
READY = Quantity("ready", "s")
MEMORY = Quantity("memory of a device", "KiB")
WAKE_P50 = Quantity("wake-up p50", "µs")
WAKE_P99 = Quantity("wake-up p99", "µs")

BARE = "bare sleeping ring"


def first_answer(
    queues: Sequence[DriverQueue], memory: FrontendMemory, count: int, cpu: int
) -> list[float]:
    """Return, in µs, how long a sleeping queue takes to answer, ``count`` times."""
    times = []
    work = Workload(size=MIB, block_size=512, requests=1)
    for _ in range(count):
        time.sleep(0.005)  # longer than any queue spins
        runner = Runner(work, queues, memory, cpus=(cpu,))
        times.append(run(runner).total.latency_max * 1e6)
    return sorted(times)


def add_wake_up(session: Session, case: Case, who: str, times: list[float]) -> None:
    """Add what first_answer() has found."""
    session.add(case, who, WAKE_P50, times[len(times) // 2])
    session.add(case, who, WAKE_P99, times[len(times) * 99 // 100])


def measure_one(session: Session, devices: int) -> None:
    """Measure a cluster with so many connected, idle disks."""
    options = session.options
    case: Case = {"devices": devices}
    require_memory(devices * many.COST)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idle-")))
        started = time.monotonic()
        server = stack.enter_context(
            Ours([Disk("null", 64 * MIB, Path())], folder, options.server_cpu)
        )
        session.add(case, OURS, READY, time.monotonic() - started)
        many.settle(server)
        before = many.resident(server)
        with many.rpc(server) as client:
            many.create(client, devices)
        many.connect(stack, server, devices)
        many.settle(server)
        seconds = options.choose(0.5, 5.0, 20.0)
        used = server.cpu_seconds()
        time.sleep(seconds)
        used = server.cpu_seconds() - used
        session.add(case, OURS, IDLE, used / seconds * 100)
        if devices:
            session.add(case, OURS, MEMORY, (many.resident(server) - before) / devices)
        wakes, cpu = options.choose(20, 500, 2000), options.driver_cpu
        with BlkFrontend.connect(server.folder / "null", queue_size=128, memory=MIB) as front:
            times = first_answer(front.queues, front.memory, wakes, cpu)
        add_wake_up(session, case, OURS, times)
        # What the kernel and the machine take, in the same minute.
        with bare.sleeper(options.server_cpu) as (queue, memory):
            add_wake_up(session, case, BARE, first_answer([queue], memory, wakes, cpu))


def measure(session: Session) -> None:
    """Measure with 0 to 1000 disks."""
    options = session.options
    counts = options.choose((0, 10), (0, 1, 100, 1000), (0, 1, 10, 100, 1000))
    todo = [count for _ in range(min(options.rounds, 3)) for count in counts]
    for devices in session.track(todo, "idle"):
        if options.wanted({"devices": devices}):
            measure_one(session, devices)


benchmark = Benchmark("idle", "Connected, idle disks", measure)
