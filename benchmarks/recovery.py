"""How long a front-end waits when a part of the target dies, or all of it is upgraded.

In each round a verified load runs on a disk, and at a random moment of it the reactor is killed
with SIGKILL, or the control process is and the next one started, or ``vhost-reactor upgrade`` run.
The pause is the longest that any request of the round took. Rounds in which nothing happens, in
between, say how long the machine itself makes requests wait.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.contest import files
from benchmarks.series import Quantity
from benchmarks.servers import READY, Disk, Ours, listening
from benchmarks.suite import OURS, Benchmark, Session
from reactor.cluster import CRASH_LOOP, CRASH_WINDOW
from reactor.rpc_client import RpcClient
from vhost.frontend import BlkFrontend
from vhost.upgrade import ask_for_upgrade
from vhost.workload import Runner, Workload, run

# Longer than what the cluster takes for a crash loop, in which it delays restarts.
ROUND = CRASH_WINDOW / (CRASH_LOOP - 1) + 0.1  # seconds


NOTHING = "nothing"

PAUSE = Quantity("longest request", "ms")
DEPTH = 32
ROUNDS = 2  # for each of the suite's: pauses vary


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


def run_events(session: Session, server: Ours, disk: Disk, work: Workload) -> None:
    """Have everything happen under load in each round, and nothing a quarter as often."""
    options = session.options
    listening(server, disk)
    with BlkFrontend.connect(server.socket(disk.kind), queue_size=work.queue_size()) as front:
        for number in session.track(range(options.rounds * ROUNDS), f"recovery, {disk.kind}"):
            for event in (*EVENTS, NOTHING) if number % 4 == 0 else EVENTS:
                pause = longest_request(server, front, work, options.driver_cpu, event)
                session.add({"disk": disk.kind, "event": event}, OURS, PAUSE, pause * 1e3)


def measure(session: Session) -> None:
    """Measure the pause of guests when something dies or is upgraded under a verified load."""
    options = session.options
    with files(options.folder) as made, tempfile.TemporaryDirectory(prefix="recovery-") as place:
        kinds = options.choose(("malloc",), ("malloc", "file"), ("malloc", "file"))
        wanted = [made[kind] for kind in kinds if options.wanted({"disk": kind})]
        with Ours(wanted, Path(place), options.server_cpu) as server:
            for disk in wanted:
                work = Workload(disk.size, "randrw", depth=DEPTH, runtime=1e6, verify=True, seed=1)
                run_events(session, server, disk, work)


benchmark = Benchmark("recovery", "Pauses", measure, memory=1 << 30)
