"""What the control process takes its time for: many controllers, a configuration, a start."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import many
from benchmarks.series import Case, Quantity
from benchmarks.servers import Disk, Ours
from benchmarks.suite import OURS, Benchmark, Session

READY = Quantity("ready", "s")
DISKS = Quantity("create disks", "s")
CREATE = Quantity("create", "s")
LIST = Quantity("list", "s")
DELETE = Quantity("delete", "s")
LOAD = Quantity("start with configuration", "s")
MEMORY = Quantity("memory", "KiB a controller")


def disk(number: int) -> dict[str, Any]:
    """Return what makes a null disk."""
    return {"name": f"N{number}", "num_blocks": 1 << 20, "block_size": 512}


def controller(number: int) -> dict[str, Any]:
    """Return what makes its controller."""
    return {"ctrlr": f"n{number}", "dev_name": f"N{number}"}


def create_and_delete(session: Session, count: int) -> None:
    """Measure a cluster that gets so many controllers, one call after another."""
    case: Case = {"controllers": count}

    def timed(quantity: Quantity, calls: list[tuple[str, dict[str, Any]]]) -> None:
        started = time.monotonic()
        for method, params in calls:
            client.call(method, params)
        session.add(case, OURS, quantity, time.monotonic() - started)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="control-")))
        started = time.monotonic()
        server = stack.enter_context(
            Ours([Disk("null", 1 << 20, Path())], folder, session.options.server_cpu)
        )
        session.add(case, OURS, READY, time.monotonic() - started)
        client = stack.enter_context(many.rpc(server))
        time.sleep(many.SETTLE)
        timed(DISKS, [("bdev_null_create", disk(i)) for i in range(count)])
        before = many.resident(server)
        timed(CREATE, [("vhost_create_blk_controller", controller(i)) for i in range(count)])
        session.add(case, OURS, MEMORY, (many.resident(server) - before) / count)
        timed(LIST, [("vhost_get_controllers", {})])
        names = [{"ctrlr": f"n{i}"} for i in range(count)]
        timed(DELETE, [("vhost_delete_controller", name) for name in names])


def load(session: Session, count: int) -> None:
    """Measure a start with a configuration, until everything of it is there."""
    calls = {
        "bdev": [{"method": "bdev_null_create", "params": disk(i)} for i in range(count)],
        "vhost_blk": [
            {"method": "vhost_create_blk_controller", "params": controller(i)} for i in range(count)
        ],
    }
    sections = [{"subsystem": name, "config": config} for name, config in calls.items()]
    with tempfile.TemporaryDirectory(prefix="control-") as place:
        config = Path(place) / "config.json"
        config.write_text(json.dumps({"subsystems": sections}))
        started = time.monotonic()
        with (
            Ours([], Path(place), session.options.server_cpu, config=config) as server,
            many.rpc(server) as client,
        ):
            client.call("framework_wait_init", {})
            took = time.monotonic() - started
            made = len(client.call("vhost_get_controllers", {}))
    if made != count:
        raise RuntimeError(f"{made} of {count} controllers were made")
    session.add({"controllers": count}, OURS, LOAD, took)


def run(session: Session) -> None:
    """Run all rounds."""
    counts = session.options.choose((20,), (1, 100, 1000), (1, 10, 100, 300, 1000))
    todo = [count for _ in range(min(session.options.rounds, 3)) for count in counts]
    for count in session.track(todo, "control"):
        create_and_delete(session, count)
        load(session, count)


benchmark = Benchmark("control", "Many controllers", run)
