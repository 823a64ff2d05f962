"""Limits: how much is carried out in which time, in all reactors together."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

import pytest

from bdev.io import BdevIO, Op, Request
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench
from tests.support.waiting import PATIENCE

SLACK = 0.010  # seconds of unused time that a limit keeps, as in bdev/qos.c


async def make(bench: Bench, **limits: int) -> None:
    await bench.rpc("bdev_null_create", name="N", block_size=512, num_blocks=1 << 20)
    if limits:
        await bench.rpc("bdev_set_qos_limit", name="N", **limits)


def start(io: BdevIO, count: int, op: Op = Op.READ, size: int = 512) -> list[Request]:
    return [io.start(op, 0, 0, [bytearray(size)]) for _ in range(count)]


async def now() -> int:
    """Return the time, which is before that of the turns that requests are then started in."""
    time = lib.reactor_ticks()
    await asyncio.sleep(0)  # every reactor of the bench turns
    return time


async def seconds(requests: Sequence[Request], before: int | None = None) -> float:
    """Return how long it takes until all have completed, in the loops that turn meanwhile."""
    before = lib.reactor_ticks() if before is None else before
    for request in requests:
        await asyncio.wait_for(request.completed(), PATIENCE)
    return (lib.reactor_ticks() - before) / lib.reactor_tick_rate()


@on_bench()
async def test_requests_take_the_time_that_the_limit_gives_them(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=2000)
    io = await bench.open("N")
    before = await now()
    took = await seconds(start(io, 100, Op.READ) + start(io, 100, Op.WRITE), before)
    assert 199 / 2000 - SLACK <= took < 5
    await bench.close("N")


@pytest.mark.parametrize(
    ("limit", "op", "limited"),
    [
        ("r_mbytes_per_sec", Op.READ, True),
        ("r_mbytes_per_sec", Op.WRITE, False),
        ("w_mbytes_per_sec", Op.WRITE, True),
        ("w_mbytes_per_sec", Op.READ, False),
        ("rw_mbytes_per_sec", Op.READ, True),
        ("rw_mbytes_per_sec", Op.WRITE, True),
    ],
)
@on_bench()
async def test_bytes_are_limited_by_direction(
    bench: Bench, limit: str, op: Op, limited: bool
) -> None:
    await make(bench, **{limit: 10})
    io = await bench.open("N")
    before = await now()
    requests = start(io, 32, op, 32 << 10)  # 1 MiB: a tenth of a second
    assert all(request.done for request in requests) is not limited
    took = await seconds(requests, before)
    if limited:
        assert took >= 31 / 32 * 0.1 - SLACK
    await bench.close("N")


@on_bench(reactors=2)
async def test_reactors_share_a_limit(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=2000)
    ios = [await bench.open("N", reactor) for reactor in (0, 1)]
    before = await now()
    took = await seconds([request for io in ios for request in start(io, 100)], before)
    assert 199 / 2000 - SLACK <= took < 5
    for reactor in (0, 1):
        await bench.close("N", reactor)


@on_bench()
async def test_a_limit_of_one_holds_back_the_second_request_only(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=1)
    io = await bench.open("N")
    first, second = start(io, 2)
    assert first.done
    io.flush()
    io.selector.select(0.02)
    assert not second.done
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=0)
    assert second.done
    for request in (first, second):
        request.finish()
    await bench.close("N")


@on_bench()
async def test_a_request_larger_than_a_second_goes_at_once_and_is_paid_for(bench: Bench) -> None:
    await make(bench, rw_mbytes_per_sec=1)
    io = await bench.open("N")
    large, next_one = start(io, 1, size=4 << 20) + start(io, 1)
    large.finish()
    io.selector.select(0.02)
    assert not next_one.done
    await bench.rpc("bdev_set_qos_limit", name="N", rw_mbytes_per_sec=1000)
    await seconds([next_one])
    await bench.close("N")


@on_bench()
async def test_limits_that_come_while_requests_run_apply_at_once(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("N")
    assert all(request.done for request in start(io, 50))
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=5)
    requests = start(io, 50)
    assert sum(request.done for request in requests) <= 1
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=1_000_000)
    await seconds(requests)
    await bench.close("N")


@on_bench()
async def test_a_handle_that_is_opened_later_is_limited(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=1)
    io = await bench.open("N")
    requests = start(io, 3)
    assert [request.done for request in requests] == [True, False, False]
    disk = bench.registry.find("N")
    await bench.rpc("bdev_null_delete", name="N")
    for request in requests[1:]:
        with pytest.raises(OSError, match="READ") as caught:
            request.finish()
        assert caught.value.errno == errno.ENODEV
    await bench.registry.close(disk, bench.reactor)


@on_bench()
async def test_a_limit_of_a_base_limits_what_stands_on_it(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=1)
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="N")
    io = await bench.open("P")
    first, second = start(io, 2)
    assert (first.done, second.done) == (True, False)
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=0)
    assert second.done
    await bench.close("P")


@on_bench()
async def test_limits_are_shown_and_saved(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=5, w_mbytes_per_sec=7)
    await bench.rpc("bdev_set_qos_limit", name="N", r_mbytes_per_sec=9)
    limits = {
        "rw_ios_per_sec": 5,
        "rw_mbytes_per_sec": 0,
        "r_mbytes_per_sec": 9,
        "w_mbytes_per_sec": 7,
    }
    assert (await bench.rpc("bdev_get_bdevs", name="N"))[0]["assigned_rate_limits"] == limits
    call = {"method": "bdev_set_qos_limit", "params": {"name": "N", **limits}}
    assert bench.registry.config()[1:] == [call]
    await bench.rpc("bdev_set_qos_limit", **dict.fromkeys(limits, 0), name="N")
    assert len(bench.registry.config()) == 1


@on_bench()
async def test_nonsense_is_refused(bench: Bench) -> None:
    await make(bench)
    for limits, message in (({"rw_ios_per_sec": -1}, "rw_ios_per_sec -1"), ({}, "no limit")):
        with pytest.raises(OperationError, match=message):
            await bench.rpc("bdev_set_qos_limit", name="N", **limits)
    with pytest.raises(OperationError, match="w_mbytes_per_sec"):
        await bench.rpc("bdev_set_qos_limit", name="N", w_mbytes_per_sec=1 << 50)


@on_bench(reactors=2)
async def test_the_rate_is_exact_over_a_second(bench: Bench) -> None:
    """No more than it says, to 2 %; how late it may be is the machine's affair."""
    rate = 5000
    await make(bench, rw_ios_per_sec=rate)
    ios = [await bench.open("N", reactor) for reactor in (0, 1)]
    before = await now()
    took = await seconds([request for io in ios for request in start(io, 3000)], before)
    assert took >= 6000 / rate / 1.02
    for reactor in (0, 1):
        await bench.close("N", reactor)


