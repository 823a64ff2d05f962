"""A cluster with two disks, for a first look: ``make run``, or ``vhost-reactor demo``.

Starts ``vhost-reactor start`` with an embedded configuration in a directory of its own, writes to
and reads from both disks through the user-space front-end, says how to attach a guest, and serves
until Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from reactor.failure import Failure
from vhost.frontend import BlkFrontend
from vhost.results import Results
from vhost.workload import Runner, Workload, run

MIB = 1 << 20
DISK_SIZE = 256 * MIB
DISKS = {"ram0": "memory", "file0": "a file"}
PROOF_SECONDS = 1.0

QEMU = """\
qemu-system-x86_64 -machine q35,accel=kvm:tcg -m 1G \\
  -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem \\
{disks}  -drive file=YOUR-SYSTEM-IMAGE,if=virtio"""
QEMU_DISK = """\
  -chardev socket,id={name},path={socket} \\
  -device vhost-user-blk-pci,chardev={name} \\
"""

console = Console(highlight=False, soft_wrap=True)


def configuration(file: Path) -> dict[str, Any]:
    """Return the saved form of a configuration with a disk of memory and a disk in ``file``."""
    bdevs = [
        {
            "method": "bdev_malloc_create",
            "params": {"name": "Malloc0", "block_size": 512, "num_blocks": DISK_SIZE // 512},
        },
        {
            "method": "bdev_uring_create",
            "params": {"name": "File0", "filename": str(file), "block_size": 512},
        },
    ]
    controllers = [
        {"method": "vhost_create_blk_controller", "params": {"ctrlr": name, "dev_name": bdev}}
        for name, bdev in zip(DISKS, ("Malloc0", "File0"), strict=True)
    ]
    return {
        "subsystems": [
            {"subsystem": "bdev", "config": bdevs},
            {"subsystem": "vhost_blk", "config": controllers},
        ]
    }


@contextmanager
def serving(directory: Path, options: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """Run the cluster; it is ready when the body begins, and over when the body is left."""
    image = directory / "file0.img"
    with image.open("wb") as file:
        file.truncate(DISK_SIZE)
    config = directory / "config.json"
    config.write_text(json.dumps(configuration(image)))
    command = [sys.executable, "-m", "vhost.cli", "start", "--run-dir", str(directory / "run")]
    command += ["-S", str(directory), "-r", str(directory / "rpc.sock"), "-c", str(config)]
    command += ["--log-level", "warning"]
    # Nobody starts a control process again that dies: the rest ends with it.
    command += ["--orphan-timeout", "0.1"]
    # In a session of its own: Ctrl-C is for us, and we end it in order.
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready:
            raise Failure("the cluster did not start")
        console.print(ready.strip())
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def prove(socket: Path) -> Results:
    """Write to and read from a disk for a second; every block read is checked."""
    work = Workload(
        size=64 * MIB, mode="randrw", depth=16, runtime=PROOF_SECONDS, verify=True, seed=1
    )
    memory = work.memory(1, work.queue_size())
    with BlkFrontend.connect(socket, queue_size=work.queue_size(), memory=memory) as disk:
        return run(Runner(work, disk.queues, disk.memory))


def show_proof(directory: Path) -> bool:
    """Prove every disk and print what came of it; False if one failed."""
    table = Table(title="a second of verified random reads and writes on each disk")
    for heading in ("disk", "made of"):
        table.add_column(heading)
    for heading in ("reads", "writes", "blocks verified", "wrong"):
        table.add_column(heading, justify="right")
    good = True
    for name, what in DISKS.items():
        results = prove(directory / name)
        wrong = results.mismatches + results.errors
        good &= wrong == 0 and results.verified > 0
        counts = (results.read.ops, results.write.ops, results.verified, wrong)
        table.add_row(name, what, *(f"{count:,}" for count in counts))
    console.print(table)
    return good


def wait_for_end(process: subprocess.Popen[str]) -> int:
    """Serve until a signal comes, or the cluster ends by itself; return its exit status."""
    try:
        console.print("Serving until Ctrl-C.")
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--once", is_flag=True, help="End after the proof.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def demo_command(once: bool, options: tuple[str, ...]) -> None:
    """Serve a disk of memory and a disk in a file, and show that they work.

    OPTIONS are passed to ``vhost-reactor start``, e.g. -m 0x3.
    """
    # From the beginning: a signal that comes at any time must leave nothing behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="vhost-reactor-") as made:
        directory = Path(made)
        with serving(directory, options) as process:
            if not show_proof(directory):
                raise Failure("a disk did not return what was written to it")
            disks = "".join(QEMU_DISK.format(name=name, socket=directory / name) for name in DISKS)
            console.print("\nTo attach both to a guest, whose memory must be shared:\n")
            console.print(QEMU.format(disks=disks) + "\n")
            command = os.path.relpath(Path(sys.executable).with_name("vhost-reactor"))
            rpc = f"{command} rpc --socket {directory / 'rpc.sock'}"
            console.print(f"To look inside:\n\n{rpc} vhost_get_controllers\n")
            if once:
                return
            status = wait_for_end(process)
    if status:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended: {status}"
        raise Failure(f"the control process {how}")
    console.print("\nStopped; nothing is left behind.")


if __name__ == "__main__":
    demo_command(prog_name="vhost-reactor demo")
