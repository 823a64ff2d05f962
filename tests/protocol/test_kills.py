"""Reactors are killed at random moments, and no request notices; tests/soak has the long form."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bdev.fence import Fence
from tests.support.kills import Disk, connect, disk, kill_under_load, serving

__all__ = ["disk"]


async def test_killed_reactors_lose_nothing_and_fail_nothing(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kill_under_load(disk, tmp_path, kills=6, seed=1, monkeypatch=monkeypatch)


async def test_queues_wait_for_what_the_dead_reactor_had_in_the_kernel(tmp_path: Path) -> None:
    slow = Disk("file", packed=False, own_log=False)
    seen: list[tuple[bool, bool, bool]] = []
    async with serving(slow, tmp_path) as target:
        front = await connect(target, slow)
        await target.in_thread(lambda: front.write(0, b"x" * 4096))
        reactor = target.cluster.reactors[0]
        _, fds = await target.cluster.call_for_fds(reactor, "bdev_lend_fence", 1)
        fence = Fence(fds.take(0))
        assert reactor.pid is not None

        async def lost(dead: Any) -> None:
            """Look, after the registry of devices has done its part."""
            seen.append((fence.is_open, dead.pid is not None, dead.alive))

        target.cluster.on_lost(lost)
        try:
            assert not fence.is_open
            os.kill(reactor.pid, signal.SIGKILL)
            assert await target.in_thread(lambda: front.read(0, 4096)) == b"x" * 4096
            await target.in_thread(lambda: front.read(0, 4096, queue=1))
            await target.until(lambda: reactor.state == "running")
            assert seen == [(True, True, False)]
        finally:
            os.close(fence.fd)
            await target.close(front)
