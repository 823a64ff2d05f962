"""What a light guest notices of a heavy one on the same reactor.

The light guest asks at a fixed rate, whatever becomes of its requests (an open loop): latency
counts from when each was due, so that waiting is not left out. The heavy one has deep queues of
large reads and sleeps until it is signalled, which leaves the front-ends' CPU to the light one.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import many
from benchmarks.load import Load
from benchmarks.series import IOPS, P50, P99, Case, Quantity
from benchmarks.servers import Disk, Ours
from benchmarks.suite import OURS, Benchmark, Session
from vhost.frontend import BlkFrontend
from vhost.results import Results
from vhost.workload import Runner, Workload

SIZE = 64 << 20
P999 = Quantity("p99.9", "µs")
HEAVY_BEGUN = 100  # requests, after which it is at work
RATE = 2000  # requests a second of the light guest
LIGHT = Workload(size=0, block_size=4096, depth=16, rate=RATE, seed=1)
HEAVY = {
    "64 KiB, depth 64": Workload(size=0, block_size=65536, depth=64, interrupt=True, seed=2),
    "1 MiB, depth 16": Workload(size=0, block_size=1 << 20, depth=16, interrupt=True, seed=2),
    "4 KiB, depth 256": Workload(size=0, block_size=4096, depth=256, interrupt=True, seed=2),
}


def beside(light: Load, heavy: Load, seconds: float) -> tuple[Results, Results]:
    """Run the light guest while the heavy one is at work all the time."""
    work = replace(heavy.work, runtime=3600)
    runner = Runner(work, heavy.disk.queues, heavy.disk.memory, cpus=heavy.cpus)
    with runner:
        runner.start()
        while runner.running and runner.ops() < HEAVY_BEGUN:
            runner.wait(0.01)
        found = light.run(seconds)
        runner.stop()
        other = runner.finish()
    if not other.good:
        raise RuntimeError(f"{heavy.disk.path}: {other.first_error}")
    return found, other


def record(session: Session, case: Case, found: Results) -> None:
    """Add the light guest's latencies."""
    total = found.total
    for quantity, percent in ((P50, 50), (P99, 99), (P999, 99.9)):
        session.add(case, OURS, quantity, total.percentile(percent) * 1e6)


def run(session: Session) -> None:
    """Alone and beside each heavy guest, in turns."""
    options = session.options
    seconds = options.choose(0.2, 2.0, 5.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fairness-")))
        disk = Disk("malloc", SIZE, Path())
        server = stack.enter_context(Ours([disk], folder, options.server_cpu))
        with many.rpc(server) as client:
            client.call(
                "bdev_malloc_create", {"name": "H", "num_blocks": SIZE // 512, "block_size": 512}
            )
            client.call("vhost_create_blk_controller", {"ctrlr": "heavy", "dev_name": "H"})
        cpus = (options.driver_cpu,)
        for _ in session.track(range(options.rounds), "fairness"):
            for name, work in HEAVY.items():
                with (
                    BlkFrontend(server.socket("malloc")) as one,
                    BlkFrontend(server.socket("heavy")) as other,
                ):
                    light, heavy = Load(one, LIGHT, cpus=cpus), Load(other, work, cpus=cpus)
                    case: Case = {"light": "alone", "heavy": name}
                    record(session, case, light.run(seconds))
                    mine, theirs = beside(light, heavy, seconds)
                    case = {"light": "beside a heavy one", "heavy": name}
                    record(session, case, mine)
                    session.add(case, "the heavy guest", IOPS, theirs.total.iops)


benchmark = Benchmark("fairness", "A light guest (open loop, 2000/s) and a heavy one", run)
