"""The configuration as it is now, in a file of the run directory.

It is what a control process that takes over begins with. An orderly end removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

NAME = "config.json"

log = logging.getLogger(__name__)


class SavedConfig:
    """The file, written anew, as a whole or not at all, when the configuration has changed."""

    def __init__(self, run_dir: Path, document: Callable[[], Any]) -> None:
        self.path = run_dir / NAME
        self._document = document
        self._written = b""
        self._started = False

    def start(self) -> None:
        """Save what there is, and whatever it becomes; until now it was only being built."""
        self._started = True
        self.save()

    def store(self) -> None:
        """Write the file if the configuration is another one; OSError leaves the former."""
        if not self._started:
            return
        text = msgspec.json.format(msgspec.json.encode(self._document()), indent=2)
        if text != self._written:
            write_atomically(self.path, text)
            self._written = text

    def save(self) -> None:
        """As ``store``, after what cannot be undone: that it fails is only logged."""
        try:
            self.store()
        except OSError as error:
            log.error("the configuration could not be saved: %s", error)
        except Exception:  # what was asked for is done, and is to be answered
            log.exception("the configuration could not be saved")

    def close(self) -> None:
        """Remove the file."""
        self._started = False
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def write_atomically(path: Path, text: bytes) -> None:
    """Replace a file by one that only this user may read, or raise OSError and leave it.

    The new one is on disk, under its name, when this returns.
    """
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        _sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def _sync_directory(path: Path) -> None:
    """Have the names in a directory on disk, where a new name of a file is until then in memory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
