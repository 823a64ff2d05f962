"""A file of entries that is changed by adding to it: what it costs follows what has changed.

An entry is a value under a key. A line of the file is a JSON array of entries; each takes the place
of an earlier one with its key, or removes that if its value is null. The first line has everything
that there was, and others what has become of it since. When those are longer than the first, the
file is replaced by one of a single line. A line without an end was never finished; it is the last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

MIN_ADDED = 64 << 10  # bytes that may be added to the shortest first line


class Key(NamedTuple):
    """What an entry is known by; ``order`` is for whoever reads them all."""

    order: int
    section: str
    name: str


class Entry(msgspec.Struct, array_like=True):
    """An entry as it is in the file."""

    order: int
    section: str
    name: str
    value: Any

    @property
    def key(self) -> Key:
        """What it is known by."""
        return Key(self.order, self.section, self.name)


class Ledger:
    """The file, and what is in it; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[Key, bytes] = {}
        self._fd = -1  # of the file, while what is in it is known
        self._first = self._added = 0  # bytes

    def commit(self, changes: Mapping[Key, bytes | None], *, complete: bool = False) -> None:
        """Have these entries, JSON or None for gone, on disk; OSError leaves what was there.

        ``complete``: others are gone. After an error the next commit has these changes, too.
        """
        if complete:
            changes = dict.fromkeys(self._entries.keys() - changes.keys()) | dict(changes)
        changed = {key: value for key, value in changes.items() if self._entries.get(key) != value}
        for key, value in changed.items():
            if value is None:
                del self._entries[key]
            else:
                self._entries[key] = value
        line = _line(changed)
        if self._fd < 0 or os.fstat(self._fd).st_nlink == 0:  # removed by somebody
            self._replace()
        elif not changed:
            return
        elif self._added + len(line) > max(self._first, MIN_ADDED):
            self._replace()
        else:
            self._add(line)

    def close(self) -> None:
        """Leave the file as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _replace(self) -> None:
        self.close()
        text = _line(self._entries)
        self._fd = replace_file(self.path, text)
        self._first, self._added = len(text), 0

    def _add(self, line: bytes) -> None:
        try:
            _write_all(self._fd, line)
            os.fdatasync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._first + self._added)
            self.close()
            raise
        self._added += len(line)


def read_ledger(text: bytes) -> dict[Key, Any]:
    """Return the entries in a file's text, older ones first; ValueError if it is not one."""
    entries: dict[Key, Any] = {}
    for line in text.split(b"\n")[:-1]:
        for entry in msgspec.json.decode(line, type=list[Entry]):
            if entry.value is None:
                entries.pop(entry.key, None)
            else:
                entries[entry.key] = entry.value
    return entries


def replace_file(path: Path, text: bytes) -> int:
    """Replace a file by one that only this user may read, or raise OSError and leave it.

    Returns its descriptor, for adding to it. It is on disk, and so is its name.
    """
    fresh = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(fresh, flags, 0o600)
    try:
        _write_all(fd, text)
        os.fsync(fd)
        os.replace(fresh, path)
        _sync_directory(path.parent)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    return fd


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(entries: Mapping[Key, bytes | None]) -> bytes:
    written = [
        msgspec.json.encode(Entry(*key, None if value is None else msgspec.Raw(value)))
        for key, value in entries.items()
    ]
    return b"[" + b",".join(written) + b"]\n"


def _write_all(fd: int, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[os.write(fd, left) :]
