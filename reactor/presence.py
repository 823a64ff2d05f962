"""Whether anything is left of a cluster: a lock that all its reactors hold together.

The control process takes the lock, and every reactor inherits the open file, as does the table of
files of each io_uring (bdev/uring.c). The kernel lets go of the lock with the last of them: so who
gets it knows that nothing of a cluster that died can touch a disk or a guest any more.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from pathlib import Path

from reactor.lockfile import InUse
from reactor.vault import NoVault

NAME = "reactors"  # in the run directory
KEY = "presence"
LIMIT = 30.0  # seconds for the reactors of a cluster that died to end; they have half of one
_POLL = 0.005  # seconds

log = logging.getLogger(__name__)


class Presence:
    """The lock, as this process holds it; ``fd`` is what reactors inherit."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self._path = path

    @classmethod
    async def take(cls, run_dir: Path, vault: NoVault) -> Presence:
        """Have the lock of the reactors that are taken over, or wait until none are left.

        Raises InUse if those of a cluster that died do not end in time.
        """
        path = run_dir / NAME
        kept = vault.inherit(KEY)
        if kept is not None:
            presence = cls(kept.fds.take(0), path)
        else:
            presence = cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), path)
            try:
                await presence._lock()
            except BaseException:
                os.close(presence.fd)
                raise
        vault.put(KEY, lambda: (b"", [presence.fd]))
        return presence

    async def _lock(self) -> None:
        for attempt in range(int(LIMIT / _POLL)):
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt == 0:
                    log.warning("waiting for the reactors of a cluster that died here to end")
                await asyncio.sleep(_POLL)
            else:
                return
        raise InUse(f"reactors of a cluster that died still run, and hold {self._path}; end them")

    def close(self) -> None:
        """Remove the file, at an orderly end."""
        self._path.unlink(missing_ok=True)
        os.close(self.fd)
