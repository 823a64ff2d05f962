"""Thousands of crashes of everything: SOAK_CRASHES of each kind of disk, on a real file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.crash import KINDS, crash

CRASHES = int(os.environ.get("SOAK_CRASHES", "2000"))
SEED = os.environ.get("SOAK_SEED", "1")

pytestmark = pytest.mark.timeout(60 + CRASHES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_answered_is_there_after_a_crash(kind: str, tmp_path: Path) -> None:
    kills, _ = crash(kind, tmp_path, "--kills", str(CRASHES), "--seed", SEED)
    assert kills == CRASHES
