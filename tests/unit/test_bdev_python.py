"""Python devices: what a class does wrong costs the request, or its process, and nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bdev import python, python_process
from bdev.io import BdevIO, Op, Request
from bdev.kind import OperationError
from bdev.python import PythonBdev
from tests.support.bdevs import Bench, on_bench
from tests.support.conformance import outcome
from tests.support.waiting import PATIENCE, until

BLOCK = 512


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "GRACE", 0.2)
    monkeypatch.setattr(python_process, "PING_PERIOD", 0.2)


async def make(bench: Bench, device: str, name: str = "Y", **params: Any) -> BdevIO:
    bench.cluster.modules = ["tests.support.devices"]
    await bench.rpc("bdev_python_create", name=name, device=device, **params)
    return await bench.open(name)


def read(io: BdevIO, block: int, count: int = 1) -> Request:
    return io.start(Op.READ, block * BLOCK, 0, [bytearray(count * BLOCK)])


def process_of(bench: Bench, name: str = "Y") -> PythonBdev:
    bdev = bench.registry.find(name)
    assert isinstance(bdev, PythonBdev)
    return bdev


async def replaced(bdev: PythonBdev, pid: int | None) -> None:
    """Wait for another process than ``pid``."""
    await until(lambda: bdev.host.pid != pid)


async def until_it_answers(io: BdevIO) -> None:
    """Return once the process that is starting serves requests: they may time out before."""
    async with asyncio.timeout(PATIENCE):
        while await outcome(read(io, 20)) != 0:
            pass


@on_bench()
async def test_a_request_that_goes_wrong_fails_alone(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    io = await make(bench, "faulty", timeout=0.2)
    wrong = {
        10: errno.ENXIO,  # as it was raised
        11: errno.EIO,  # any other exception
        12: errno.EIO,  # too little
        13: errno.EIO,  # not bytes
        14: errno.ETIMEDOUT,  # never answers
    }
    requests = {block: read(io, block) for block in (*wrong, 20)}
    assert {b: await outcome(r) for b, r in requests.items()} == {**wrong, 20: 0}
    assert process_of(bench).host.restarts == 0
    logged = capfd.readouterr().err
    assert "ZeroDivisionError: a mistake" in logged or "failure 2" in logged
    await bench.close("Y")


@on_bench()
async def test_a_class_that_blocks_is_killed_and_hurts_nobody_else(bench: Bench) -> None:
    io = await make(bench, "harmful", timeout=0.2)
    other = await make(bench, "ramp", "Z", args={"blocks": 8})
    before = process_of(bench).host.pid
    stuck = read(io, 10)
    waiting = [read(io, 20) for _ in range(100)]  # more than there are slots
    assert await outcome(read(other, 3)) == 0
    assert await outcome(stuck) == errno.ETIMEDOUT
    assert {await outcome(request) for request in waiting} <= {0, errno.ETIMEDOUT}
    await replaced(process_of(bench), before)
    await until_it_answers(io)
    for name in ("Y", "Z"):
        await bench.close(name)


@on_bench()
async def test_a_request_that_ends_the_process_does_so_until_it_has_timed_out(
    bench: Bench,
) -> None:
    io = await make(bench, "harmful", timeout=1.0)
    assert await outcome(read(io, 11)) == errno.ETIMEDOUT
    host = process_of(bench).host
    assert host.restarts >= 1
    await until_it_answers(io)  # it may be about to die of the request once more
    await bench.close("Y")


@on_bench()
async def test_what_was_in_flight_is_done_again_when_the_process_dies(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "contents"
    path.touch()
    io = await make(bench, "memory", args={"blocks": 256, "path": str(path)})
    bdev = process_of(bench)
    pid = bdev.host.pid
    assert pid is not None
    data = os.urandom(256 * BLOCK)
    writes = [
        io.start(Op.WRITE, i * BLOCK, 0, [data[i * BLOCK : (i + 1) * BLOCK]]) for i in range(256)
    ]
    os.kill(pid, signal.SIGKILL)
    assert {await outcome(write) for write in writes} == {0}
    assert path.read_bytes() == data
    await replaced(bdev, pid)
    await bench.close("Y")


@on_bench()
async def test_a_method_that_will_not_be_cancelled_keeps_nothing_but_its_place(
    bench: Bench,
) -> None:
    io = await make(bench, "harmful", timeout=0.2)
    assert await outcome(read(io, 12)) == errno.ETIMEDOUT
    assert {await outcome(read(io, block)) for block in range(20, 120)} == {0}
    pid = process_of(bench).host.pid
    await bench.close("Y")  # which ends it by force
    await replaced(process_of(bench), pid)


@on_bench()
async def test_what_a_dead_reactor_had_asked_for_is_cancelled_before_another_takes_over(
    bench: Bench,
) -> None:
    io = await make(bench, "slow", timeout=60)
    write = io.start(Op.WRITE, 0, 0, [b"x" * BLOCK])
    assert await outcome(read(io, 0)) == 0  # it was asked for later, so the write has begun
    async with asyncio.timeout(PATIENCE):
        await bench.registry.reactor_lost(bench.reactor)
    assert await outcome(write) == errno.ECANCELED  # nobody would see that of one that is dead


@on_bench()
async def test_pieces_of_a_large_request_are_put_together(bench: Bench) -> None:
    io = await make(bench, "ramp", args={"blocks": 4096})
    whole = bytearray(4000 * BLOCK)
    await io.start(Op.READ, 7 * BLOCK, 0, [whole]).completed()
    assert whole == b"".join(bytes([block % 251]) * BLOCK for block in range(7, 4007))
    await bench.close("Y")


@on_bench()
async def test_a_new_size_is_seen_by_a_rescan(bench: Bench) -> None:
    io = await make(bench, "growing")
    assert await outcome(read(io, 100)) == errno.ERANGE
    assert await outcome(read(io, 0)) == 0  # it grows
    await bench.rpc("bdev_python_rescan", name="Y")
    assert await outcome(read(io, 100)) == 0
    await bench.close("Y")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"device": "none"}, "device 'none' is not registered"),
        ({"device": "memory"}, "missing 1 required positional argument: 'blocks'"),
        ({"device": "memory", "args": {"blocks": 0}}, "num_blocks 0: must be 1 or more"),
        ({"device": "memory", "args": {"blocks": 8, "block_size": 513}}, "block_size 513"),
        ({"device": "shapeless"}, "size and block_size must be numbers"),
        ({"device": "unreadable"}, "has no method read"),
        ({"device": "ramp", "args": {"blocks": 8}, "timeout": 0}, "timeout 0: must be more than 0"),
        ({"device": "ramp", "args": {"blocks": "x" * 70000}}, "args: have"),
    ],
)
def test_what_cannot_be_a_device_is_refused(params: dict[str, Any], text: str) -> None:
    @on_bench()
    async def refused(bench: Bench) -> None:
        with pytest.raises(OperationError, match=text):
            await make(bench, **params)
        assert list(bench.registry) == []

    refused()


@on_bench()
async def test_a_module_that_cannot_be_imported_is_refused(bench: Bench) -> None:
    bench.cluster.modules = ["tests.support.no_such_module"]
    with pytest.raises(OperationError, match="its process has ended; its log says why"):
        await bench.rpc("bdev_python_create", name="Y", device="ramp")
    assert list(bench.registry) == []


@on_bench()
async def test_a_saved_device_comes_back(bench: Bench) -> None:
    io = await make(bench, "ramp", args={"blocks": 64}, timeout=7)
    before = await bench.rpc("bdev_get_bdevs")
    calls = bench.registry.config()
    await bench.close("Y")
    await bench.rpc("bdev_python_delete", name="Y")
    for call in calls:
        await bench.rpc(call["method"], **call["params"])
    after = await bench.rpc("bdev_get_bdevs")
    for (entry,) in (before, after):
        assert entry["driver_specific"]["python"].pop("pid") > 0
    assert after == before
    assert io is not None


@on_bench()
async def test_what_the_class_has_not_begun_is_aborted(bench: Bench) -> None:
    io = await make(bench, "faulty", timeout=1)
    asked = read(io, 20)
    waiting = [read(io, 20) for _ in range(100)]
    assert asked.abort()
    assert waiting[-1].abort()
    assert await outcome(asked) == await outcome(waiting.pop()) == errno.ECANCELED
    assert {await outcome(request) for request in waiting} == {0}
    begun = read(io, 14)  # never answers
    assert await outcome(read(io, 20)) == 0
    assert not begun.abort()
    assert await outcome(begun) == errno.ETIMEDOUT
    await bench.close("Y")
