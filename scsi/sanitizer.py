"""SANITIZE in the control process: all of a medium is written over, by any reactor.

Reactors close the unit and tell that it is to be done (scsi/sanitize.c); it goes on whatever
becomes of the command, its initiator and the reactor that has it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from bdev.kind import Bdev
from reactor.errors import OperationError
from reactor.interfaces import Caller
from reactor.native import CData, ffi, lib

_PART = 16 << 20  # bytes that a reactor does at a time
_IDLE_POLL = 0.001  # seconds between looks whether what was under way has ended
_DONE = 1 << 16  # of the progress indication, SPC-5 section 4.4.2.4.4

log = logging.getLogger(__name__)


class Bdevs(Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    def using(self, bdev: Bdev, reactor: Any) -> AbstractAsyncContextManager[None]:
        """Hold a device open in ``reactor`` for a while."""


class Sanitizer:
    """Carries out what the state of a unit asks for."""

    def __init__(self, cluster: Caller, bdevs: Bdevs) -> None:
        self._cluster = cluster
        self._bdevs = bdevs

    async def run(self, bdev: Bdev, shared: CData) -> None:
        """Sanitize a medium if that is asked for; returns when it has ended. Never raises."""
        asked: CData = ffi.new("struct scsi_sanitize *")
        if not lib.scsi_shared_sanitize(shared, asked):
            return
        while not lib.scsi_shared_is_idle(shared):  # noqa: ASYNC110 - reactors count, and tell nobody
            await asyncio.sleep(_IDLE_POLL)
        log.info("bdev %s: sanitizing begins", bdev.name)
        parts = list(parts_of(bdev, asked))
        try:
            for number, (offset, length, pattern) in enumerate(parts):
                args = {"unit": bdev.id, "offset": offset, "length": length, "pattern": pattern}
                await self._write(bdev, args)
                lib.scsi_shared_sanitize_progress(shared, (number + 1) * _DONE // len(parts))
        except (OperationError, OSError) as error:
            log.error("bdev %s: sanitizing has failed: %s", bdev.name, error)
            lib.scsi_shared_sanitized(shared, True)
            return
        log.info("bdev %s: sanitizing has ended", bdev.name)
        lib.scsi_shared_sanitized(shared, False)

    async def _write(self, bdev: Bdev, args: dict[str, Any]) -> None:
        """Have a reactor do a part; another one if it dies, for as long as there are some."""
        for reactor in self._cluster.reactors:
            if reactor.alive:
                try:
                    async with self._bdevs.using(bdev, reactor):
                        call = self._cluster.call
                        await call(reactor, "scsi_unit_sanitize", args, timeout=None)
                except ConnectionResetError:
                    continue
                return
        raise OperationError(-errno.ENODEV, "no reactor is there to do it")


def parts_of(bdev: Bdev, asked: CData) -> Iterator[tuple[int, int, bytes]]:
    """Yield offset, length, and what every block is to have (empty: zeroes), pass by pass."""
    pattern = ffi.buffer(asked.pattern, asked.length)[:]
    block = b"" if asked.erase else (pattern * (bdev.block_size // len(pattern) + 1))
    block = block[: bdev.block_size]
    for _ in range(asked.passes):
        size = bdev.block_size * bdev.num_blocks
        for offset in range(0, size, _PART):
            yield offset, min(_PART, size - offset), block
        if asked.invert:
            block = bytes(byte ^ 0xFF for byte in block)
