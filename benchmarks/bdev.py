"""``python -m benchmarks bdev``: what each layer of the bdev part costs a request.

Each stack is made by the operations that users have, on a poll loop in this process, and requests
are made in C: so there is nothing but the layers. Rounds of all stacks take turns, and the best one
of each counts: what is printed are differences and ratios within one run.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import _bare_build
from benchmarks.series import Case, Quantity
from benchmarks.suite import OURS, Benchmark, Session
from reactor.errors import OperationError
from reactor.native import ffi, lib
from tests.support.bdevs import Bench

BLOCKS = 1 << 15
METHOD_NOT_FOUND = -32601
DEPTH = 32  # requests submitted together
TURNS = 5  # of which the best counts: whatever else the machine does only adds

UNITS = (4096, 512)  # bytes that are encrypted with one tweak
REQUEST = 4096  # bytes of a request through crypto,
REQUESTS = 5000  # of so many

COST = Quantity("time", "ns a request")
MORE = Quantity("more than null", "ns a request")
SPEED = Quantity("speed", "MB/s", higher_is_better=True)
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


async def layers(session: Session) -> None:
    """Measure ns a request of each stack, of 512 bytes; the best of some turns is a sample."""
    made = [await open_stack(name, make) for name, make in LAYERS.items()]
    stacks = [stack for stack in made if stack is not None]
    batches = session.options.choose(10, 20_000 // DEPTH, 100_000 // DEPTH)
    try:
        for _ in session.track(range(session.options.rounds), "bdev"):
            for op, number in (("read", lib.BDEV_READ), ("write", lib.BDEV_WRITE)):
                best: dict[str, float] = {}
                for stack in stacks * TURNS:
                    took = stack.measure(number, 512, DEPTH, batches)
                    best[stack.name] = min(took, best.get(stack.name, took))
                for name, took in best.items():
                    session.add({"layer": name, "op": op}, OURS, COST, took)
                    more = took - best["null"]
                    session.add({"layer": name, "op": op}, OURS, MORE, more)
    finally:
        for stack in stacks:
            await stack.bench.__aexit__()


def openssl_speed(unit: int) -> float | None:
    """Return bytes a second of OpenSSL's own benchmark, all pieces of ``unit`` with one tweak."""
    command = ["openssl", "speed", "-mr", "-seconds", "1", "-bytes", str(unit)]
    command += ["-evp", "aes-256-xts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = [line for line in done.stdout.splitlines() if line.startswith("+F:")]
    return float(found[-1].rpartition(":")[2]) if found else None


def tweaked_speed(unit: int) -> float:
    """Return bytes a second of OpenSSL where each unit has its tweak, from one buffer to another.

    That is the least that a disk has to do: see ``cipher.h``.
    """
    cipher = _bare_build.load("cipher").lib
    return max(float(cipher.cipher_speed(unit, REQUEST, REQUESTS)) for _ in range(TURNS))


async def crypto_speed(unit: int) -> float | None:
    """Return bytes a second written through crypto to a null device with blocks of ``unit``."""

    async def make(bench: Bench) -> str:
        with tempfile.NamedTemporaryFile(prefix="vr-key-") as key:
            key.write(bytes(range(64)).hex().encode())
            key.flush()
            await bench.rpc(
                "accel_crypto_key_create", name="K", cipher="AES_XTS", key_file=key.name
            )
        name = await null(bench, block_size=unit)  # one unit of encryption is a block
        await bench.rpc("bdev_crypto_create", name="C", base_bdev_name=name, key_name="K")
        return "C"

    stack = await open_stack("crypto", make)
    if stack is None:
        return None
    try:
        best = min(stack.measure(lib.BDEV_WRITE, REQUEST, 1, REQUESTS) for _ in range(TURNS))
        return REQUEST / best * 1e9
    finally:
        await stack.bench.__aexit__()


async def crypto(session: Session) -> None:
    """Measure requests of 4 KiB through crypto, beside OpenSSL with and without new tweaks."""
    for _ in range(session.options.choose(1, 3, 5)):
        for unit in UNITS:
            speeds = {
                OURS: await crypto_speed(unit),
                "a tweak a unit": tweaked_speed(unit),
                "openssl speed": openssl_speed(unit),
            }
            case: Case = {"layer": "crypto", "op": "write", "unit": unit}
            for name, speed in speeds.items():
                if speed:
                    session.add(case, name, SPEED, speed / 1e6)


async def measure(session: Session) -> None:
    """Measure the layers, and encryption beside what OpenSSL itself does."""
    await layers(session)
    await crypto(session)


def run(session: Session) -> None:
    """Measure what each layer costs a request, over a null device."""
    asyncio.run(measure(session))


benchmark = Benchmark("bdev", "Layers of block devices, 512 B", run, base="*", needs=("gcc",))
