"""Transparent huge pages for malloc disks, given to what has been written, in the background."""

from __future__ import annotations

import asyncio
import logging
import os

from reactor.errors import check
from reactor.native import ffi, lib

log = logging.getLogger(__name__)

_FIRST_DELAY, _LAST_DELAY = 0.5, 16.0  # seconds between looks, which double while nothing happens
_PASS = 16  # extents put into huge pages at a time: a few milliseconds
_PAUSE = 0.01  # seconds between passes


class SharedMemory:
    """The memory of one disk, as far as its huge pages go. Owns a duplicate of ``fd``."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._done = bytearray()
        self._blocks = 0  # as stat() counts, when all that was full was in huge pages
        self._busy = False
        self.closed = False

    @property
    def huge_pages(self) -> int:
        """How many huge pages it is in, as far as is known."""
        return self._done.count(1)

    async def collapse(self) -> bool:
        """Put what is full into huge pages; return whether anything may have changed.

        Does nothing, cheaply, as long as no memory was added or given back. OSError (EINVAL) if
        the system cannot do that.
        """
        status = os.fstat(self._fd)
        extents = status.st_size // lib.COLLAPSE_EXTENT
        if status.st_blocks == self._blocks or extents == 0:
            return False
        self._done = self._done[:extents].ljust(extents, b"\0")
        self._busy = True
        try:
            # In a thread, since it copies.
            for _ in range(-(-extents // _PASS)):
                if await asyncio.to_thread(self._collapse_some, extents) < _PASS or self.closed:
                    break
                await asyncio.sleep(_PAUSE)
        finally:
            self._busy = False
            if self.closed:
                os.close(self._fd)
        self._blocks = status.st_blocks
        return True

    def _collapse_some(self, extents: int) -> int:
        with ffi.from_buffer("uint8_t[]", self._done) as done:
            return check(
                lib.collapse_memory(self._fd, done, extents, _PASS), "transparent huge pages"
            )

    def close(self) -> None:
        """Let go of the memory."""
        self.closed = True
        if not self._busy:
            os.close(self._fd)


class Collapser:
    """Looks after the memory of all disks: often while they are being filled, seldom later."""

    def __init__(self) -> None:
        self._memories: list[SharedMemory] = []
        self._task: asyncio.Task[None] | None = None
        self._possible = True

    def add(self, fd: int) -> SharedMemory:
        """Look after a memfd until what this returns is closed."""
        memory = SharedMemory(fd)
        self._memories.append(memory)
        if self._possible and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())
        return memory

    async def _run(self) -> None:
        delay = _FIRST_DELAY
        while self._memories:
            await asyncio.sleep(delay)
            self._memories = [memory for memory in self._memories if not memory.closed]
            busy = False
            for memory in list(self._memories):
                try:
                    busy |= not memory.closed and await memory.collapse()
                except OSError as error:
                    log.info("no transparent huge pages for malloc disks: %s", error.strerror)
                    self._possible = False
                    return
            delay = _FIRST_DELAY if busy else min(2 * delay, _LAST_DELAY)
