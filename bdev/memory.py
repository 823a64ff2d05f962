"""Memory that the io_uring of a reactor's file disks has registered, for as long as it is mapped.

The kernel pins it: a guest that gives pages back (balloon, free-page reporting, virtio-mem) would
read stale data from then on. So it is done where somebody asked for it, and only there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
from collections.abc import Iterable

from reactor.native import CData, ffi, lib

# Bytes of one buffer. The kernel would take lib.FILE_BUFFER_MAX, and hold up the reactor for
# seconds: pages that the guest has never touched are made and cleared first.
PIECE = 64 << 20

# What kept memory from being registered, by errno.
_REFUSED = {
    errno.EFAULT: "the kernel cannot pin it: use memory-backend-memfd or hugetlbfs, not a file",
    errno.EOPNOTSUPP: "the kernel cannot pin it: use memory-backend-memfd or hugetlbfs, not a file",
    errno.EINVAL: "the kernel is too old: Linux 5.19 can",
    errno.ENOSPC: "the io_uring's table of buffers is full",
}

log = logging.getLogger(__name__)
_warned = False  # once a process is enough: every session would say the same


class RegisteredMemory:
    """What was registered of one guest's memory."""

    def __init__(self, reactor: CData) -> None:
        self._reactor = reactor
        self._addresses: list[CData] = []
        self.size = 0  # bytes
        self._ended = False

    async def add(self, regions: Iterable[tuple[CData, int]]) -> None:
        """Register all regions, each an address and a size in bytes, or none of them.

        The kernel takes its time to pin memory, so the reactor does other work between the pieces.
        A refusal is logged, the first one of this process; everything works without.
        """
        for address, size in regions:
            for start in range(0, size, PIECE):
                piece = ffi.cast("char *", address) + start
                length = min(size - start, PIECE)
                rc = lib.file_buffer_add(self._reactor, piece, length)
                if rc < 0:
                    self.remove()
                    _warn(-rc)
                    return
                self._addresses.append(piece)
                self.size += length
                await asyncio.sleep(0)
                if self._ended:
                    return

    def remove(self) -> None:
        """Register nothing any more; no request uses it."""
        self._ended = True
        for address in self._addresses:
            lib.file_buffer_remove(self._reactor, address)
        self._addresses.clear()
        self.size = 0


def _warn(code: int) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    if code == errno.ENOMEM:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
        why = (
            f"over the limit of locked memory, {limit}: raise it (ulimit -l, LimitMEMLOCK= of a"
            " systemd service) or switch registered_buffers off"
        )
    else:
        why = _REFUSED.get(code, os.strerror(code))
    log.warning("guest memory is not registered with io_uring, and I/O goes on without: %s", why)
