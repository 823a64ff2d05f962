"""What the control process takes its time for: many controllers, a configuration, a start.

Beside each time stands what all processes of the cluster used of their CPUs meanwhile, which the
rest of the machine, its disk and the client have less to do with.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import many
from benchmarks.series import Case, Quantity
from benchmarks.servers import Disk, Ours
from benchmarks.suite import OURS, Benchmark, Session, require_memory
from reactor.rpc_client import RpcClient

READY = Quantity("ready", "s")
MEMORY = Quantity("memory", "KiB a controller")
DISKS, CREATE, LIST, CONNECT, DELETE, LOAD = (
    "create disks",
    "create",
    "list",
    "connect",
    "delete",
    "start with configuration",
)


def disk(number: int) -> dict[str, Any]:
    """Return what makes a null disk."""
    return {"name": f"N{number}", "num_blocks": 1 << 20, "block_size": 512}


def controller(number: int) -> dict[str, Any]:
    """Return what makes its controller."""
    return {"ctrlr": f"n{number}", "dev_name": f"N{number}"}


def run_dir() -> str | None:
    """Return a directory in memory, as /run is where clusters run; None: there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def timed(session: Session, case: Case, name: str, server: Ours) -> Iterator[None]:
    """Measure what is done in the block, as ``name``."""
    used, started = server.cpu_seconds(), time.monotonic()
    yield
    session.add(case, OURS, Quantity(name, "s"), time.monotonic() - started)
    session.add(case, OURS, Quantity(f"{name}, CPU", "s"), server.cpu_seconds() - used)


def create_and_delete(session: Session, count: int) -> None:
    """Measure a cluster that gets so many controllers, one call after another."""
    case: Case = {"controllers": count}
    require_memory(count * many.COST)
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="control-", dir=run_dir())
        folder = Path(stack.enter_context(made))
        started = time.monotonic()
        server = stack.enter_context(
            Ours([Disk("null", 1 << 20, Path())], folder, session.options.server_cpu)
        )
        session.add(case, OURS, READY, time.monotonic() - started)
        client = stack.enter_context(many.rpc(server))
        many.settle(server)

        def each(name: str, method: str, calls: list[dict[str, Any]]) -> None:
            with timed(session, case, name, server):
                for params in calls:
                    client.call(method, params)

        each(DISKS, "bdev_null_create", [disk(i) for i in range(count)])
        before = many.resident(server)
        each(CREATE, "vhost_create_blk_controller", [controller(i) for i in range(count)])
        session.add(case, OURS, MEMORY, (many.resident(server) - before) / count)
        each(LIST, "vhost_get_controllers", [{}])
        connect(session, case, server, client, count)
        each(DELETE, "vhost_delete_controller", [{"ctrlr": f"n{i}"} for i in range(count)])


def connect(session: Session, case: Case, server: Ours, client: RpcClient, count: int) -> None:
    """Measure front-ends that come, one after another, and leave all of them."""
    with ExitStack() as fronts, timed(session, case, CONNECT, server):
        many.connect(fronts, server, count)
    while any(one["sessions"] for one in client.call("vhost_get_controllers", {})):
        time.sleep(0.05)


def load(session: Session, count: int) -> None:
    """Measure a start with a configuration, until everything of it is there."""
    calls = {
        "bdev": [{"method": "bdev_null_create", "params": disk(i)} for i in range(count)],
        "vhost_blk": [
            {"method": "vhost_create_blk_controller", "params": controller(i)} for i in range(count)
        ],
    }
    sections = [{"subsystem": name, "config": config} for name, config in calls.items()]
    with tempfile.TemporaryDirectory(prefix="control-", dir=run_dir()) as place:
        config = Path(place) / "config.json"
        config.write_text(json.dumps({"subsystems": sections}))
        started = time.monotonic()
        with (
            Ours([], Path(place), session.options.server_cpu, config=config) as server,
            many.rpc(server) as client,
        ):
            client.call("framework_wait_init", {})
            took, used = time.monotonic() - started, server.cpu_seconds()
            made = len(client.call("vhost_get_controllers", {}))
    if made != count:
        raise RuntimeError(f"{made} of {count} controllers were made")
    case: Case = {"controllers": count}
    session.add(case, OURS, Quantity(LOAD, "s"), took)
    session.add(case, OURS, Quantity(f"{LOAD}, CPU", "s"), used)


def run(session: Session) -> None:
    """Run all rounds."""
    counts = session.options.choose((20,), (1, 100, 1000), (1, 10, 100, 300, 1000))
    todo = [count for _ in range(min(session.options.rounds, 3)) for count in counts]
    for count in session.track(todo, "control"):
        if session.options.wanted({"controllers": count}):
            create_and_delete(session, count)
            load(session, count)


benchmark = Benchmark("control", "Many controllers", run)
