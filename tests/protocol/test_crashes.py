"""All processes are killed at once, and disks on files are as they may be; the long form: soak."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.support.crash import KINDS, LEAST, crash


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_answered_is_there_after_a_crash(kind: str) -> None:
    """In memory where there is such a file system: killing does not lose what a file has."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        kills, answered = crash(kind, Path(folder), "--kills", "200", "--seconds", "7")
    assert kills >= LEAST
    assert answered > 0
