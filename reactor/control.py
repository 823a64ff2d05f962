"""What clients ask of the process as a whole: methods, version, subsystems, reactors, threads.

A *subsystem* is a part of the program with a configuration of its own. The configuration is the
list of operations that would build it again, so that saving is asking each subsystem and loading is
running the operations (reactor/config.py); SPDK's ``save_config`` and ``load_config`` do both from
outside, and see no difference.
"""

import asyncio
import errno
import importlib.metadata
import os
import re
import signal
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from reactor import cpumask
from reactor.errors import INVALID_PARAMS, OperationError
from reactor.operations import Operations, operation

PROGRAM = "vhost-reactor"
_NUMA_UNKNOWN = -1
_SIGNALS = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1")  # as SPDK takes them
_VERSION = re.compile(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(.*)", re.S)


class Subsystem(Protocol):
    """A part with a configuration."""

    @property
    def name(self) -> str:
        """The name that saved configurations know it by, e.g. "bdev"."""

    @property
    def depends_on(self) -> Sequence[str]:
        """The subsystems whose configuration must be loaded before this one's."""

    def config(self) -> list[dict[str, Any]]:
        """Return the calls that build the present state: ``{"method": ..., "params": {...}}``."""


class Stats(Protocol):
    """A reactor's statistics."""

    @property
    def counters(self) -> Mapping[str, int]:
        """The fields of ``struct reactor_counters``."""


class Reactor(Protocol):
    """What is shown of one reactor."""

    @property
    def cpu(self) -> int:
        """The CPU it is pinned on."""

    @property
    def name(self) -> str:
        """Its name among processes, ``reactor-<cpu>``."""

    @property
    def pid(self) -> int | None:
        """Its process, None while there is none."""

    @property
    def state(self) -> str:
        """What it is doing: "running", or why not."""

    @property
    def restarts(self) -> int:
        """How often it has been replaced."""

    @property
    def stats(self) -> Stats:
        """Its statistics; they outlive its process."""


class Cluster(Protocol):
    """Where the reactors are."""

    @property
    def reactors(self) -> Sequence[Reactor]:
        """All reactors, by CPU."""


class Framework:
    """The operations of the process as a whole, under SPDK's names and those they had in 2018."""

    def __init__(self, operations: Operations, cluster: Cluster) -> None:
        self._operations = operations
        self._cluster = cluster
        self._subsystems: dict[str, Subsystem] = {}
        self._initialised = asyncio.Event()

    def add_subsystem(self, subsystem: Subsystem) -> None:
        """Add a subsystem, after those it depends on; ValueError if they are not there."""
        if subsystem.name in self._subsystems:
            raise ValueError(f"subsystem {subsystem.name} is added twice")
        if missing := set(subsystem.depends_on) - self._subsystems.keys():
            raise ValueError(
                f"subsystem {subsystem.name} depends on {min(missing)}: add that first"
            )
        self._subsystems[subsystem.name] = subsystem

    def initialised(self) -> None:
        """Let those go on who wait for the start-up configuration to be loaded."""
        self._initialised.set()

    @operation(aliases=["get_rpc_methods"])
    def rpc_get_methods(self, current: bool = False, include_aliases: bool = False) -> list[str]:
        """Return the names of all methods, or of those that the present state allows."""
        names = self._operations.names(aliases=include_aliases)
        if not (current and self._initialised.is_set()):
            return names
        start = self._operations.find("framework_start_init")
        return [name for name in names if self._operations.find(name) is not start]

    @operation(aliases=["get_spdk_version"])
    def spdk_get_version(self) -> dict[str, Any]:
        """Return this program's version, in SPDK's form."""
        version = program_version()
        found = _VERSION.fullmatch(version)
        major, minor, patch, suffix = found.groups() if found else (0, 0, 0, version)
        return {
            "version": f"{PROGRAM} v{version}",
            "fields": {
                "major": int(major),
                "minor": int(minor or 0),
                "patch": int(patch or 0),
                "suffix": suffix,
            },
        }

    @operation(aliases=["kill_instance"])
    def spdk_kill_instance(self, sig_name: str) -> bool:
        """Send this process a signal: SIGINT and SIGTERM drain and end it."""
        name = sig_name if sig_name.startswith("SIG") else f"SIG{sig_name}"
        if name not in _SIGNALS:
            known = ", ".join(_SIGNALS)
            raise OperationError(
                -errno.EINVAL, f"spdk_kill_instance: sig_name: {sig_name!r:.40} is none of {known}"
            )
        os.kill(os.getpid(), signal.Signals[name])
        return True

    @operation(aliases=["wait_subsystem_init"])
    async def framework_wait_init(self) -> bool:
        """Return once the start-up configuration is loaded."""
        await self._initialised.wait()
        return True

    @operation(aliases=["start_subsystem_init"])
    def framework_start_init(self) -> bool:
        """Return at once: subsystems are initialised before clients are served."""
        return True

    @operation(aliases=["get_subsystems"])
    def framework_get_subsystems(self) -> list[dict[str, Any]]:
        """Return the subsystems, each after those it depends on."""
        return [
            {"subsystem": subsystem.name, "depends_on": list(subsystem.depends_on)}
            for subsystem in self._subsystems.values()
        ]

    @operation(aliases=["get_subsystem_config"])
    def framework_get_config(self, name: str, with_batches: bool = False) -> list[dict[str, Any]]:
        """Return the calls that build the present state of one subsystem again.

        No two of them are put in a batch, so ``with_batches`` changes nothing.
        """
        del with_batches
        subsystem = self._subsystems.get(name)
        if subsystem is None:
            known = ", ".join(self._subsystems) or "none"
            raise OperationError(
                INVALID_PARAMS, f"Subsystem '{name:.100}' not found; there are: {known}"
            )
        return subsystem.config()

    @operation
    def framework_get_reactors(self) -> dict[str, Any]:
        """Return what each reactor has done; ``busy``, ``idle`` and ``elapsed`` are in ticks.

        ``idle`` counts time asleep, too; ``in_interrupt`` says that no poller is hot. ``sys``,
        ``usr`` and ``irq`` are times of the reactor's CPU in clock ticks since boot.
        """
        times = cpu_times()
        reactors = []
        for number, reactor in enumerate(self._cluster.reactors, 1):
            counters = reactor.stats.counters
            idle = counters["idle_ticks"] + counters["sleep_ticks"]
            thread = {
                "name": reactor.name,
                "id": number,
                "cpumask": _bare_mask(reactor.cpu),
                "elapsed": counters["busy_ticks"] + idle,
            }
            reactors.append(
                {
                    "lcore": reactor.cpu,
                    "pid": reactor.pid,
                    "tid": reactor.pid,  # a reactor is its process's main thread
                    "state": reactor.state,
                    "restarts": reactor.restarts,
                    "busy": counters["busy_ticks"],
                    "idle": idle,
                    "in_interrupt": counters["hot"] == 0,
                    **times.get(reactor.cpu, {}),
                    "numa_id": numa_node(reactor.cpu),
                    "lw_threads": [thread],
                }
            )
        return {"tick_rate": self._tick_rate(), "pid": os.getpid(), "reactors": reactors}

    @operation
    def thread_get_stats(self) -> dict[str, Any]:
        """Return what each reactor's thread has done, times in ticks.

        Active pollers are those in the hot list. A paused one sleeps until its descriptor is ready,
        and costs nothing meanwhile.
        """
        threads = []
        for number, reactor in enumerate(self._cluster.reactors, 1):
            counters = reactor.stats.counters
            threads.append(
                {
                    "name": reactor.name,
                    "id": number,
                    "cpumask": _bare_mask(reactor.cpu),
                    "busy": counters["busy_ticks"],
                    "idle": counters["idle_ticks"] + counters["sleep_ticks"],
                    "active_pollers_count": counters["hot"],
                    "timed_pollers_count": counters["timers"],
                    "paused_pollers_count": counters["pollers"] - counters["hot"],
                }
            )
        return {"tick_rate": self._tick_rate(), "threads": threads}

    def _tick_rate(self) -> int:
        return next((each.stats.counters["tick_rate"] for each in self._cluster.reactors), 0)


@cache
def program_version() -> str:
    """Return the version of the installed package, or of the source tree that runs uninstalled."""
    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"])


def cpu_times(stat: str = "/proc/stat") -> dict[int, dict[str, int]]:
    """Return user, system and interrupt time of each CPU in clock ticks since boot (proc(5))."""
    times = {}
    for line in Path(stat).read_text().splitlines():
        if found := re.match(r"cpu(\d+) (\d+) \d+ (\d+) \d+ \d+ (\d+)", line):
            cpu, usr, system, irq = map(int, found.groups())
            times[cpu] = {"irq": irq, "sys": system, "usr": usr}
    return times


@cache
def numa_node(cpu: int) -> int:
    """Return the NUMA node of a CPU, -1 if the kernel does not say."""
    nodes = Path(f"/sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*")
    return next((int(node.name.removeprefix("node")) for node in nodes), _NUMA_UNKNOWN)


def _bare_mask(cpu: int) -> str:
    return cpumask.format_mask([cpu]).removeprefix("0x")
