"""Events against bare pyzmq: round trips and one-way rates between two processes over ipc://.

The bare peer is what one would write without any of our code: a ROUTER that blocks in recv, a
DEALER that blocks for the answer, msgpack both ways and nothing checked. Where threads run decides
more than what they do, so it is measured both left to the scheduler and pinned as a reactor is: its
main thread on one CPU, all else free. The rounds of all peers take turns, so that whatever else the
machine does meets all of them; what to look at is the ratio.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import msgpack  # type: ignore[import-untyped]
import zmq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from reactor.client import Client
from reactor.cluster import Cluster

BASE = "bare pyzmq"
WARM_UP = 200  # round trips that are not counted

BARE = """
import os, sys, msgpack, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind("ipc://" + sys.argv[1])
if len(sys.argv) > 2:
    os.sched_setaffinity(0, {int(sys.argv[2])})
print("ready", flush=True)
count = 0
while True:
    identity, payload = socket.recv_multipart()
    event = msgpack.unpackb(payload)
    if event["op"] == "event_ping":
        result = event["args"]["payload"]
    else:
        result, count = count, count + 1
    if "id" in event:
        socket.send_multipart([identity, msgpack.packb({"id": event["id"], "result": result})])
"""

Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]
Flood = Callable[[int], int]


@dataclasses.dataclass
class Peer:
    """Somebody to measure.

    ``ask`` makes one round trip; ``flood(n)`` sends ``n`` events one way and a call after them, and
    returns how many the receiver had counted before that call.
    """

    ask: Ask
    flood: Flood


@dataclasses.dataclass
class Figures:
    """One value for each round."""

    p50_us: list[float] = dataclasses.field(default_factory=list)
    p99_us: list[float] = dataclasses.field(default_factory=list)
    rate: list[float] = dataclasses.field(default_factory=list)  # events a second


def reactor_cpu() -> int:
    """Return the CPU that the answering side is pinned on; nothing else is pinned."""
    return max(os.sched_getaffinity(0))


@contextlib.asynccontextmanager
async def bare_peer(run_dir: Path, *, pinned: bool) -> AsyncIterator[Peer]:
    """Bare pyzmq and msgpack on both sides."""
    path = str(run_dir / "bare")
    command = [sys.executable, "-c", BARE, path]
    if pinned:
        command.append(str(reactor_cpu()))
    context = zmq.Context()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:  # noqa: ASYNC220
        assert server.stdout is not None
        server.stdout.readline()
        socket = context.socket(zmq.DEALER)
        socket.connect(f"ipc://{path}")

        def exchange(op: str, args: dict[str, Any]) -> Any:
            socket.send(msgpack.packb({"id": 1, "op": op, "args": args}))
            return msgpack.unpackb(socket.recv())["result"]

        async def ask(op: str, args: dict[str, Any]) -> Any:
            return exchange(op, args)

        def flood(count: int) -> int:
            for _ in range(count):
                socket.send(msgpack.packb({"op": "event_count"}))
            return int(exchange("event_count", {}))

        try:
            yield Peer(ask, flood)
        finally:
            server.kill()
            context.destroy(linger=0)


@contextlib.asynccontextmanager
async def reactor_peer(run_dir: Path, mode: str, *, control: bool = False) -> AsyncIterator[Peer]:
    """Start a reactor process, asked by our blocking client, or as the control process asks."""
    cluster = Cluster(run_dir, [reactor_cpu()], mode)
    await cluster.start()
    reactor = cluster.reactors[0]
    asking = Client(run_dir)

    async def ask(op: str, args: dict[str, Any]) -> Any:
        if control:
            return await cluster.call(reactor, op, args)
        return asking.request(reactor.name, op, args)

    def flood(count: int) -> int:
        with Client(run_dir) as client:
            for _ in range(count):
                client.send(reactor.name, "event_count")
            return int(client.call(reactor.name, "event_count"))

    try:
        yield Peer(ask, flood)
    finally:
        asking.close()
        await cluster.stop()


PEERS: dict[str, Callable[[Path], contextlib.AbstractAsyncContextManager[Peer]]] = {
    BASE: functools.partial(bare_peer, pinned=False),
    "bare pyzmq, pinned": functools.partial(bare_peer, pinned=True),
    "sleeping reactor": functools.partial(reactor_peer, mode="never"),
    "polling reactor": functools.partial(reactor_peer, mode="always"),
    "sleeping, from control": functools.partial(reactor_peer, mode="never", control=True),
    "polling, from control": functools.partial(reactor_peer, mode="always", control=True),
}


async def measure_round(peer: Peer, figures: Figures, trips: int, events: int) -> None:
    """Measure latency, then rate; raise RuntimeError on a wrong answer or a lost event."""
    times = []
    for number in range(WARM_UP + trips):
        started = time.perf_counter()
        answer = await peer.ask("event_ping", {"payload": number})
        times.append(time.perf_counter() - started)
        if answer != number:
            raise RuntimeError(f"{answer!r} is no answer to {number}")
    cuts = statistics.quantiles(times[WARM_UP:], n=100)
    figures.p50_us.append(cuts[49] * 1e6)
    figures.p99_us.append(cuts[98] * 1e6)
    started = time.perf_counter()
    counted = peer.flood(events)
    figures.rate.append(events / (time.perf_counter() - started))
    if counted != events:
        raise RuntimeError(f"{counted} of {events} events arrived")


async def measure(rounds: int, trips: int, events: int) -> dict[str, Figures]:
    """Return the figures of all peers, of which one runs at a time."""
    figures = {name: Figures() for name in PEERS}
    turns = [name for _ in range(rounds) for name in PEERS]
    for name in track(turns, "measuring", console=Console(stderr=True), transient=True):
        with tempfile.TemporaryDirectory(prefix="vr-") as path:
            async with PEERS[name](Path(path)) as peer:
                await measure_round(peer, figures[name], trips, events)
    return figures


def report(figures: dict[str, Figures]) -> dict[str, Any]:
    """Return medians, spreads, and what they are relative to bare pyzmq, round by round."""
    base = figures[BASE]
    result: dict[str, Any] = {}
    for name, found in figures.items():
        result[name] = {
            field.name: machine.summary(getattr(found, field.name))
            | {
                "ratio": statistics.median(
                    ours / bare
                    for ours, bare in zip(
                        getattr(found, field.name), getattr(base, field.name), strict=True
                    )
                )
            }
            for field in dataclasses.fields(Figures)
        }
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print a table: median (lowest-highest) and the ratio to bare pyzmq of each figure."""
    table = Table(title="Events over ipc://: median of rounds (range), times bare")
    table.add_column("peer")
    for title in ("round trip p50, µs", "p99, µs", "one way, events/s"):
        table.add_column(title, justify="right")
    for name, found in result.items():
        cells = (
            f"{v['median']:,.0f} ({v['min']:,.0f}-{v['max']:,.0f}) x{v['ratio']:.2f}"
            for v in found.values()
        )
        table.add_row(name, *cells)
    console.print(table)


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--trips", default=3000, show_default=True, type=click.IntRange(100))
@click.option("--events", default=50_000, show_default=True, type=click.IntRange(1))
@click.option("--json", "output", type=click.Path(dir_okay=False, writable=True, path_type=Path))
def command(rounds: int, trips: int, events: int, output: Path | None) -> None:
    """Round trips and one-way rates of events, beside bare pyzmq on the same transport."""
    facts = machine.facts()
    result = report(asyncio.run(measure(rounds, trips, events)))
    show(result, Console())
    if output is not None:
        output.write_text(json.dumps({"machine": facts, "events": result}, indent=1) + "\n")
