"""Faults under what is tested: as they come, and as they go by."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import Any

from bdev.io import BdevIO, Op, Request
from bdev.kind import Bdev
from reactor.native import lib
from tests.support.bdevs import Bench
from tests.support.conformance import Make, outcome

REQUESTS = 64  # to each reactor, of each operation
FAULTS: dict[str, dict[str, Any]] = {  # each by a number of its own, or by chance
    "pending": {"num": 5},
    "nomem": {"num": 50, "rate": 30},
    "failure": {"num": 5},
}


def after_faults(below: Make, *errors: str, survives: bool = False) -> Make:
    """Have ``errors``, devices under the one that is made, do everything they can to it before.

    ``survives`` says that it answers no request with an error meanwhile.
    """

    async def make(bench: Bench) -> str:
        name = await below(bench)
        bdev = bench.registry.find(name)
        ios = [await bench.open(name, reactor) for reactor in (0, 1)]
        for fault in FAULTS:
            may_fail = fault == "failure" and not survives
            seen = await hit(bench, bdev, ios, fault, errors)
            assert seen <= ({0, errno.EIO} if may_fail else {0}), (fault, seen)
            assert not may_fail or errno.EIO in seen, fault
        assert {lib.bdev_in_flight(io.handle) for io in ios} == {0}
        for reactor in (0, 1):
            await bench.close(name, reactor)
        return name

    return make


def among_faults(below: Make, *errors: str) -> Make:
    """Have a quarter of all that reaches ``errors`` find no resources, as long as they exist."""

    async def make(bench: Bench) -> str:
        name = await below(bench)
        for error in errors:
            await inject(bench, error, "nomem", rate=25)
        return name

    return make


async def inject(bench: Bench, error: str, fault: str, **how: Any) -> None:
    await bench.rpc("bdev_error_inject_error", name=error, io_type="all", error_type=fault, **how)


async def hit(
    bench: Bench, bdev: Bdev, ios: Sequence[BdevIO], fault: str, errors: Sequence[str]
) -> set[int]:
    """Return what all kinds of requests end with while a fault hits some; then it is over."""
    for error in errors:
        await inject(bench, error, fault, **FAULTS[fault])
    first = list(FAULTS).index(fault) * REQUESTS  # places that nothing has been done to yet
    places = range(first, first + REQUESTS)
    requests = [start(bdev, io, op, place) for place in places for io in ios for op in MIX]
    ends = asyncio.gather(*(outcome(one) for one in requests if one is not None))
    while not ends.done():
        for error in errors:
            await bench.rpc("bdev_error_resume_pending", name=error)
        await asyncio.sleep(0)
    for error in errors:
        assert left(bench, error) < len(MIX) * FAULTS[fault]["num"], f"{fault}: nothing was hit"
        await bench.rpc("bdev_error_inject_error", name=error, io_type="clear")
    return set(ends.result())


MIX = (Op.READ, Op.WRITE, Op.UNMAP, Op.FLUSH, Op.WRITE_ZEROES)


def start(bdev: Bdev, io: BdevIO, op: Op, place: int) -> Request | None:
    """Start a request in one of many places, if the device has such."""
    if op not in bdev.supported:
        return None
    if op is Op.FLUSH:
        return io.start(op)
    length = 2 * bdev.block_size
    data = [bytearray(b"f" * length)] if op in (Op.READ, Op.WRITE) else []
    return io.start(op, place * length, 0 if data else length, data)


def left(bench: Bench, error: str) -> int:
    """Return how many requests are still to be hit."""
    rules = bench.registry.find(error).driver_specific()["error"]["rules"]
    return sum(rule["left"] for rule in rules.values())
