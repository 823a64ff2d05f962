"""What the NVMe driver spends on a request, in instructions, which no load changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from benchmarks import nvme

AIM = 150  # instructions for the driver's part of a read of 4 KiB, in a batch


@pytest.mark.skipif(not shutil.which("valgrind"), reason="counting instructions takes valgrind")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="valgrind and sanitizers exclude each other")
def test_a_read_in_a_batch_takes_no_more_instructions_than_are_aimed_at(tmp_path: Path) -> None:
    cost = nvme.count(nvme.build(tmp_path), depth=32, batches=50)
    assert 0 < cost.driver <= AIM
