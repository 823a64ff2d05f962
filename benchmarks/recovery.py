"""How long a front-end waits when a part of the target dies, or all of it is upgraded.

In each round a verified load runs on a disk, and at a random moment of it the reactor is killed
with SIGKILL, or the control process is and the next one started, or ``vhost-reactor upgrade`` run;
or, on a cluster of two reactors, the disk is moved to the other one and back. The pause is the
longest that any request of the round took. Rounds in which nothing happens, in between, say how
long the machine itself makes requests wait.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contest import files
from benchmarks.series import Quantity
from benchmarks.servers import READY, Disk, Ours, listening
from benchmarks.suite import OURS, Benchmark, Options, Session
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


def there_and_back(kind: str, here: int, there: int) -> Callable[[Ours], None]:
    """Return what moves a disk to the reactor on another CPU, and back."""

    def move(server: Ours) -> None:
        with RpcClient(rpc_socket(server), timeout=READY) as rpc:
            for cpu in (there, here):
                rpc.call("vhost_controller_move", {"ctrlr": kind, "cpumask": f"[{cpu}]"})

    return move


def nothing(_server: Ours) -> None:
    """Let it run."""


Events = dict[str, Callable[[Ours], None]]
EVENTS: Events = {
    "reactor killed": kill_reactor,
    "control killed": kill_control,
    "upgrade": upgrade,
    NOTHING: nothing,
}


def longest_request(
    server: Ours, front: BlkFrontend, work: Workload, cpu: int, event: Callable[[Ours], None]
) -> float:
    """Run a load for at least a round, and until what happens is over; return the worst latency."""
    wait_for_standby(server)
    runner = Runner(work, front.queues, front.memory, cpus=(cpu,))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, runner)
        try:
            end = time.monotonic() + ROUND
            time.sleep(random.uniform(0.1, 0.4) * ROUND)
            event(server)
            time.sleep(max(0.0, end - time.monotonic()))
        finally:
            runner.stop()
            done = running.result()
    if not done.good:
        raise RuntimeError(f"{event.__name__}: {done.first_error or done.mismatch}")
    return done.total.latency_max


def run_events(
    session: Session, server: Ours, disk: Disk, events: Events, rounds: int, note: str = ""
) -> None:
    """Have everything happen under load in each round, and nothing in the first of four."""
    work = Workload(disk.size, "randrw", depth=DEPTH, runtime=1e6, verify=True, seed=1)
    listening(server, disk)
    with BlkFrontend.connect(server.socket(disk.kind), queue_size=work.queue_size()) as front:
        for number in session.track(range(rounds), f"recovery, {disk.kind}"):
            for name, event in events.items():
                if name == NOTHING and number % 4:
                    continue
                pause = longest_request(server, front, work, session.options.driver_cpu, event)
                session.add({"disk": disk.kind, "event": name}, OURS, PAUSE, pause * 1e3, note)


def spare_cpu(options: Options) -> tuple[int, str]:
    """Return a CPU for a second reactor, and the remark that it shares it, if it must."""
    free = options.cpus() - {options.server_cpu, options.driver_cpu}
    if free:
        return min(free), ""
    return options.driver_cpu, "while it is moved, reactor and front-end share a CPU"


def measure(session: Session) -> None:
    """Measure the pause of guests when something happens to the target under a verified load."""
    options = session.options
    rounds = options.choose(1, ROUNDS * options.rounds, ROUNDS * options.rounds)
    kinds = options.choose(("malloc",), ("malloc", "file"), ("malloc", "file"))
    here = options.server_cpu
    there, note = spare_cpu(options)
    with files(options.folder) as made:
        wanted = [made[kind] for kind in kinds if options.wanted({"disk": kind})]
        with started(wanted, here) as server:
            for disk in wanted:
                run_events(session, server, disk, EVENTS, rounds)
        with started(wanted, here, there) as server:
            for disk in wanted:
                move = there_and_back(disk.kind, here, there)
                move(server)  # so that it is here
                run_events(session, server, disk, {"moved": move}, rounds, note)


@contextmanager
def started(disks: list[Disk], *cpus: int) -> Iterator[Ours]:
    """Start a target in a folder of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="recovery-") as place,
        Ours(disks, Path(place), *cpus) as server,
    ):
        yield server


benchmark = Benchmark("recovery", "Pauses", measure, memory=1 << 30)
