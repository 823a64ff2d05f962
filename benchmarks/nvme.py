"""``python -m benchmarks nvme``: instructions that the NVMe driver spends on a request.

Counted by valgrind's callgrind, so that neither the machine's load nor a device's time matters. The
driver's own part is all that happens from the bdev layer's call to the doorbell, and from the
completion queue to the bdev layer's completion.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
LOOP = ROOT / "benchmarks" / "nvme_loop.c"
PACKAGES = ("reactor", "bdev")  # all of their C: what of it the loop needs, the linker finds out
FLAGS = ["-std=gnu17", "-D_GNU_SOURCE", "-O3", "-g", "-flto", "-fvisibility=hidden"]
FLAGS += ["-fno-strict-aliasing", f"-I{ROOT}", "-w"]  # as reactor/_native_build.py has them


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
        raise click.ClickException(done.stderr.decode(errors="replace"))
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


@click.command("nvme")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(*, as_json: bool) -> None:
    """Count the NVMe driver's instructions for a read of 4 KiB."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        counts = [count(program, depth) for depth in (1, 32, 128)]
    if as_json:
        click.echo(json.dumps([{**asdict(one), "driver": one.driver} for one in counts]))
        return
    click.echo("depth  submit  complete  doorbell  driver  bdev layer's completion")
    for one in counts:
        click.echo(
            f"{one.depth:5}  {one.submit:6.1f}  {one.complete:8.1f}  {one.doorbell:8.1f}"
            f"  {one.driver:6.1f}  {one.bdev_layer:.1f}"
        )
