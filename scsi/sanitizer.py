"""SANITIZE in the control process: all of a medium is written over, by any reactor.

Reactors close the unit and tell that it is to be done (scsi/sanitize.c); it goes on whatever
becomes of the command, its initiator and the reactor that has it, and after a restart of us.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from bdev.kind import Bdev
from reactor.errors import OperationError
from reactor.interfaces import Caller
from reactor.native import CData, ffi, lib
from scsi.sanitize_store import SanitizeStore, Sanitizing

_PART = 16 << 20  # bytes that a reactor does at a time
_SAVE_EVERY = 2.0  # seconds of work that may have to be done again after a restart
_IDLE_POLL = 0.001  # seconds between looks whether what was under way has ended
_NOBODY_POLL = 0.05  # the same while no reactor is there yet, or again
_DONE = 1 << 16  # of the progress indication, SPC-5 section 4.4.2.4.4

log = logging.getLogger(__name__)


class Bdevs(Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    def using(self, bdev: Bdev, reactor: Any) -> AbstractAsyncContextManager[None]:
        """Hold a device open in ``reactor`` for a while."""


class Sanitizer:
    """Carries out what the state of a unit asks for."""

    def __init__(self, cluster: Caller, bdevs: Bdevs, store: SanitizeStore | None = None) -> None:
        """Without ``store`` nothing of it survives a restart."""
        self._cluster = cluster
        self._bdevs = bdevs
        self._store = store
        self._restored: dict[str, Sanitizing] = {}  # to be gone on with, by UUID

    def restore(self, bdev: Bdev, shared: CData) -> bool:
        """Bring back what was known before a restart; True if there is something to go on with.

        Raises OSError, see SanitizeStore.load().
        """
        found = self._store.load(bdev.uuid) if self._store else None
        if found is not None:
            lib.scsi_shared_sanitize_restore(shared, found.native(), found.failed)
            if not found.failed:
                self._restored[bdev.uuid] = found
        return bdev.uuid in self._restored

    async def run(self, bdev: Bdev, shared: CData) -> None:
        """Sanitize a medium if that is asked for; returns when it has ended. Never raises."""
        asked: CData = ffi.new("struct scsi_sanitize *")
        state = lib.scsi_shared_sanitize(shared, asked)
        if state == lib.SCSI_SANITIZE_RUNNING:
            what = self._restored.pop(bdev.uuid, None)
            if what is None:
                what = Sanitizing.of(bdev.uuid, asked)
                await self._save(bdev, what)
            lib.scsi_shared_sanitize_noted(shared)
            what.failed = not await self._carry_out(bdev, shared, what)
            await self._save(bdev, what if what.failed else None)
            lib.scsi_shared_sanitized(shared, what.failed)
        elif state == lib.SCSI_SANITIZE_NONE:  # a failure was left
            await self._save(bdev, None)

    async def _save(self, bdev: Bdev, what: Sanitizing | None) -> None:
        """Have on disk what is to be known after a restart, or that there is nothing."""
        if self._store is None:
            return
        try:
            if what is not None:
                await asyncio.to_thread(self._store.save, what)
            else:
                await asyncio.to_thread(self._store.remove, bdev.uuid)
        except OSError as error:
            log.error("bdev %s: what SANITIZE has done is not on disk: %s", bdev.name, error)

    async def _carry_out(self, bdev: Bdev, shared: CData, what: Sanitizing) -> bool:
        """Write over all of it that is not done; False if that has failed."""
        while not lib.scsi_shared_is_idle(shared):  # noqa: ASYNC110 - reactors count, and tell nobody
            await asyncio.sleep(_IDLE_POLL)
        log.info("bdev %s: sanitizing %s", bdev.name, "goes on" if what.done else "begins")
        size = what.passes * bdev.block_size * bdev.num_blocks
        at, saved = 0, time.monotonic()
        try:
            for offset, length, pattern in parts_of(bdev, what):
                at += length
                if at <= what.done:
                    continue
                args = {"unit": bdev.id, "offset": offset, "length": length, "pattern": pattern}
                await self._write(bdev, args)
                what.done = at
                lib.scsi_shared_sanitize_progress(shared, at * _DONE // size)
                if time.monotonic() - saved > _SAVE_EVERY:
                    await self._save(bdev, what)
                    saved = time.monotonic()
        except (OperationError, OSError) as error:
            log.error("bdev %s: sanitizing has failed: %s", bdev.name, error)
            return False
        log.info("bdev %s: sanitizing has ended", bdev.name)
        return True

    async def _write(self, bdev: Bdev, args: dict[str, Any]) -> None:
        """Have a reactor do a part; another one if it dies, for as long as there are some."""
        while not any(reactor.alive for reactor in self._cluster.reactors):  # noqa: ASYNC110
            await asyncio.sleep(_NOBODY_POLL)
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


def parts_of(bdev: Bdev, asked: Sanitizing) -> Iterator[tuple[int, int, bytes]]:
    """Yield offset, length, and what every block is to have (empty: zeroes), pass by pass."""
    pattern = asked.pattern
    block = b"" if asked.erase else (pattern * (bdev.block_size // len(pattern) + 1))
    block = block[: bdev.block_size]
    for _ in range(asked.passes):
        size = bdev.block_size * bdev.num_blocks
        for offset in range(0, size, _PART):
            yield offset, min(_PART, size - offset), block
        if asked.invert:
            block = bytes(byte ^ 0xFF for byte in block)
