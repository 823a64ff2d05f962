"""Latency histograms and percentiles, and counting afresh."""

from __future__ import annotations

import asyncio
import base64
import errno
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdev.histogram import Histogram, bucket_end
from bdev.kind import Op
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench

MICROSECONDS = {
    "avg_read_latency": 1000,
    "p99_read_latency": 1000,
    "avg_write_latency": 5000,
    "p99_write_latency": 5000,
}


@given(ticks=st.integers(1, 2**40 - 1))
def test_a_bucket_is_an_eighth_of_its_value_wide(ticks: int) -> None:
    bucket = lib.bdev_histogram_bucket(ticks)
    assert ticks <= bucket_end(bucket) < ticks * 9 / 8 + 1
    assert bucket == 0 or bucket_end(bucket - 1) < ticks


@given(ticks=st.integers(2**40 - 1, 2**64 - 1))
def test_what_is_too_long_is_in_the_last_bucket(ticks: int) -> None:
    assert lib.bdev_histogram_bucket(ticks) == lib.BDEV_HISTOGRAM_BUCKETS - 1


@given(
    latencies=st.lists(st.integers(1, 10**9), min_size=1, max_size=200),
    percent=st.sampled_from([1, 50, 90, 99, 100]),
)
def test_a_percentile_is_at_most_an_eighth_too_long(latencies: list[int], percent: float) -> None:
    histogram = Histogram()
    for latency in latencies:
        histogram.counts[lib.bdev_histogram_bucket(latency)] += 1
    exact = sorted(latencies)[max(0, -(-len(latencies) * int(percent) // 100) - 1)]
    assert exact <= histogram.percentile(percent) < exact * 9 / 8 + 1


async def slow_disk(bench: Bench) -> None:
    """Create D: reads take 1 ms, writes 5 ms, at least."""
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_delay_create", name="D", base_bdev_name="M", **MICROSECONDS)


def decode(reply: dict[str, Any]) -> list[int]:
    """Return the counts, as SPDK's own script reads them."""
    raw = base64.b64decode(reply["histogram"])
    ranges = reply["max_range"] - reply["min_range"] + 1
    assert len(raw) == 8 * (ranges << reply["granularity"])
    return list(struct.unpack(f"<{len(raw) // 8}Q", raw))


@on_bench(reactors=2)
async def test_every_operation_is_in_its_histogram(bench: Bench) -> None:
    await slow_disk(bench)
    for reactor in (0, 1):
        io = await bench.open("D", reactor)
        for _ in range(3):
            io.read(0, 512)
        io.write(0, bytes(512))
        io.flush()
    ((entry),) = await bench.rpc("bdev_get_latency", name="D", percentiles=[50, 99.9])
    read, write = entry["operations"]["read"], entry["operations"]["write"]
    assert (read["count"], write["count"]) == (6, 2)
    assert set(entry["operations"]) == {"read", "write", "flush"}
    for found, least in ((read, 1000), (write, 5000)):
        assert least * 0.99 <= found["min_us"] <= found["mean_us"] <= found["max_us"]
        assert found["min_us"] <= found["percentiles_us"]["50"]
        assert found["percentiles_us"]["99.9"] <= found["max_us"] * 9 / 8
    for reactor in (0, 1):
        await bench.close("D", reactor)


@on_bench()
async def test_a_histogram_begins_when_it_is_enabled(bench: Bench) -> None:
    await slow_disk(bench)
    io = await bench.open("D")
    io.read(0, 512)
    with pytest.raises(OperationError, match="bdev_enable_histogram"):
        await bench.rpc("bdev_get_histogram", name="D")
    await bench.rpc("bdev_enable_histogram", name="D", enable=True)
    io.read(0, 512)
    io.write(0, bytes(512))
    reply = await bench.rpc("bdev_get_histogram", name="D")
    assert sum(decode(reply)) == 2
    assert sum(decode(reply)[: lib.bdev_histogram_bucket(reply["tsc_rate"] // 1000)]) == 0
    await bench.rpc("bdev_enable_histogram", name="D", enable=True, opc="write")
    io.read(0, 512)
    io.write(0, bytes(512))
    assert sum(decode(await bench.rpc("bdev_get_histogram", name="D"))) == 1
    await bench.rpc("bdev_enable_histogram", name="D", enable=False)
    with pytest.raises(OperationError):
        await bench.rpc("bdev_get_histogram", name="D")
    await bench.close("D")


@on_bench()
async def test_what_a_reactor_counted_outlives_it(bench: Bench) -> None:
    await slow_disk(bench)
    (await bench.open("D")).read(0, 512)
    await bench.reactor.stop()
    await bench.registry.reactor_lost(bench.reactor)
    bench.reactor.start()
    (await bench.open("D")).read(0, 512)
    (entry,) = await bench.rpc("bdev_get_latency", name="D")
    assert entry["operations"]["read"]["count"] == 2
    assert (await bench.rpc("bdev_get_iostat", name="D"))["bdevs"][0]["num_read_ops"] == 2
    await bench.close("D")


@pytest.mark.parametrize("mode", ["all", "maxmin", "none", "error"])
@on_bench()
async def test_counting_begins_afresh(bench: Bench, mode: str) -> None:
    await slow_disk(bench)
    io = await bench.open("D")
    io.read(0, 512)
    await bench.rpc("bdev_reset_iostat", name="D", mode=mode)
    (entry,) = (await bench.rpc("bdev_get_iostat", name="D"))["bdevs"]
    (latency,) = await bench.rpc("bdev_get_latency", name="D")
    assert entry["num_read_ops"] == (0 if mode == "all" else 1)
    assert bool(entry["max_read_latency_ticks"]) == (mode in ("none", "error"))
    assert bool(latency["operations"]) == (mode != "all")
    io.read(0, 512)
    (entry,) = (await bench.rpc("bdev_get_iostat", name="D"))["bdevs"]
    assert entry["num_read_ops"] == (1 if mode == "all" else 2)
    assert entry["min_read_latency_ticks"] > 0
    await bench.close("D")


@on_bench()
async def test_a_device_of_the_same_slot_begins_at_nothing(bench: Bench) -> None:
    await slow_disk(bench)
    (await bench.open("D")).read(0, 512)
    await bench.close("D")
    await bench.rpc("bdev_delay_delete", name="D")
    await bench.rpc("bdev_null_create", name="D", block_size=512, num_blocks=8)
    (entry,) = await bench.rpc("bdev_get_latency", name="D")
    assert entry["operations"] == {}
    assert (await bench.rpc("bdev_get_iostat", name="D"))["bdevs"][0]["num_read_ops"] == 0


@on_bench()
async def test_requests_in_flight_are_the_queue_depth(bench: Bench) -> None:
    await slow_disk(bench)
    io = await bench.open("D")
    requests = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(4)]
    assert (await bench.rpc("bdev_get_iostat", name="D"))["bdevs"][0]["queue_depth"] == 4
    for request in requests:
        request.finish()
    await bench.close("D")


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("bdev_enable_histogram", {"enable": True, "granularity": 9}, "granularity 9"),
        ("bdev_enable_histogram", {"enable": True, "min_nsec": 5}, "min_nsec 5"),
        ("bdev_get_histogram_borders", {"borders": []}, "borders"),
        ("bdev_get_histogram_borders", {"borders": [5, 5]}, "ascending"),
        ("bdev_set_qd_sampling_period", {"period": -1}, "period -1"),
        ("bdev_set_qd_sampling_period", {"period": 1 << 60}, "period 1152921504606846976"),
        ("bdev_get_latency", {"percentiles": [0]}, "percentiles 0"),
        ("bdev_get_latency", {"percentiles": [101]}, "percentiles 101"),
    ],
)
@on_bench()
async def test_nonsense_is_refused(bench: Bench, method: str, params: dict, message: str) -> None:
    await slow_disk(bench)
    with pytest.raises(OperationError, match=message) as caught:
        await bench.rpc(method, name="D", **params)
    assert caught.value.code == -errno.EINVAL


@given(ticks=st.integers(1, 2**40 - 2**37))
def test_spdks_script_finds_a_latency_between_the_borders_that_it_prints(ticks: int) -> None:
    """Range i of its ranges begins at 2^(granularity + i - 1), and has equal buckets."""
    histogram = Histogram()
    histogram.counts[lib.bdev_histogram_bucket(ticks)] += 1
    reply = histogram.to_wire()
    index, granularity = decode(reply).index(1), reply["granularity"]
    which, bucket = index >> granularity, index % (1 << granularity)
    width = 1 << max(which - 1, 0)
    first = (1 << (granularity + which - 1) if which else 0) + bucket * width
    assert reply["min_range"] == 0
    assert which <= reply["max_range"]
    assert first <= ticks < first + width


@on_bench()
async def test_borders_divide_a_histogram(bench: Bench) -> None:
    await slow_disk(bench)
    io = await bench.open("D")
    with pytest.raises(OperationError, match="bdev_enable_histogram"):
        await bench.rpc("bdev_get_histogram_borders", name="D", borders=[1])
    await bench.rpc("bdev_enable_histogram", name="D", enable=True)
    for _ in range(3):
        io.read(0, 512)
    io.write(0, bytes(512))
    reply = await bench.rpc("bdev_get_histogram_borders", name="D", borders=[800, 60_000_000])
    assert reply == {"borders_count": [0, 4, 4]}
    await bench.close("D")


async def iostat(bench: Bench, name: str) -> dict[str, Any]:
    (entry,) = (await bench.rpc("bdev_get_iostat", name=name))["bdevs"]
    return dict(entry)


@on_bench()
async def test_queue_depths_are_sampled(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_error_create", base_name="M")
    pending = {"io_type": "read", "error_type": "pending", "num": 4}
    await bench.rpc("bdev_error_inject_error", name="EE_M", **pending)
    assert "queue_depth_polling_period" not in await iostat(bench, "EE_M")
    io = await bench.open("EE_M")
    began = lib.reactor_ticks()
    await bench.rpc("bdev_set_qd_sampling_period", name="EE_M", period=10)
    requests = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(4)]
    async with asyncio.timeout(10):
        while (await iostat(bench, "EE_M"))["io_time"] < 5000:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    await asyncio.gather(*(request.completed() for request in requests))
    entry = await iostat(bench, "EE_M")
    took = (lib.reactor_ticks() - began) / lib.reactor_tick_rate() * 1e6
    assert (entry["queue_depth_polling_period"], entry["queue_depth"]) == (10, 0)
    assert entry["io_time"] <= took
    assert entry["weighted_io_time"] == pytest.approx(4 * entry["io_time"], abs=4)
    saved = {"name": "EE_M", "period": 10}
    assert bench.registry.config()[-1] == {"method": "bdev_set_qd_sampling_period", "params": saved}
    await bench.rpc("bdev_set_qd_sampling_period", name="EE_M", period=0)
    assert "io_time" not in await iostat(bench, "EE_M")
    await bench.close("EE_M")


@on_bench()
async def test_sampling_ends_with_its_device(bench: Bench) -> None:
    await slow_disk(bench)
    await bench.rpc("bdev_set_qd_sampling_period", name="D", period=1000)
    await bench.rpc("bdev_delay_delete", name="D")
    await asyncio.sleep(0.005)  # in which a sampler that was left would fail
    assert all("sampling" not in call["method"] for call in bench.registry.config())
