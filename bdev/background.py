"""Work on a device that takes long, as filling or rebuilding it: step by step, in some reactor."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from bdev.kind import Bdev
from bdev.registry import BdevRegistry
from reactor.errors import OperationError

log = logging.getLogger(__name__)

RETRY = 0.05  # seconds until another reactor is looked for, when there is none

Step = Callable[[Any], Awaitable[bool]]


class Background:
    """Awaits ``step(reactor)`` until it returns that nothing is left.

    The device is open in ``reactor`` meanwhile. When that dies, another one goes on. An
    OperationError of a step ends the work, and stays in ``error``; ``ended()`` is called then, and
    at its end.
    """

    def __init__(
        self,
        registry: BdevRegistry,
        bdev: Bdev,
        step: Step,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._bdev = bdev
        self._step = step
        self._ended = ended
        self._task: asyncio.Task[None] | None = None
        self.error: OperationError | None = None

    @property
    def running(self) -> bool:
        """Whether there is something left to do, and it is being done."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin, or begin again; nothing if it is running."""
        if not self.running:
            self.error = None
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End it, and wait until nothing of it is under way."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def wait(self) -> None:
        """Return when it has ended; OperationError if it failed."""
        if self._task is not None:
            await asyncio.wait([self._task])
        if self.error is not None:
            raise self.error

    async def _run(self) -> None:
        try:
            while not await self._run_somewhere():  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(RETRY)
        except OperationError as error:
            self.error = error
        self._ended()

    async def _run_somewhere(self) -> bool:
        """Take steps in one reactor; False if that is not possible any more."""
        reactors = self._registry.cluster.reactors
        reactor = next((one for one in reactors if one.alive), None)
        if reactor is None:
            return False
        try:
            async with self._registry.using(self._bdev, reactor):
                while not await self._take(reactor):
                    pass
        except OperationError as error:
            if error.code != -errno.ECONNRESET:
                raise
            return False
        return True

    async def _take(self, reactor: Any) -> bool:
        """Take one step; whoever stops us waits until it is over."""
        step = asyncio.ensure_future(self._step(reactor))
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])
            if not step.cancelled():
                step.exception()
            raise
