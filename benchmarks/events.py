"""Events against bare pyzmq: round trips and one-way rates between two processes over ipc://.

The bare peer is what one would write without any of our code: a ROUTER that blocks in recv, a
DEALER that blocks for the answer, msgpack both ways and nothing checked. Where threads run decides
more than what they do, so it is measured left to the scheduler, pinned as a reactor is (its main
thread on one CPU, all else free), and pinned with a ROUTER that asks again and again, as a reactor
that polls does. The rounds of all peers take turns, so that whatever else the machine does meets
all of them; what to look at is the ratio.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import zmq

from benchmarks.series import Quantity
from benchmarks.suite import Benchmark, Session
from reactor.client import Client
from reactor.cluster import Cluster

BASE = "bare pyzmq"
WARM_UP = 200  # round trips that are not counted
FAN_OUT = (1, 2, 4, 8)  # reactors that are asked at once

ROUND_TRIP = Quantity("round trip p50", "µs")
ROUND_TRIP_P99 = Quantity("round trip p99", "µs")
ONE_WAY = Quantity("one way", "events/s", higher_is_better=True)
TO_ALL = Quantity("all answered", "µs")

BARE = """
import os, sys, msgpack, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind("ipc://" + sys.argv[1])
if len(sys.argv) > 2:
    os.sched_setaffinity(0, {int(sys.argv[2])})
flags = zmq.NOBLOCK if "poll" in sys.argv else 0
print("ready", flush=True)
count = 0
while True:
    try:
        identity, payload = socket.recv_multipart(flags)
    except zmq.Again:
        continue
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


def reactor_cpu() -> int:
    """Return the CPU that the answering side is pinned on; nothing else is pinned."""
    return max(os.sched_getaffinity(0))


@contextlib.asynccontextmanager
async def bare_peer(
    run_dir: Path, *, pinned: bool = False, polls: bool = False
) -> AsyncIterator[Peer]:
    """Bare pyzmq and msgpack on both sides; one that ``polls`` never sleeps."""
    path = str(run_dir / "bare")
    command = [sys.executable, "-c", BARE, path]
    if pinned:
        command.append(str(reactor_cpu()))
    if polls:
        command.append("poll")
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
    BASE: bare_peer,
    "bare pyzmq, pinned": functools.partial(bare_peer, pinned=True),
    "bare pyzmq, polling": functools.partial(bare_peer, pinned=True, polls=True),
    "sleeping reactor": functools.partial(reactor_peer, mode="never"),
    "polling reactor": functools.partial(reactor_peer, mode="always"),
    "sleeping, from control": functools.partial(reactor_peer, mode="never", control=True),
    "polling, from control": functools.partial(reactor_peer, mode="always", control=True),
}


async def measure_round(session: Session, name: str, peer: Peer) -> None:
    """Measure latency, then rate; raise RuntimeError on a wrong answer or a lost event."""
    trips, events = session.options.choose((200, 2000), (3000, 50_000), (10_000, 200_000))
    times = []
    for number in range(WARM_UP + trips):
        started = time.perf_counter()
        answer = await peer.ask("event_ping", {"payload": number})
        times.append(time.perf_counter() - started)
        if answer != number:
            raise RuntimeError(f"{answer!r} is no answer to {number}")
    cuts = statistics.quantiles(times[WARM_UP:], n=100)
    session.add({}, name, ROUND_TRIP, cuts[49] * 1e6)
    session.add({}, name, ROUND_TRIP_P99, cuts[98] * 1e6)
    started = time.perf_counter()
    counted = peer.flood(events)
    session.add({}, name, ONE_WAY, events / (time.perf_counter() - started))
    if counted != events:
        raise RuntimeError(f"{counted} of {events} events arrived")


async def measure(session: Session) -> None:
    """Measure all peers, of which one runs at a time, and then fan-out."""
    turns = [name for _ in range(session.options.rounds) for name in PEERS]
    for name in session.track(turns, "events"):
        with tempfile.TemporaryDirectory(prefix="vr-") as path:
            async with PEERS[name](Path(path)) as peer:
                await measure_round(session, name, peer)
    for receivers in session.options.choose((2,), FAN_OUT, FAN_OUT):
        await fan_out(session, receivers)


async def fan_out(session: Session, receivers: int) -> None:
    """Ask several reactors at once, and wait for all answers; they share CPUs if they must."""
    cpus = sorted(os.sched_getaffinity(0))
    if receivers > len(cpus):
        return
    with tempfile.TemporaryDirectory(prefix="vr-") as path:
        cluster = Cluster(Path(path), cpus[:receivers], "never")
        await cluster.start()
        try:
            for _ in range(session.options.rounds):
                times = []
                for number in range(session.options.choose(50, 500, 2000)):
                    started = time.perf_counter()
                    asked = [
                        cluster.call(reactor, "event_ping", {"payload": number})
                        for reactor in cluster.reactors
                    ]
                    await asyncio.gather(*asked)
                    times.append(time.perf_counter() - started)
                middle = statistics.median(times) * 1e6
                session.add({"receivers": receivers}, "control to reactors", TO_ALL, middle)
        finally:
            await cluster.stop()


def run(session: Session) -> None:
    """Round trips, one-way rates and fan-out of events, beside bare pyzmq on the same transport."""
    asyncio.run(measure(session))


benchmark = Benchmark("events", "Events over ipc://", run, base=BASE)
