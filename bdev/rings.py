"""Fencing of file disks: what a dead reactor had handed to the kernel is waited for.

Requests outlive the process that submitted them: a write may reach the file after its reactor was
killed, a read may still fill guest memory. Both are wrong once another reactor has taken the
requests up. So the control process keeps a descriptor of every reactor's io_uring, which keeps the
ring and its counters alive, and compares after a death how many operations the kernel has taken
with how many it has completed. Every operation of ours ends in exactly one completion.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import struct
import time
from typing import Any
from weakref import WeakKeyDictionary

log = logging.getLogger(__name__)

POLL = 0.001  # seconds
PATIENCE = 1.0  # seconds before the first line in the log that says what is waited for

_COUNTER = struct.Struct("=I")


class Ring:
    """The counters of a ring of another process; owns ``fd``."""

    def __init__(self, fd: int, size: int, taken: int, completed: int, number: int) -> None:
        self.number = number
        self.holders = 0  # file disks that are open there
        self._fd = fd
        self._taken, self._completed = taken, completed
        self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)

    @property
    def under_way(self) -> int:
        """How many operations the kernel has taken and not completed."""
        (taken,) = _COUNTER.unpack_from(self._map, self._taken)
        (completed,) = _COUNTER.unpack_from(self._map, self._completed)
        return int(taken - completed) & 0xFFFFFFFF

    def close(self) -> None:
        """Let the ring go."""
        self._map.close()
        os.close(self._fd)


_rings: WeakKeyDictionary[Any, Ring] = WeakKeyDictionary()  # by reactor


async def hold(cluster: Any, reactor: Any) -> None:
    """Keep the ring that ``reactor`` has now, until as many calls of release()."""
    view, fds = await cluster.call_for_fds(reactor, "bdev_lend_ring", 1)
    with fds:
        ring = _rings.get(reactor)
        if ring is None or ring.number != view["ring"]:
            forget(reactor)
            counters = (view["size"], view["taken"], view["completed"])
            ring = _rings[reactor] = Ring(fds.take(0), *counters, view["ring"])
        ring.holders += 1


def release(reactor: Any) -> None:
    """Take note that a file disk of ``reactor`` was closed, with nothing in flight."""
    ring = _rings.get(reactor)
    if ring is not None:
        ring.holders -= 1
        if ring.holders == 0:
            forget(reactor)


def forget(reactor: Any) -> None:
    """Let the ring of ``reactor`` go."""
    ring = _rings.pop(reactor, None)
    if ring is not None:
        ring.close()


async def drained(reactor: Any) -> None:
    """Return when the kernel has completed all that ``reactor``, which is dead, had submitted."""
    ring = _rings.get(reactor)
    if ring is None:
        return
    start = time.monotonic()
    patience = PATIENCE
    while _rings.get(reactor) is ring and ring.under_way:
        await asyncio.sleep(POLL)
        if time.monotonic() - start > patience:
            log.warning(
                "%s: its disks wait for %d requests that it had in the kernel when it died, "
                "for %.0f s now",
                *(reactor.name, ring.under_way, time.monotonic() - start),
            )
            patience *= 2
    if _rings.get(reactor) is ring:
        forget(reactor)
