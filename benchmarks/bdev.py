"""``python -m benchmarks bdev``: what each layer of the bdev part costs a request.

Each stack is made by the operations that users have, on a poll loop in this process, and requests
are made in C: so there is nothing but the layers. Rounds of all stacks take turns, and the best one
of each counts: what is printed are differences and ratios within one run.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from reactor.errors import OperationError
from reactor.native import ffi, lib
from tests.support.bdevs import Bench

BLOCKS = 1 << 15
FILE_BYTES = 64 << 20
FILE_REQUESTS = 1024  # of a round
FILL_LIMIT = 60.0  # seconds
METHOD_NOT_FOUND = -32601
Make = Callable[[Bench], Awaitable[str]]


async def null(bench: Bench, name: str = "N", block_size: int = 512) -> str:
    """Make the device that costs nothing."""
    await bench.rpc("bdev_null_create", name=name, block_size=block_size, num_blocks=BLOCKS)
    return name


def over(method: str, base: str, top: str, **params: Any) -> Make:
    """Make a device with ``method`` on a null device; ``base`` is the parameter that names it."""

    async def make(bench: Bench) -> str:
        await bench.rpc(method, **{base: await null(bench)}, **params)
        return top

    return make


def passthru(layers: int) -> Make:
    """Make so many passthru devices on each other."""

    async def make(bench: Bench) -> str:
        below = await null(bench)
        for layer in range(layers):
            await bench.rpc("bdev_passthru_create", name=f"P{layer}", base_bdev_name=below)
            below = f"P{layer}"
        return below

    return make


def limited(**limits: int) -> Make:
    """Put limits on a null device that are never reached."""

    async def make(bench: Bench) -> str:
        name = await null(bench)
        await bench.rpc("bdev_set_qos_limit", name=name, **limits)
        return name

    return make


async def grouped(bench: Bench) -> str:
    """Put a null device into a group whose limit is never reached."""
    name = await null(bench)
    await bench.rpc("bdev_qos_group_create", name="G", rw_ios_per_sec=1 << 40)
    await bench.rpc("bdev_qos_group_add_bdev", name="G", bdev_name=name)
    return name


async def watched(bench: Bench) -> str:
    """Watch a null device for requests that take too long."""
    name = await null(bench)
    await bench.rpc("bdev_set_slow_request_limit", name=name, limit_us=10**9)
    return name


async def with_ranges(bench: Bench) -> str:
    """Have a null device look out for locked ranges."""
    name = await null(bench)
    await bench.registry.use_ranges(bench.registry.find(name))
    return name


def raid(level: str, strip: int) -> Make:
    """Make a set of two null devices."""

    async def make(bench: Bench) -> str:
        names = [await null(bench, "A"), await null(bench, "B")]
        await bench.rpc(
            "bdev_raid_create", name="R", raid_level=level, strip_size_kb=strip, base_bdevs=names
        )
        return "R"

    return make


LATENCIES = dict.fromkeys(
    ["avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency"], 0
)
LAYERS: dict[str, Make] = {
    "null": null,
    "passthru": passthru(1),
    "passthru x 4": passthru(4),
    "qos: one limit": limited(rw_ios_per_sec=1 << 40),
    "qos: three limits": limited(
        rw_ios_per_sec=1 << 40, rw_mbytes_per_sec=1 << 40, r_mbytes_per_sec=1 << 40
    ),
    "qos group": grouped,
    "slow-request limit": watched,
    "locked ranges": with_ranges,
    "delay (none)": over("bdev_delay_create", "base_bdev_name", "D", name="D", **LATENCIES),
    "error (none)": over("bdev_error_create", "base_name", "EE_N"),
    "split": over("bdev_split_create", "base_bdev", "Np0", split_count=1),
    "concat": raid("concat", 0),
    "raid0": raid("raid0", 64),
    "raid1": raid("raid1", 0),
}


@dataclass
class Stack:
    """One of them, open."""

    name: str
    bench: Bench
    handle: Any
    best: float = float("inf")  # ns a request

    def measure(self, op: int, length: int, depth: int, batches: int) -> float:
        """Return ns a request; OSError if one fails."""
        setup = ffi.new("struct bdev_measure *", (op, depth, length, batches))
        error = ffi.new("int *")
        ticks = lib.bdev_measure(self.handle, setup, error)
        if error[0]:
            raise OSError(-error[0], f"{self.name}: a request failed")
        return float(ticks) / lib.reactor_tick_rate() * 1e9 / (batches * depth)


async def open_stack(name: str, make: Make) -> Stack | None:
    """Make a stack; None if this version has no such kind."""
    bench = Bench()
    await bench.__aenter__()
    try:
        io = await bench.open(await make(bench))
    except OperationError as error:
        await bench.__aexit__()
        if error.code in (METHOD_NOT_FOUND, -22):
            return None
        raise
    return Stack(name, bench, io.handle)


async def layers(op: int, depth: int, rounds: int) -> dict[str, float]:
    """Return ns a request of each stack, of 512 bytes."""
    made = [await open_stack(name, make) for name, make in LAYERS.items()]
    stacks = [stack for stack in made if stack is not None]
    try:
        for _ in range(rounds):
            for stack in stacks:
                stack.best = min(stack.best, stack.measure(op, 512, depth, 20_000 // depth))
        return {stack.name: stack.best for stack in stacks}
    finally:
        for stack in stacks:
            await stack.bench.__aexit__()


def aes_speed() -> float | None:
    """Return how many bytes a second OpenSSL itself encrypts, in pieces of 4 KiB."""
    command = ["openssl", "speed", "-mr", "-seconds", "1", "-bytes", "4096", "-evp", "aes-256-xts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = [line for line in done.stdout.splitlines() if line.startswith("+F:")]
    return float(found[-1].rpartition(":")[2]) if found else None


async def crypto_speed(rounds: int) -> float | None:
    """Return how many bytes a second are written through crypto to a null device."""

    async def make(bench: Bench) -> str:
        with tempfile.NamedTemporaryFile(prefix="vr-key-") as key:
            key.write(bytes(range(64)).hex().encode())
            key.flush()
            await bench.rpc(
                "accel_crypto_key_create", name="K", cipher="AES_XTS", key_file=key.name
            )
        name = await null(bench, block_size=4096)  # one unit of encryption is a block
        await bench.rpc("bdev_crypto_create", name="C", base_bdev_name=name, key_name="K")
        return "C"

    stack = await open_stack("crypto", make)
    if stack is None:
        return None
    try:
        best = min(stack.measure(lib.BDEV_WRITE, 4096, 1, 5000) for _ in range(rounds))
        return 4096 / best * 1e9
    finally:
        await stack.bench.__aexit__()


def written_file(folder: str, name: str) -> str:
    """Make a file without holes, and return its path."""
    path = Path(folder) / name
    with path.open("wb") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(bytes(range(256)) * 4096)
        file.flush()
        os.fsync(file.fileno())
    return str(path)


def raw_file(folder: str) -> Make:
    """Make a disk in a file."""

    async def make(bench: Bench) -> str:
        path = written_file(folder, "raw")
        await bench.rpc("bdev_uring_create", name="F", filename=path, block_size=512)
        return "F"

    return make


def filled_cow(folder: str) -> Make:
    """Make a copy-on-write disk that has all of its base in its overlay."""

    async def make(bench: Bench) -> str:
        path = written_file(folder, "base")
        await bench.rpc("bdev_uring_create", name="B", filename=path, block_size=512, readonly=True)
        overlay = str(Path(folder) / "overlay")
        await bench.rpc("bdev_cow_create", name="C", base="B", overlay=overlay, fill=True)
        async with asyncio.timeout(FILL_LIMIT):
            while True:
                (bdev,) = await bench.rpc("bdev_get_bdevs", name="C")
                cow = bdev["driver_specific"]["cow"]
                if cow["num_allocated_clusters"] == cow["num_clusters"]:
                    return "C"
                await asyncio.sleep(0.01)

    return make


async def cow_ratios(folder: str, rounds: int) -> dict[str, float]:
    """Return how many requests of 4 KiB a filled cow disk does for one of the raw file.

    Rounds are compared in pairs, one after the other, and the median counts: a disk's own speed
    changes more than that of what is above it.
    """
    with tempfile.TemporaryDirectory(prefix="vr-cow-", dir=folder) as place:
        raw = await open_stack("file", raw_file(place))
        cow = await open_stack("cow", filled_cow(place))
        assert raw is not None
        assert cow is not None
        try:
            return {
                f"{name}, {depth} together": statistics.median(
                    raw.measure(op, 4096, depth, FILE_REQUESTS // depth)
                    / cow.measure(op, 4096, depth, FILE_REQUESTS // depth)
                    for _ in range(rounds)
                )
                for name, op in (("read", lib.BDEV_READ), ("write", lib.BDEV_WRITE))
                for depth in (1, 32)
            }
        finally:
            for stack in (raw, cow):
                await stack.bench.__aexit__()


@click.command("bdev")
@click.option("--depth", default=32, show_default=True, help="Requests submitted together.")
@click.option("--rounds", default=25, show_default=True, help="Of each stack; the best counts.")
@click.option(
    "--folder",
    default=tempfile.gettempdir(),
    show_default=True,
    help="Where the files of cow are, on the disk that it is measured on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(*, depth: int, rounds: int, folder: str, as_json: bool) -> None:
    """Measure what each layer costs a request, over a null device; and cow, in files."""
    results = {
        "read": asyncio.run(layers(lib.BDEV_READ, depth, rounds)),
        "write": asyncio.run(layers(lib.BDEV_WRITE, depth, rounds)),
    }
    aes, crypto = aes_speed(), asyncio.run(crypto_speed(rounds))
    cow = asyncio.run(cow_ratios(folder, rounds))
    if as_json:
        click.echo(json.dumps({**results, "openssl": aes, "crypto": crypto, "cow": cow}))
        return
    click.echo(f"ns a request of 512 bytes, {depth} together; the difference to null\n")
    click.echo(f"{'':20}  {'read':>6}  {'':>6}  {'write':>6}")
    for name in results["read"]:
        read, write = results["read"][name], results["write"][name]
        more, most = read - results["read"]["null"], write - results["write"]["null"]
        click.echo(f"{name:20}  {read:6.1f}  {more:+6.1f}  {write:6.1f}  {most:+6.1f}")
    if aes and crypto:
        click.echo(
            f"\ncrypto, writing 4 KiB: {crypto / 1e6:.0f} MB/s, "
            f"{crypto / aes:.0%} of what OpenSSL's own benchmark does"
        )
    click.echo("\na filled cow disk, 4 KiB, to the raw file")
    for name, ratio in cow.items():
        click.echo(f"{name:20}  {ratio:6.1%}")
