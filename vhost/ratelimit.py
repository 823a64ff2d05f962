"""Log lines that a peer can cause, and therefore may not cause without limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class LimitedLog:
    """Writes at most ``burst`` lines at once and one a ``period`` (seconds) in the long run.

    What was left out is counted, and said with the next line that is written.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        burst: int = 8,
        period: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._clock = clock
        self._allowed = float(burst)
        self._looked = clock()
        self._left_out = 0

    def warning(self, text: str) -> None:
        """Write a warning, if there is room for it."""
        self._write(logging.WARNING, text)

    def info(self, text: str) -> None:
        """Write a line for those who want to know, if there is room for it."""
        self._write(logging.INFO, text)

    def _write(self, level: int, text: str) -> None:
        now = self._clock()
        earned = (now - self._looked) / self._period
        self._looked, self._allowed = now, min(self._burst, self._allowed + earned)
        if self._allowed < 1:
            self._left_out += 1
            return
        self._allowed -= 1
        if self._left_out:
            text = f"{text} ({self._left_out} lines before this one were left out)"
            self._left_out = 0
        self._log.log(level, "%s", text)