@on_bench()
async def test_a_disk_whose_limits_are_lifted_is_as_one_without(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=1)
    assert "limits" in bench.registry.find("N").shares
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=0)
    assert bench.registry.find("N").shares == {}


@on_bench()
async def test_a_burst_goes_at_once(bench: Bench) -> None:
    await make(bench, rw_ios_per_sec=100, rw_ios_burst=20)
    io = await bench.open("N")
    await asyncio.sleep(0.25)  # in which 20 were saved up, and more
    requests = start(io, 60)
    assert 20 <= sum(request.done for request in requests) <= 40
    (entry,) = await bench.rpc("bdev_get_bdevs", name="N")
    assert entry["assigned_rate_limits"]["rw_ios_burst"] == 20
    await bench.rpc("bdev_set_qos_limit", name="N", rw_ios_per_sec=0)
    await seconds(requests)
    await bench.close("N")


async def make_group(bench: Bench, *, rate: int) -> list[BdevIO]:
    """Create disks A and B in group G, and open them in a reactor each."""
    await bench.rpc("bdev_qos_group_create", name="G", rw_ios_per_sec=rate)
    for name in ("A", "B"):
        await bench.rpc("bdev_null_create", name=name, block_size=512, num_blocks=1 << 20)
        await bench.rpc("bdev_qos_group_add_bdev", name="G", bdev_name=name)
    return [await bench.open(name, reactor) for reactor, name in enumerate("AB")]


@on_bench(reactors=2)
async def test_a_group_shares_its_limit_fairly(bench: Bench) -> None:
    ios = await make_group(bench, rate=2000)
    hog, modest = start(ios[0], 1000), start(ios[1], 100)
    await seconds(modest)
    # A share each: the others wait, although they were first. Exactly: test_qos_rate.py.
    assert 50 <= sum(request.done for request in hog) <= 250
    await bench.rpc("bdev_qos_group_set_limit", name="G", rw_ios_per_sec=0)
    await seconds(hog)
    for reactor, name in enumerate("AB"):
        await bench.close(name, reactor)


@on_bench(reactors=2)
async def test_who_leaves_a_group_is_limited_no_more(bench: Bench) -> None:
    ios = await make_group(bench, rate=1)
    requests = start(ios[0], 5)
    assert not all(request.done for request in requests)
    await bench.rpc("bdev_qos_group_remove_bdev", name="G", bdev_name="A")
    assert all(request.done for request in requests)
    for reactor, name in enumerate("AB"):
        await bench.close(name, reactor)
    await bench.rpc("bdev_null_delete", name="B")
    assert (await bench.rpc("bdev_qos_get_groups"))[0]["bdevs"] == []
    await bench.rpc("bdev_qos_group_delete", name="G")


@on_bench(reactors=2)
async def test_groups_are_saved_after_their_devices(bench: Bench) -> None:
    await make_group(bench, rate=7)
    methods = [call["method"] for call in bench.registry.config()]
    assert methods == [
        *["bdev_null_create"] * 2,
        "bdev_qos_group_create",
        *["bdev_qos_group_add_bdev"] * 2,
    ]
    assert bench.registry.config()[2]["params"]["rw_ios_per_sec"] == 7
    for reactor, name in enumerate("AB"):
        await bench.close(name, reactor)


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("bdev_qos_group_create", {"rw_ios_per_sec": 1}, errno.EEXIST, "group 'G'"),
        ("bdev_qos_group_set_limit", {}, errno.EINVAL, "no limit given"),
        ("bdev_qos_group_delete", {}, errno.EBUSY, "has devices: A, B"),
        ("bdev_qos_group_add_bdev", {"bdev_name": "A"}, errno.EBUSY, "is in QoS group G"),
        ("bdev_qos_group_remove_bdev", {"bdev_name": "C"}, errno.ENODEV, "'C'"),
    ],
)
@on_bench(reactors=2)
async def test_groups_refuse_nonsense(
    bench: Bench, method: str, params: dict, code: int, message: str
) -> None:
    await make_group(bench, rate=1)
    with pytest.raises(OperationError, match=message) as caught:
        await bench.rpc(method, name="G", **params)
    assert caught.value.code == -code
    for reactor, name in enumerate("AB"):
        await bench.close(name, reactor)
