"""A verified load on a disk of a cluster that is run as its user runs it, while parts of it die."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import ROOT, Cluster
from vhost.frontend import BlkFrontend
from vhost.messages import Request, VringState
from vhost.results import Results
from vhost.workload import Runner, Workload, run

SIZE = 16 << 20  # bytes of the disk
STALL = 100.0  # seconds without an answer after which the load gives up
PATIENCE = 100.0  # seconds that a test waits for anything


@dataclass(frozen=True)
class Disk:
    """What is served."""

    kind: str
    packed: bool

    def __str__(self) -> str:
        return f"{self.kind}, {'packed' if self.packed else 'split'}"


DISKS = [Disk(kind, packed) for kind in ("malloc", "file") for packed in (False, True)]


@contextmanager
def cluster(
    cpumask: str = "0x1", arguments: Sequence[str] = (), root: Path = ROOT
) -> Iterator[Cluster]:
    """Run a cluster; whatever is left of it at the end is killed."""
    with tempfile.TemporaryDirectory(prefix="vr-") as folder:
        made = Cluster(Path(folder), cpumask, arguments, root)
        try:
            yield made
        finally:
            made.kill()


def serve(target: Cluster, disk: Disk) -> None:
    """Serve a new disk as controller "b0"."""
    if disk.kind == "file":
        path = target.run_dir.parent / "disk"
        with path.open("wb") as file:
            file.truncate(SIZE)
        target.rpc("bdev_uring_create", name="d", filename=str(path), block_size=512)
    else:
        target.rpc("bdev_malloc_create", name="d", num_blocks=SIZE >> 9, block_size=512)
    target.rpc("vhost_create_blk_controller", ctrlr="b0", dev_name="d", packed_ring=True)


class Load:
    """Reads and writes that are verified, on a connection that nobody may notice anything of."""

    def __init__(self, target: Cluster, disk: Disk, queues: int = 2, seed: int = 1) -> None:
        self.front = BlkFrontend.connect(
            str(target.socket("b0")), queues=queues, packed=disk.packed, timeout=PATIENCE
        )
        work = Workload(
            self.front.size, "randrw", depth=8, verify=True, runtime=1e6, seed=seed, stall=STALL
        )
        self._runner = Runner(work, self.front.queues, self.front.memory)
        self.results: Results | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.results = run(self._runner)

    def progress(self, count: int = 1000) -> None:
        """Wait until so many more requests have been answered."""
        wanted, deadline = self._runner.ops() + count, time.monotonic() + PATIENCE
        while self._runner.ops() < wanted:
            assert time.monotonic() < deadline, "the load does not go on"
            assert self._thread.is_alive(), self.results
            time.sleep(0.002)

    def end(self) -> None:
        """Stop it; nothing has failed, nothing was lost, and the connection still answers."""
        self._runner.stop()
        self._thread.join()
        results = self.results
        assert results is not None
        assert results.errors == 0, results.first_error
        assert results.mismatches == 0, results.mismatch
        assert results.verified > 0
        self.front.close()

    def abandon(self) -> None:
        """Stop it, whatever has become of it."""
        self._runner.stop()
        self._thread.join()
        self.front.close()


@contextmanager
def load(target: Cluster, disk: Disk, queues: int = 2, seed: int = 1) -> Iterator[Load]:
    """Run a load until the end of the block; nothing may happen to it."""
    made = Load(target, disk, queues, seed)
    try:
        made.progress()
        yield made
        made.progress()
    except BaseException:
        made.abandon()
        raise
    made.end()


@contextmanager
def messages(front: BlkFrontend) -> Iterator[None]:
    """Stop and start the queues all the time, until the end of the block; no message may fail."""
    ended, failures = threading.Event(), []

    def send() -> None:
        try:
            while not ended.is_set():
                for queue in front.queues:
                    for enable in (0, 1):
                        front.raw.tell(Request.SET_VRING_ENABLE, VringState(queue.index, enable))
                assert front.raw.number(Request.GET_QUEUE_NUM) > 0
        except BaseException as error:
            failures.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()
    assert not failures


def saved(target: Cluster) -> list[object]:
    """Return the configuration, as save_config has it."""
    subsystems = target.rpc("framework_get_subsystems")
    return [target.rpc("framework_get_config", name=one["subsystem"]) for one in subsystems]
