"""``python -m benchmarks nvme``: instructions that the NVMe driver spends on a request.

Counted by valgrind's callgrind, so that neither the machine's load nor a device's time matters. The
driver's own part is all that happens from the bdev layer's call to the doorbell, and from the
completion queue to the bdev layer's completion.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.series import Case, Quantity
from benchmarks.suite import Benchmark, Session

ROOT = Path(__file__).resolve().parent.parent
LOOP = ROOT / "benchmarks" / "nvme_loop.c"
PACKAGES = ("reactor", "bdev")  # all of their C: what of it the loop needs, the linker finds out
FLAGS = ["-std=gnu17", "-D_GNU_SOURCE", "-O3", "-g", "-flto", "-fvisibility=hidden"]
FLAGS += ["-fno-strict-aliasing", f"-I{ROOT}", "-w"]  # as reactor/_native_build.py has them
INSTRUCTIONS = Quantity("instructions", "a request")


@dataclass(frozen=True)
class Count:
    """Instructions a request, at one depth."""

    depth: int
    submit: float
    complete: float
    doorbell: float
    bdev_layer: float  # of bdev_complete(), which is not in ``complete``

    @property
    def driver(self) -> float:
        """The driver's own part."""
        return self.submit + self.complete + self.doorbell


def build(folder: Path) -> Path:
    """Compile the loop with the driver, as the extension is compiled."""
    program = folder / "nvme_loop"
    files = [path for name in PACKAGES for path in sorted((ROOT / name).glob("[!_]*.c"))]
    subprocess.run(["gcc", *FLAGS, LOOP, *files, "-o", program, "-luring"], check=True)
    return program


def count(program: Path, depth: int, batches: int = 500) -> Count:
    """Run the loop under callgrind and return what each part took."""
    costs = program.with_suffix(f".{depth}")
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={costs}", str(program)]
    done = subprocess.run([*command, str(batches), str(depth)], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    annotate = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(costs)]
    text = subprocess.run(annotate, capture_output=True, text=True, check=True).stdout
    found: dict[str, int] = {}
    for line in text.splitlines():
        cost, _, rest = line.strip().partition(" (")
        name = rest.partition(")  ")[2].partition(" [")[0].rpartition(":")[2]
        if name and cost.replace(",", "").isdecimal():
            found[name] = max(found.get(name, 0), int(cost.replace(",", "")))
    requests = depth * batches
    layer = found["bdev_complete"] / requests
    return Count(
        depth,
        submit=found["nvme_submit"] / requests,
        complete=found["queue_run"] / requests - layer,
        doorbell=found.get("ring_submissions", 0) / requests,
        bdev_layer=layer,
    )


def run(session: Session) -> None:
    """Count the NVMe driver's instructions for a read of 4 KiB."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for depth in session.options.choose((32,), (1, 32, 128), (1, 8, 32, 128)):
            found = count(program, depth, session.options.choose(50, 500, 500))
            case: Case = {"depth": depth}
            for part in ("submit", "complete", "doorbell"):
                session.add(case, part, INSTRUCTIONS, getattr(found, part))
            session.add(case, "the driver, in all", INSTRUCTIONS, found.driver)
            session.add(case, "completion in the bdev layer", INSTRUCTIONS, found.bdev_layer)


benchmark = Benchmark(
    "nvme", "NVMe driver, read of 4 KiB", run, base="-", needs=("gcc", "valgrind")
)
