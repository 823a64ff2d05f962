"""Delays: never shorter than asked for, in order, changeable, and no obstacle to removal."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bdev.io import BdevIO, Op
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench

MS = 1000
LATENCIES = {
    "avg_read_latency": 0,
    "p99_read_latency": 0,
    "avg_write_latency": 0,
    "p99_write_latency": 0,
}


async def make(bench: Bench, **latencies: int) -> BdevIO:
    if not list(bench.registry):
        await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=256)
    await bench.rpc("bdev_delay_create", name="D", base_bdev_name="M", **{**LATENCIES, **latencies})
    return await bench.open("D")


def milliseconds(io: BdevIO, op: Op) -> float:
    """Return how long a request takes."""
    before = lib.reactor_ticks()
    io.start(op, 0, 0, [bytearray(512)] if op in (Op.READ, Op.WRITE) else []).finish()
    return (lib.reactor_ticks() - before) * 1000 / lib.reactor_tick_rate()


@on_bench()
async def test_each_direction_takes_as_long_as_it_should(bench: Bench) -> None:
    io = await make(
        bench,
        avg_read_latency=5 * MS,
        p99_read_latency=5 * MS,
        avg_write_latency=9 * MS,
        p99_write_latency=9 * MS,
    )
    assert milliseconds(io, Op.READ) >= 5
    assert milliseconds(io, Op.WRITE) >= 9
    assert milliseconds(io, Op.FLUSH) >= 9
    await bench.close("D")


@on_bench()
async def test_data_goes_through(bench: Bench) -> None:
    io = await make(bench, avg_read_latency=1, avg_write_latency=1)
    io.write(512, b"d" * 512)
    assert io.read(0, 1536) == bytes(512) + b"d" * 512 + bytes(512)
    await bench.close("D")


@on_bench()
async def test_those_that_wait_equally_long_end_in_order(bench: Bench) -> None:
    io = await make(bench, avg_read_latency=2 * MS, p99_read_latency=2 * MS)
    requests = [io.start(Op.READ, i * 512, 0, [bytearray(512)]) for i in range(100)]
    assert not any(request.done for request in requests)
    while not requests[-1].done:
        io.selector.select(0.001)
        done = [request.done for request in requests]
        assert done == sorted(done, reverse=True)
    for request in requests:
        request.finish()
    await bench.close("D")


@on_bench()
async def test_about_one_in_a_hundred_takes_the_longer_time(bench: Bench) -> None:
    io = await make(bench, p99_read_latency=60 * 1000 * MS)
    requests = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(5000)]
    slow = [request for request in requests if not request.done]
    assert 10 < len(slow) < 130  # 50; more than five standard deviations
    disk = bench.registry.find("D")
    await bench.rpc("bdev_delay_delete", name="D")
    for request in requests:
        request.finish()
    await bench.registry.close(disk, bench.reactor)


@on_bench(reactors=2)
async def test_a_latency_is_changed_in_every_reactor(bench: Bench) -> None:
    ios = [await make(bench), await bench.open("D", 1)]
    for which in ("avg_write", "p99_write"):
        await bench.rpc(
            "bdev_delay_update_latency",
            delay_bdev_name="D",
            latency_type=which,
            latency_us=7 * MS,
        )
    for io in ios:
        assert milliseconds(io, Op.WRITE) >= 7
    calls = bench.registry.config()
    assert calls[1]["params"]["avg_write_latency"] == 7 * MS
    for reactor in (0, 1):
        await bench.close("D", reactor)


@on_bench()
async def test_a_reset_waits_for_what_is_held_back(bench: Bench) -> None:
    io = await make(bench, avg_write_latency=3 * MS, p99_write_latency=3 * MS)
    request = io.start(Op.WRITE, 0, 0, [bytes(512)])
    io.reset()
    assert request.done
    request.finish()
    await bench.close("D")


@on_bench()
async def test_removal_does_not_wait_for_the_delay(bench: Bench) -> None:
    latency = 3600 * 1000 * MS
    io = await make(bench, avg_write_latency=latency, p99_write_latency=latency)
    request = io.start(Op.WRITE, 0, 0, [b"w" * 512])
    disk = bench.registry.find("D")
    await bench.rpc("bdev_delay_delete", name="D")
    request.finish()
    with pytest.raises(OSError, match="READ") as caught:
        io.read(0, 512)
    assert caught.value.errno == errno.ENODEV
    await bench.registry.close(disk, bench.reactor)


@pytest.mark.parametrize("latency", [-1, 3600 * 10**6 + 1])
@on_bench()
async def test_a_latency_that_makes_no_sense_is_refused(bench: Bench, latency: int) -> None:
    with pytest.raises(OperationError, match="p99_read_latency"):
        await make(bench, p99_read_latency=latency)
    await make(bench)
    params: dict[str, Any] = {"delay_bdev_name": "D", "latency_type": "avg_read"}
    with pytest.raises(OperationError, match="latency_us"):
        await bench.rpc("bdev_delay_update_latency", **params, latency_us=latency)
    with pytest.raises(OperationError, match="delay bdev 'M'"):
        await bench.rpc(
            "bdev_delay_update_latency",
            delay_bdev_name="M",
            latency_type="avg_read",
            latency_us=1,
        )
    await bench.close("D")
