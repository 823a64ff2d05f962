"""Waiting for what nobody tells a test of, and how long a test waits for anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# Seconds that end a hang. However loaded a machine is, nothing that works takes as long.
PATIENCE = 120.0


def wait_until(
    condition: Callable[[], object], what: Callable[[], object] = lambda: "it is still not so"
) -> None:
    """Return once ``condition`` is true; AssertionError, with ``what``, if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


async def until(condition: Callable[[], object]) -> None:
    """Return once ``condition`` is true; TimeoutError if it never is."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
