"""One measurement with the load generator: warmed up, steady, and counted from then on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.series import CPU, IOPS, P50, P99, Case
from benchmarks.suite import Session
from vhost.frontend_memory import FrontendMemory
from vhost.io import Disk, plan
from vhost.results import Direction, Results
from vhost.workload import Runner, Workload, run

WINDOW = 0.05  # seconds of one look at the rate
STEADY = 3  # windows in a row that must agree
TOLERANCE = 0.05
HUGE = 2 << 20  # bytes of a huge page
PATIENCE = 12  # windows, after which it is measured nonetheless, and said

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was done, the CPU time of the target in seconds, and whether the rate had settled."""

    results: Results
    cpu_seconds: float
    steady: bool

    @property
    def total(self) -> Direction:
        """Reads and writes together."""
        return self.results.total


def guest_memory(size: int, *, huge: bool = False) -> FrontendMemory:
    """Return memory for at least so many bytes, of huge pages if asked for.

    OSError, saying how to set some aside, if there are too few of them.
    """
    if not huge:
        return FrontendMemory(size)
    size = -(-size // HUGE) * HUGE
    try:
        return FrontendMemory(size, backing=_huge_memfd)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{size // HUGE} huge pages for a guest: {error.strerror}: as root, write more than"
            " there are into /proc/sys/vm/nr_hugepages",
        ) from None


def _huge_memfd(size: int) -> tuple[int, int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, size)
    return fd, 0


class Load:
    """A workload on a connected disk that may be run many times on the same queues."""

    def __init__(
        self,
        disk: Disk,
        work: Workload,
        *,
        queues: int = 1,
        cpus: Sequence[int] = (),
        huge: bool = False,
    ) -> None:
        self.work, size = plan(disk, work, queues, 0)
        disk.set_up(queues, size, guest_memory(self.work.memory(queues, size), huge=huge))
        self.disk, self.cpus = disk, cpus

    def run(self, seconds: float) -> Results:
        """Run for so long; RuntimeError when a request fails."""
        work = replace(self.work, runtime=seconds)
        done = run(Runner(work, self.disk.queues, self.disk.memory, cpus=self.cpus))
        if not done.good:
            raise RuntimeError(f"{self.disk.path}: {done.first_error or done.mismatch}")
        return done

    def warm_up(self) -> bool:
        """Run until the rate of several windows in a row agrees; whether it came to that."""
        rates: list[float] = []
        for _ in range(PATIENCE):
            rates = [*rates, self.run(WINDOW).total.iops][-STEADY:]
            if len(rates) == STEADY and max(rates) - min(rates) <= TOLERANCE * max(rates):
                return True
        return False

    def measure(self, seconds: float, used: Clock | None = None) -> Measured:
        """Warm up, and measure; ``used`` says what CPU time the target has used so far."""
        steady = self.warm_up()
        used = used or itertools.repeat(0.0).__next__
        before = used()
        done = self.run(seconds)
        return Measured(done, used() - before, steady)


def record(session: Session, case: Case, contender: str, found: Measured) -> None:
    """Add the figures that everybody wants: rate, latencies, CPU time of the target."""
    total = found.total
    note = "" if found.steady else "the rate had not settled when a round began"
    session.add(case, contender, IOPS, total.iops, note)
    session.add(case, contender, P50, total.percentile(50) * 1e6)
    session.add(case, contender, P99, total.percentile(99) * 1e6)
    if found.cpu_seconds:
        session.add(case, contender, CPU, found.cpu_seconds / total.ops * 1e6)
