"""Fencing of file disks: what a dead reactor had handed to the kernel is waited for.

Requests outlive the process that submitted them: a write may reach the file after its reactor was
killed, a read may still fill guest memory. Both are wrong once another reactor has taken the
requests up. So whatever has operations in the kernel holds a shared lock (bdev/fence.h) that the
kernel lets go when the last of them is over; the control process keeps a descriptor of the locked
file, and waits until it can have the lock for itself.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from reactor.vault import NoVault

log = logging.getLogger(__name__)

POLL = 0.002  # seconds; the kernel takes some 30 ms to take an io_uring apart
_KEY = "fence/"  # with a reactor's name: where the vault has its fence
PATIENCE = 1.0  # seconds before the first line in the log that says what is waited for


class Fence:
    """One reactor's fence; owns ``fd``, of which the vault has a duplicate."""

    def __init__(self, fd: int, name: str = "", vault: NoVault | None = None) -> None:
        self.fd = fd
        self.name = name
        self._vault = vault
        self.inode = os.fstat(fd).st_ino
        self.holders = 0  # file disks that are open there

    @property
    def is_open(self) -> bool:
        """Whether everything is over."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    async def keep(self) -> None:
        """Have it outlive this process."""
        if self._vault is not None:
            await self._vault.put(_KEY + self.name, lambda: (b"", [self.fd]))

    def close(self) -> None:
        """Let it go."""
        if self._vault is not None:
            self._vault.drop(_KEY + self.name)
        os.close(self.fd)


_fences: WeakKeyDictionary[Any, Fence] = WeakKeyDictionary()  # by reactor


async def hold(cluster: Any, reactor: Any) -> None:
    """Keep the fence that ``reactor`` has now, until as many calls of release()."""
    _, fds = await cluster.call_for_fds(reactor, "bdev_lend_fence", 1)
    with fds:
        fence = _fences.get(reactor)
        if fence is None or fence.inode != os.fstat(fds[0]).st_ino:
            forget(reactor)
            fence = _fences[reactor] = Fence(fds.take(0), reactor.name, cluster.vault)
            fence.holders += 1
            await fence.keep()
        else:
            fence.holders += 1


def inherit(vault: NoVault, reactors: Iterable[Any]) -> None:
    """Have the fences of the control process before, of reactors that have not been told anything.

    Those of others were drained when they ended.
    """
    for reactor in reactors:
        kept = vault.inherit(_KEY + reactor.name)
        if kept is not None:
            _fences[reactor] = Fence(kept.fds.take(0), reactor.name, vault)


def release(reactor: Any) -> None:
    """Take note that a file disk of ``reactor`` was closed, with nothing in flight."""
    fence = _fences.get(reactor)
    if fence is not None:
        fence.holders -= 1
        if fence.holders == 0:
            forget(reactor)


def forget(reactor: Any) -> None:
    """Let the fence of ``reactor`` go."""
    fence = _fences.pop(reactor, None)
    if fence is not None:
        fence.close()


async def drained(reactor: Any) -> None:
    """Return when nothing that ``reactor``, which is dead, had submitted can happen any more."""
    fence = _fences.get(reactor)
    if fence is None:
        return
    start = time.monotonic()
    patience = PATIENCE
    while _fences.get(reactor) is fence and not fence.is_open:
        await asyncio.sleep(POLL)
        if time.monotonic() - start > patience:
            log.warning(
                "%s: its disks wait for requests that it had in the kernel when it died, "
                "for %.0f s now",
                *(reactor.name, time.monotonic() - start),
            )
            patience *= 2
    if _fences.get(reactor) is fence:
        forget(reactor)
