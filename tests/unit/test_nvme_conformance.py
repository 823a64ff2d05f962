"""NVMe drives against the kit that every kind of bdev passes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.bdevs import Bench
from tests.support.conformance import Make, check_bdev
from tests.support.nvme_bench import NvmeBench
from tests.support.nvme_controller import (
    HAS_COMPARE,
    HAS_COPY,
    HAS_DSM,
    HAS_VERIFY,
    HAS_ZEROES,
    Namespace,
)


def drive(oncs: int, block_size: int = 512, mdts: int = 5, **attach: Any) -> Make:
    async def make(bench: Bench) -> str:
        assert isinstance(bench, NvmeBench)
        soft = bench.soft
        soft.namespaces = {1: Namespace((1 << 20) // block_size, block_size)}
        soft.oncs, soft.mdts = oncs, mdts
        (name,) = await bench.attach(**attach)
        return name

    return make


EVERYTHING = HAS_COMPARE | HAS_DSM | HAS_ZEROES | HAS_COPY | HAS_VERIFY
DRIVES = {
    "all commands": drive(EVERYTHING),
    "no optional command": drive(0),
    "4096": drive(
        HAS_COMPARE | HAS_DSM | HAS_ZEROES | HAS_COPY | HAS_VERIFY, 4096, mdts=1, interrupts=False
    ),
}


@pytest.mark.parametrize("kind", DRIVES)
def test_a_drive_passes(kind: str) -> None:
    check_bdev(DRIVES[kind], bench_type=NvmeBench)
