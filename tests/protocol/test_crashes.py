"""All processes are killed at once, and disks on files are as they may be; the long form: soak."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.crash import KINDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_answered_is_there_after_a_crash(kind: str) -> None:
    """In memory where there is such a file system: killing does not lose what a file has."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.support.crash",
                kind,
                folder,
                "--kills",
                "200",
                "--seconds",
                "7",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    result = re.fullmatch(r"kills=(\d+) answered=(\d+)\n", run.stdout)
    assert result, run.stdout
    assert int(result[1]) >= 5
    assert int(result[2]) > 0
