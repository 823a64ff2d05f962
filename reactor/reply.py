"""What a call awaits: as an asyncio.Future, but its task goes on as soon as the answer is there.

A Future schedules its task for the next turn of the loop, which costs a look at all descriptors and
timers: a tenth of a round trip. An answer arrives in a callback of the loop, where no task is
running, so that the waiting task can as well be resumed inside it. This is the interface that
asyncio asks of objects other than its own futures ("Future-compatible":
``_asyncio_future_blocking``).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator
from typing import Any


class Reply:
    """The answer to ``op``, to come within ``timeout`` seconds; to be awaited by one task, once.

    ``deadline`` is in the loop's time. Whoever made it watches that, and calls :meth:`fail`.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_context",
        "_error",
        "_loop",
        "_value",
        "_wakeup",
        "deadline",
        "done",
        "op",
        "timeout",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, op: str, timeout: float) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._wakeup: Callable[[Reply], object] | None = None
        self._context: contextvars.Context | None = None
        self._value: dict[str, Any] = {}
        self._error: BaseException | None = None
        self.op = op
        self.timeout = timeout
        self.deadline = loop.time() + timeout
        self.done = False

    def resume(self, value: dict[str, Any]) -> None:
        """Set the answer and run the task that waits for it; only from a callback of the loop."""
        self._value = value
        self.done = True
        if self._wakeup is not None and self._context is not None:
            self._context.run(self._wakeup, self)

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` in the task that waits, in the next turn of the loop."""
        if self.done:
            return
        self._error = error
        self.done = True
        if self._wakeup is not None:
            self._loop.call_soon(self._wakeup, self, context=self._context)

    def __await__(self) -> Generator[Reply, None, dict[str, Any]]:
        if not self.done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    # From here on: what asyncio.Task calls.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that the waiting task must belong to."""
        return self._loop

    def add_done_callback(
        self, fn: Callable[[Reply], object], *, context: contextvars.Context
    ) -> None:
        """Remember how to wake the task."""
        self._wakeup, self._context = fn, context

    def cancel(self, msg: str | None = None) -> bool:
        """Cancel the wait; return whether there was one."""
        waited = not self.done
        self.fail(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        return waited

    def result(self) -> dict[str, Any]:
        """Return the answer or raise the error."""
        if self._error is not None:
            raise self._error
        return self._value
