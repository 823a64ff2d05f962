"""Hundreds of kills: SOAK_KILLS on each kind of disk; SOAK_SEED chooses the moments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.kills import Disk, disk, kill_under_load

__all__ = ["disk"]

KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "1"))

pytestmark = pytest.mark.timeout(120 + 10 * KILLS)


async def test_killed_reactors_lose_nothing_and_fail_nothing(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kill_under_load(disk, tmp_path, kills=KILLS, seed=SEED, monkeypatch=monkeypatch)
