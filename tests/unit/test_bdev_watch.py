"""Requests that take too long: remembered, reported, aborted."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from bdev.io import BdevIO, Op, Request
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench

LATENCY = dict.fromkeys(
    ["avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency"], 3000
)


SWAPS = (Op.COMPARE, Op.COMPARE_AND_WRITE)


async def hang(bench: Bench, *above: str, io_type: str = "all") -> BdevIO:
    """Open an error device, or what stands on it, whose requests hang."""
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_error_create", base_name="M")
    top = "EE_M"
    for kind in above:
        if kind == "passthru":
            await bench.rpc("bdev_passthru_create", name="P", base_bdev_name=top)
            top = "P"
        if kind == "raid":
            await bench.rpc("bdev_malloc_create", name="N", block_size=512, num_blocks=2048)
            names = [top, "N"]
            await bench.rpc(
                "bdev_raid_create", name="R", raid_level="0", strip_size_kb=4, base_bdevs=names
            )
            top = "R"
    await bench.rpc(
        "bdev_error_inject_error", name="EE_M", io_type=io_type, error_type="pending", num=1000
    )
    return await bench.open(top)


async def end(request: Request) -> int:
    try:
        await asyncio.wait_for(request.completed(), 20)
    except OSError as error:
        return error.errno or -1
    return 0


async def relay(bench: Bench) -> None:
    """Bring what reactors have said to the control process."""
    for reactor in bench.cluster.reactors:
        for op, args in reactor.told:
            await bench.operations.invoke(op, args)
        reactor.told.clear()


@on_bench(reactors=2)
async def test_slow_requests_are_remembered(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_delay_create", name="D", base_bdev_name="N", **LATENCY)
    first, second = await bench.open("D", 0), await bench.open("D", 1)
    first.read(512, 512)  # before anybody asked
    await bench.rpc("bdev_set_slow_request_limit", name="D", limit_us=2000)
    first.write(1024, bytes(2048))
    request = second.start(Op.READ, 4096, 0, [bytearray(512)])
    await asyncio.sleep(0.01)
    request.finish()
    slow = await bench.rpc("bdev_get_slow_requests", name="D")
    found = {(one["reactor"], one["operation"], one["offset"], one["length"]) for one in slow}
    assert found == {("reactor-0", "write", 1024, 2048), ("reactor-1", "read", 4096, 512)}
    for one in slow:
        assert one["age_us"] >= 2900
        assert (one["state"], one["stage"], one["status"]) == ("ended", "device", 0)
    await bench.rpc("bdev_set_slow_request_limit", name="D", limit_us=0)
    assert await bench.rpc("bdev_get_slow_requests", name="D") == []
    for reactor in (0, 1):
        await bench.close("D", reactor)


@on_bench()
async def test_only_the_slow_ones_are(bench: Bench) -> None:
    io = await hang(bench, io_type="write")
    await bench.rpc("bdev_set_slow_request_limit", name="EE_M", limit_us=5_000_000)
    io.read(0, 512)
    assert await bench.rpc("bdev_get_slow_requests", name="EE_M") == []
    await bench.close("EE_M")


@on_bench()
async def test_it_tells_where_a_request_is(bench: Bench) -> None:
    io = await hang(bench, io_type="write")
    await bench.registry.use_ranges(bench.registry.find("EE_M"))
    await bench.rpc("bdev_set_slow_request_limit", name="EE_M", limit_us=1)
    swap = io.start(Op.COMPARE_AND_WRITE, 0, buffers=[bytes(512), bytes(512)])
    held = io.start(Op.WRITE, 0, buffers=[bytes(512)])
    device = io.start(Op.WRITE, 512, buffers=[bytes(512)])
    await bench.rpc("bdev_set_qos_limit", name="EE_M", rw_ios_per_sec=1)
    io.start(Op.READ, 512, buffers=[bytearray(512)]).finish()
    limited = io.start(Op.READ, 512, buffers=[bytearray(512)])
    await asyncio.sleep(0.001)
    slow = await bench.rpc("bdev_get_slow_requests", name="EE_M")
    stages = [one["stage"] for one in slow if one["state"] == "in_flight"]
    assert sorted(stages) == ["device", "limits", "parts", "range"]
    await bench.rpc("bdev_set_qos_limit", name="EE_M", rw_ios_per_sec=0)
    await bench.rpc("bdev_error_inject_error", name="EE_M", io_type="clear")
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    assert [await end(one) for one in (swap, held, device, limited)] == [0] * 4
    await bench.close("EE_M")


@on_bench()
async def test_a_timeout_is_reported_once_for_each_request(bench: Bench) -> None:
    told: list[tuple[str, str, dict[str, Any]]] = []
    bench.registry.notify = lambda what, ctx, /, **rest: told.append((what, ctx, rest))
    io = await hang(bench)
    await bench.rpc("bdev_set_timeout", name="EE_M", timeout_us=1000)
    requests = [io.start(Op.READ, n * 512, 0, [bytearray(512)]) for n in (4, 5)]
    for _ in range(30):
        await asyncio.sleep(0.001)
    await relay(bench)
    reports = [(ctx, rest["text"]) for kind, ctx, rest in told if kind == "bdev_timeout"]
    assert [ctx for ctx, _ in reports] == ["EE_M", "EE_M"]
    assert "READ of 512 bytes at 2048: not completed after" in reports[0][1]
    assert "(device)" in reports[0][1]
    (timeouts,) = await bench.rpc("bdev_get_timeouts", name="EE_M")
    assert (timeouts["timeouts"], timeouts["action"]) == (2, "report")
    assert not any(request.done for request in requests)
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    assert [await end(request) for request in requests] == [0, 0]
    await bench.close("EE_M")


@pytest.mark.parametrize("op", [op for op in Op if op is not Op.RESET])
@on_bench()
async def test_a_report_names_the_operation(bench: Bench, op: Op) -> None:
    io = await hang(bench)
    await bench.registry.use_ranges(bench.registry.find("EE_M"))
    await bench.rpc("bdev_set_timeout", name="EE_M", timeout_us=1000)
    told: list[str] = []
    bench.registry.notify = lambda *_, **rest: told.append(rest["text"])
    buffers = [bytearray(1024)] if op in (Op.READ, Op.WRITE, *SWAPS) else []
    request = io.start(op, 0, 0 if buffers else 512, buffers, source=1024)
    while not told:
        await asyncio.sleep(0.001)
        await relay(bench)
    assert told[0].startswith(f"{op.name} of ")
    await bench.rpc("bdev_error_inject_error", name="EE_M", io_type="clear")
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    await end(request)
    await bench.close("EE_M")


@pytest.mark.parametrize("above", [(), ("passthru",), ("passthru", "raid")])
@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.FLUSH])
@on_bench()
async def test_a_timeout_aborts(bench: Bench, above: tuple[str, ...], op: Op) -> None:
    io = await hang(bench, *above)
    top = next(iter(reversed(list(bench.registry)))).name if above else "EE_M"
    await bench.rpc("bdev_set_timeout", name=top, timeout_us=1000, action="abort")
    buffers = [bytearray(16384)] if op is not Op.FLUSH else []
    assert await end(io.start(op, 0, 0, buffers)) == errno.ECANCELED
    (entry,) = (await bench.rpc("bdev_get_iostat", name=top))["bdevs"]
    assert entry["queue_depth"] == 0
    await bench.close(top)


@on_bench()
async def test_what_waits_for_limits_is_aborted_and_the_next_goes_on(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=1)
    await bench.rpc("bdev_set_timeout", name="N", timeout_us=1000, action="abort")
    io = await bench.open("N")
    requests = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(4)]
    outcomes = [await end(request) for request in requests]
    assert outcomes == [0, errno.ECANCELED, errno.ECANCELED, errno.ECANCELED]
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=0)
    io.read(0, 512)
    await bench.close("N")


@on_bench(reactors=2)
async def test_what_waits_for_a_range_is_aborted(bench: Bench) -> None:
    io = await hang(bench, io_type="read")
    await bench.registry.use_ranges(bench.registry.find("EE_M"))
    holder = io.start(Op.COMPARE_AND_WRITE, 0, buffers=[bytes(512), bytes(512)])
    await bench.rpc("bdev_set_timeout", name="EE_M", timeout_us=1000, action="abort")
    assert await end(io.start(Op.WRITE, 0, buffers=[bytes(512)])) == errno.ECANCELED
    assert not holder.done  # it had begun before
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    assert await end(holder) == 0
    parts = io.start(Op.COMPARE, 0, buffers=[bytes(512)])
    assert await end(parts) == errno.ECANCELED
    await bench.close("EE_M")


@on_bench()
async def test_handles_that_are_opened_later_are_watched(bench: Bench) -> None:
    io = await hang(bench)
    await bench.close("EE_M")
    await bench.rpc("bdev_set_timeout", name="EE_M", timeout_us=1000, action="abort")
    io = await bench.open("EE_M")
    assert await end(io.start(Op.READ, 0, 0, [bytearray(512)])) == errno.ECANCELED
    calls = bench.registry.config()
    assert calls[-1]["method"] == "bdev_set_timeout"
    assert calls[-1]["params"] == {"name": "EE_M", "timeout_us": 1000, "action": "abort"}
    await bench.close("EE_M")


@on_bench()
async def test_a_watch_that_ends_leaves_requests_alone(bench: Bench) -> None:
    io = await hang(bench)
    await bench.rpc("bdev_set_timeout", name="EE_M", timeout_us=3_600_000_000)
    request = io.start(Op.READ, 0, 0, [bytearray(512)])
    await bench.rpc("bdev_set_timeout", name="EE_M", timeout_us=0)
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    assert await end(request) == 0
    await bench.close("EE_M")


@pytest.mark.parametrize("limit", [-1, 3600 * 10**6 + 1])
@on_bench()
async def test_a_limit_that_is_none_is_refused(bench: Bench, limit: int) -> None:
    await hang(bench)
    for method, name in (
        ("bdev_set_timeout", "timeout_us"),
        ("bdev_set_slow_request_limit", "limit_us"),
    ):
        with pytest.raises(OperationError, match=f"{name} {limit}: must be 0"):
            await bench.rpc(method, name="EE_M", **{name: limit})
    await bench.close("EE_M")


@on_bench()
async def test_no_more_are_kept_than_there_is_room_for(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", block_size=512, num_blocks=2048)
    await bench.rpc("bdev_delay_create", name="D", base_bdev_name="N", **LATENCY)
    await bench.rpc("bdev_set_slow_request_limit", name="D", limit_us=1)
    io = await bench.open("D")
    count = lib.BDEV_SLOW_KEPT + 9
    requests = [io.start(Op.READ, n * 512, 0, [bytearray(512)]) for n in range(count)]
    for request in requests:
        request.finish()
    slow = await bench.rpc("bdev_get_slow_requests", name="D")
    assert len({one["offset"] for one in slow}) == lib.BDEV_SLOW_KEPT
    await bench.close("D")
