"""Thousands of crashes of everything: SOAK_CRASHES of each kind of disk, on a real file system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.crash import KINDS

CRASHES = int(os.environ.get("SOAK_CRASHES", "2000"))
SEED = os.environ.get("SOAK_SEED", "1")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(60 + CRASHES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_answered_is_there_after_a_crash(kind: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.crash",
            kind,
            str(tmp_path),
            "--kills",
            str(CRASHES),
            "--seed",
            SEED,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"kills={CRASHES} ")
