"""What a cluster costs while nothing happens: CPU, memory, and the time until it is ready."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.servers import Disk, Ours
from reactor.rpc_client import RpcClient
from vhost.frontend import BlkFrontend
from vhost.workload import Runner, Workload, run

SETTLE = 1.0  # seconds between the last connection and the measurement
MIB = 1 << 20


def resident(processes: Sequence[psutil.Process]) -> dict[str, float]:
    """Return MiB of resident memory by the name of the process."""
    return {process.name(): process.memory_info().rss / MIB for process in processes}


def connect(stack: ExitStack, server: Ours, count: int) -> None:
    """Serve ``count`` null disks, connect a front-end to each, and use each once."""
    with RpcClient(server.folder / "run" / "rpc.sock", timeout=60) as rpc:
        for i in range(count):
            disk = {"name": f"N{i}", "num_blocks": 1 << 20, "block_size": 512}
            rpc.call("bdev_null_create", disk)
            rpc.call("vhost_create_blk_controller", {"ctrlr": f"n{i}", "dev_name": f"N{i}"})
    for i in range(count):
        front = BlkFrontend.connect(server.folder / f"n{i}", queue_size=128, memory=MIB)
        stack.enter_context(front).read(0, 512)


def first_answer(server: Ours, disk: str, count: int) -> list[float]:
    """Return, in µs, how long a sleeping queue takes to answer, ``count`` times."""
    times = []
    with BlkFrontend.connect(server.folder / disk, queue_size=128, memory=MIB) as front:
        work = Workload(size=MIB, block_size=512, requests=1, interrupt=False)
        for _ in range(count):
            time.sleep(0.005)
            times.append(run(Runner(work, front.queues, front.memory)).total.percentile(50) * 1e6)
    return sorted(times)


def measure(devices: int, seconds: float, cpu: int) -> dict[str, Any]:
    """Return the figures with so many connected, idle disks."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idle-")))
        started = time.monotonic()
        null = Disk("null", 64 * MIB, Path())
        server = stack.enter_context(Ours([null], folder, cpu))
        ready = time.monotonic() - started
        processes = [server.process, *server.process.children()]
        time.sleep(SETTLE)  # until the standby has imported all that it will need
        before = resident(processes)
        connect(stack, server, devices)
        time.sleep(SETTLE)
        used = server.cpu_seconds()
        time.sleep(seconds)
        used = server.cpu_seconds() - used
        after = resident(processes)
        wake = first_answer(server, "null", 200)
        return {
            "devices": devices,
            "cpu_percent": used / seconds * 100,
            "ready_seconds": ready,
            "resident_mib": after,
            "kib_per_device": (sum(after.values()) - sum(before.values())) * 1024 / max(devices, 1),
            "wake_up_p50_us": wake[len(wake) // 2],
            "wake_up_p99_us": wake[len(wake) * 99 // 100],
        }


@click.command("idle")
@click.option("--devices", multiple=True, type=int, default=(0, 1, 100), show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement.")
@click.option("--server-cpu", type=int, default=1, show_default=True)
@click.option("--json", "output", type=click.Path(dir_okay=False, writable=True, path_type=Path))
def command(devices: tuple[int, ...], seconds: float, server_cpu: int, output: Path | None) -> None:
    """CPU, memory and wake-up latency of a cluster with connected, idle disks."""
    results = [measure(count, seconds, server_cpu) for count in devices]
    table = Table(box=box.SIMPLE, caption="ready: from the command to its first answer")
    for name in (
        *("devices", "CPU %", "ready s", "control MiB", "reactor MiB", "KiB a device"),
        *("wake-up p50 µs", "p99 µs"),
    ):
        table.add_column(name, justify="right")
    for found in results:
        memory = found["resident_mib"]
        reactor = max((size for name, size in memory.items() if "reactor-" in name), default=0)
        table.add_row(
            str(found["devices"]),
            f"{found['cpu_percent']:.2f}",
            f"{found['ready_seconds']:.2f}",
            f"{sum(memory.values()) - reactor:.0f}",
            f"{reactor:.0f}",
            f"{found['kib_per_device']:.0f}" if found["devices"] else "",
            f"{found['wake_up_p50_us']:.0f}",
            f"{found['wake_up_p99_us']:.0f}",
        )
    Console(width=120).print(table)
    if output is not None:
        report = {"machine": machine.facts(), "idle": results}
        output.write_text(json.dumps(report, indent=1) + "\n")
