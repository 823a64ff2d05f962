"""What a benchmark is: a module of this folder with a ``benchmark``; the suite finds it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import benchmarks
from benchmarks.series import Case, Quantity, Result, Series

OURS = "vhost-reactor"

T = TypeVar("T")


class UnavailableError(Exception):
    """A benchmark cannot run here, for the reason given: it is left out, and that is said."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says about all benchmarks. Times are in seconds."""

    quick: bool = False
    """Only see that everything runs: one short round of few cases."""
    full: bool = False
    """All cases, instead of a selection that takes minutes."""
    rounds: int = 5
    seconds: float = 0.5
    """Of each measurement, after the warm-up."""
    only: tuple[tuple[str, str], ...] = ()
    """Labels that a case must have: (key, value); of several values for a key, one."""
    peers: tuple[tuple[str, str], ...] = ()
    """Other servers: (name, command); see servers.Peer."""
    driver_cpu: int = 0
    server_cpu: int = 1
    folder: Path = field(default_factory=Path.cwd)
    """Where disks that are files lie."""
    huge: bool = False
    """Whether guests have their memory in huge pages."""

    def cpus(self) -> set[int]:
        """Return the CPUs of this machine that the suite may use."""
        return os.sched_getaffinity(0)

    def driver_cpus(self, taken: Sequence[int]) -> list[int]:
        """Return CPUs for front-ends: those that are not taken, or else all."""
        return sorted(self.cpus() - set(taken)) or sorted(self.cpus())

    def wanted(self, case: Case) -> bool:
        """Whether the case is among those asked for."""
        for key in {key for key, _ in self.only}:
            values = {value for name, value in self.only if name == key}
            if key in case and str(case[key]) not in values:
                return False
        return True

    def choose(self, quick: T, usual: T, full: T) -> T:
        """Return one of three selections."""
        return quick if self.quick else full if self.full else usual


@dataclass(slots=True)
class Session:
    """A benchmark that is running: what was asked for, and where samples go."""

    options: Options
    result: Result
    console: Console

    def add(
        self, case: Case, contender: str, quantity: Quantity, sample: float, note: str = ""
    ) -> Series:
        """Record a sample, with a remark that stands beside its series."""
        series = self.result.add(case, contender, quantity, sample)
        if note and note not in series.notes:
            series.notes.append(note)
        return series

    def track(self, items: Iterable[T], name: str) -> Iterator[T]:
        """Show progress over items. Nothing is drawn between them: that would take CPU time."""
        todo = list(items)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
            transient=True,
        ) as progress:
            task = progress.add_task(name, total=len(todo))
            for item in todo:
                progress.refresh()
                yield item
                progress.advance(task)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One subject. ``run`` adds samples to the session; ``base`` is what ours is divided by."""

    name: str
    title: str
    run: Callable[[Session], None]
    base: str = ""
    needs: tuple[str, ...] = ()
    """Programs without which it cannot run."""
    memory: int = 256 << 20
    """Bytes that it takes at most."""

    def check(self) -> None:
        """Raise UnavailableError, saying what to do, if something that it needs is not there."""
        missing = [name for name in self.needs if shutil.which(name) is None]
        if missing:
            raise UnavailableError(
                f"{', '.join(missing)} not found; .ci/packages bench installs them"
            )
        require_memory(self.memory)


def require_memory(size: int) -> None:
    """Raise UnavailableError unless twice that many bytes are free (MemAvailable)."""
    free = psutil.virtual_memory().available
    if free < 2 * size:
        raise UnavailableError(f"takes up to {size >> 20} MiB, of {free >> 20} MiB that are free")


def find() -> dict[str, Benchmark]:
    """Return all benchmarks by name, in the order of their names."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name.startswith("_"):
            continue
        made = getattr(importlib.import_module(f"benchmarks.{module.name}"), "benchmark", None)
        if isinstance(made, Benchmark):
            found[made.name] = made
    return dict(sorted(found.items()))
