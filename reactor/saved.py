"""The configuration as it is now, in a file of the run directory.

It is what a control process that takes over begins with. An orderly end removes it.

A configuration has *parts*: one for each thing that can be made, with the calls that make it.
Whoever changes one says so (*touches* it), and only that is written; after an operation that does
not say what it changes all parts are looked at. Writing is a thread's work. Changes that come
meanwhile are written together, and each operation is answered when its own are on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from reactor.ledger import Key, Ledger, read_ledger

NAME = "config.json"

Calls = list[dict[str, Any]]

log = logging.getLogger(__name__)


class PartKey(NamedTuple):
    """Which part of a subsystem's configuration; those in a lower ``place`` come first."""

    place: int
    name: str


PLACES = 3  # of parts


class Configured:
    """A subsystem whose configuration has parts; ``touched`` is called when one has changed."""

    name: str
    depends_on: Sequence[str]
    touched: Callable[[PartKey], None] = staticmethod(lambda _: None)

    def parts(self) -> Iterable[tuple[PartKey, Calls]]:
        """Return all parts, in the order in which they are to be made.

        What a part needs of others is made before it, and would be if it were made anew later: a
        key is that of the same thing for as long as it is there, and then of none that needs more.
        """
        raise NotImplementedError

    def part(self, key: PartKey) -> Calls:
        """Return one part as it is now; [] if there is none."""
        raise NotImplementedError

    def config(self) -> Calls:
        """Return the calls that build the present state: ``{"method": ..., "params": {...}}``."""
        return without_repetition(calls for _, calls in self.parts())


def without_repetition(parts: Iterable[Calls]) -> Calls:
    """Return the calls of all parts, each once: one call may make several things."""
    calls = {msgspec.json.encode(call): call for part in parts for call in part}
    return list(calls.values())


class SavedConfig:
    """The file, as it follows the configuration of ``subsystems``."""

    def __init__(self, run_dir: Path, subsystems: Sequence[Configured]) -> None:
        self.path = run_dir / NAME
        self._subsystems = subsystems
        for index, subsystem in enumerate(subsystems):
            subsystem.touched = functools.partial(self._touch, index)
        self._ledger = Ledger(self.path)
        self._writer = ThreadPoolExecutor(1, "config")
        self._writing: asyncio.Task[None] | None = None
        self._touched: dict[tuple[int, PartKey], None] = {}
        self._everything = False  # all parts may be touched
        self._changes = 0  # so many were there
        self._written = 0  # so many of them are on disk, or were tried to be
        self._started = False

    def start(self) -> None:
        """Save what there is, and whatever it becomes; until now it was only being built."""
        self._started = True
        try:
            self.store()
        except Exception as error:
            self._failed(error)

    def changed(self) -> None:
        """Take note that any part may have changed."""
        self._everything = True
        self._changes += 1

    def _touch(self, subsystem: int, key: PartKey) -> None:
        self._touched[subsystem, key] = None
        self._changes += 1

    def store(self) -> None:
        """Have everything on disk; OSError leaves what was there."""
        if self._started:
            self._everything = True
            changes = self._changes
            self._writer.submit(self._collect()).result()
            self._written = changes

    async def saved(self) -> None:
        """Return when what has changed until now is on disk.

        What was done cannot be undone: if it cannot be written, that is logged, and tried again
        with the next change.
        """
        wanted = self._changes
        while self._started and self._written < wanted:
            if self._writing is None:
                self._writing = asyncio.create_task(self._write())
            await asyncio.shield(self._writing)

    async def _write(self) -> None:
        changes = self._changes
        try:
            if self._started:
                work = self._collect()
                await asyncio.get_running_loop().run_in_executor(self._writer, work)
        except Exception as error:
            self._failed(error)
        finally:
            self._written = max(self._written, changes)
            self._writing = None

    def _failed(self, error: Exception) -> None:
        self._everything = True
        by_our_fault = not isinstance(error, OSError)
        log.error("the configuration could not be saved: %s", error, exc_info=by_our_fault)

    def _collect(self) -> Callable[[], None]:
        """Return what writes all parts that were touched since the last time, as they are now."""
        complete, self._everything = self._everything, False
        touched, self._touched = self._touched, {}
        parts = self._all() if complete else self._some(touched)
        changes = {key: msgspec.json.encode(calls) if calls else None for key, calls in parts}
        return functools.partial(self._ledger.commit, changes, complete=complete)

    def _all(self) -> Iterator[tuple[Key, Calls]]:
        for index, subsystem in enumerate(self._subsystems):
            for key, calls in subsystem.parts():
                yield self._key(index, key), calls

    def _some(self, touched: Iterable[tuple[int, PartKey]]) -> Iterator[tuple[Key, Calls]]:
        for index, key in touched:
            yield self._key(index, key), self._subsystems[index].part(key)

    def _key(self, index: int, key: PartKey) -> Key:
        return Key(index * PLACES + key.place, self._subsystems[index].name, key.name)

    def close(self) -> None:
        """Remove the file."""
        self._started = False
        self._writer.shutdown()
        self._ledger.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def read_saved(path: Path) -> dict[str, Any]:
    """Return what a file says, as ``reactor.config`` loads it; OSError, or ValueError."""
    text = path.read_bytes()
    try:
        if text.startswith(b"{"):  # a program before this one has written it
            document: dict[str, Any] = msgspec.json.decode(text)
            return document
        entries = read_ledger(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    sections: dict[str, list[Calls]] = {}
    for key in sorted(entries, key=lambda key: key.order):
        sections.setdefault(key.section, []).append(entries[key])
    return {
        "subsystems": [
            {"subsystem": name, "config": without_repetition(parts)}
            for name, parts in sections.items()
        ]
    }
