"""Queue depths that are sampled, as ``bdev_set_qd_sampling_period`` asks for.

Reactors show in shared memory how many requests are in flight; the control process looks there now
and then, so that sampling costs them nothing.
"""

import asyncio
from collections.abc import Callable
from typing import Any

LEAST = 1000  # microseconds between samples: the control process has other things to do
_MICROSECONDS = 1_000_000


class DepthSampler:
    """Samples of what ``depth()`` returns, taken every ``period`` microseconds until ``stop``.

    A sample stands for the time since the one before, however long that was.
    """

    def __init__(self, period: int, depth: Callable[[], int]) -> None:
        self.period = period
        self._depth = depth
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._busy = self._weighted = 0.0  # seconds
        self._timer = self._again()

    def _again(self) -> asyncio.TimerHandle:
        return self._loop.call_later(max(self.period, LEAST) / _MICROSECONDS, self._sample)

    def _sample(self) -> None:
        now, depth = self._loop.time(), self._depth()
        passed, self._last = now - self._last, now
        self._weighted += passed * depth
        self._busy += passed if depth else 0
        self._timer = self._again()

    def stop(self) -> None:
        """Take no more samples."""
        self._timer.cancel()

    def to_wire(self) -> dict[str, Any]:
        """Return SPDK's members: the period, and in microseconds how long it was busy.

        ``weighted_io_time`` counts that once for each request in flight.
        """
        return {
            "queue_depth_polling_period": self.period,
            "io_time": round(self._busy * _MICROSECONDS),
            "weighted_io_time": round(self._weighted * _MICROSECONDS),
        }
