"""Reactors that live but do not turn any more: found, and killed, so that they are replaced.

A reactor counts its turns in shared memory, where looking costs it nothing. One whose count stands
still may just be asleep, so it is sent a ping, which wakes it. One that neither turns nor answers
for ``patience`` seconds is stopped, caught in a loop, or waits for something that does not come:
its queues are served by nobody. Killing it is safe at any instruction (docs/recovery.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from reactor.child import Process
from reactor.errors import OperationError

PATIENCE = 5.0  # seconds
LOOKS = 5  # ... in which a reactor is looked at so often
AT_WORK = (
    12  # times as long for one that does what we have asked for: registering memory takes long
)
SHARE = 0.1  # of a CPU; who wants one and gets less is not hung but starved

log = logging.getLogger(__name__)


class Stats(Protocol):
    """A reactor's statistics."""

    @property
    def counters(self) -> Mapping[str, int]:
        """The fields of ``struct reactor_counters``."""
        ...


class Reactor(Protocol):
    """What is looked at."""

    @property
    def name(self) -> str:
        """As ``reactor-0``."""
        ...

    @property
    def child(self) -> Process | None:
        """Its process, while there is one."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        ...

    @property
    def stats(self) -> Stats:
        """What it counts."""
        ...


class Cluster(Protocol):
    """Where reactors are."""

    @property
    def reactors(self) -> Sequence[Any]:
        """Those that are watched."""
        ...

    def waiting(self, reactor: Any) -> int:
        """Return how many calls a reactor has not answered."""
        ...

    async def call(
        self, reactor: Any, op: str, args: dict[str, Any] | None = None, *, timeout: float | None
    ) -> Any:
        """Run an operation in a reactor."""
        ...


@dataclass(eq=False)
class _Seen:
    """What was seen of a process, since it last did anything."""

    process: Process
    turns: int
    ping: asyncio.Task[Any] | None = None
    looks: int = 0  # in vain, since the ping
    cpu_time: float = 0.0  # seconds that it had used then
    told: bool = False  # that it is let live


class Watchdog:
    """Kills the reactors of ``cluster`` that are hung for ``patience`` seconds; 0: none."""

    def __init__(self, cluster: Cluster, patience: float = PATIENCE) -> None:
        self._cluster = cluster
        self._patience = patience
        self._seen: dict[str, _Seen] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch from now on."""
        if self._patience > 0:
            self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for seen in self._seen.values():
            _forget(seen)

    async def _watch(self) -> None:
        loop, period = asyncio.get_running_loop(), self._patience / LOOKS
        while True:
            before = loop.time()
            await asyncio.sleep(period)
            # If we did not run either, nothing can be said of others: the machine stood still.
            on_time = loop.time() - before < 2 * period
            for reactor in self._cluster.reactors:
                self._look(reactor, on_time=on_time)

    def _look(self, reactor: Reactor, *, on_time: bool) -> None:
        process, seen = reactor.child, self._seen.get(reactor.name)
        if process is None or not reactor.alive:
            return
        turns = reactor.stats.counters["polls"]
        if seen is None or seen.process is not process or seen.turns != turns or not on_time:
            if seen is not None:
                _forget(seen)
            self._seen[reactor.name] = _Seen(process, turns)
        elif seen.ping is None:
            seen.ping = asyncio.create_task(self._ping(reactor))
            seen.cpu_time = _cpu_time(process)
        else:
            seen.looks += 1
            others = self._cluster.waiting(reactor) > 1  # than the ping
            if seen.looks >= LOOKS * (AT_WORK if others else 1):
                self._judge(reactor, seen)

    async def _ping(self, reactor: Reactor) -> None:
        with contextlib.suppress(OSError, OperationError):  # it has died
            await self._cluster.call(reactor, "event_ping", timeout=None)

    def _judge(self, reactor: Reactor, seen: _Seen) -> None:
        """Kill a process that has not turned, unless it would not help or is not its fault."""
        seconds = seen.looks * self._patience / LOOKS
        reason = _excuse(seen.process, seen.cpu_time, seconds)
        who = f"{reactor.name} (pid {seen.process.pid}) has not turned for {seconds:.1f} s"
        if reason is None:
            log.error("%s, and is killed", who)
            seen.process.send_signal(signal.SIGKILL)
            _forget(seen)
            del self._seen[reactor.name]
        elif not seen.told:
            log.warning("%s, and is left alone: %s", who, reason)
            seen.told = True


def _forget(seen: _Seen) -> None:
    if seen.ping is not None:
        seen.ping.cancel()


def _cpu_time(process: Process) -> float:
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _excuse(process: Process, cpu_time: float, seconds: float) -> str | None:
    """Return why a process that does not turn is to be let live; None: it is hung."""
    try:
        status = psutil.Process(process.pid).status()
    except psutil.Error:
        return "it is about to end"
    if status == psutil.STATUS_TRACING_STOP:
        return "a debugger has it"
    if status == psutil.STATUS_DISK_SLEEP:
        return "it is in the kernel, and could not be killed before it returns from there"
    if status == psutil.STATUS_RUNNING and _cpu_time(process) - cpu_time < SHARE * seconds:
        return "it gets no CPU"
    return None
