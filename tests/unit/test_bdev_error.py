"""Faults that are asked for: which requests are hit, how, and what becomes of them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest

from bdev.io import BdevIO, Op, Request
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench

BLOCKS = 256


async def make(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=BLOCKS)
    await bench.rpc("bdev_error_create", base_name="M")


async def inject(bench: Bench, io_type: str, error_type: str = "failure", **params: Any) -> None:
    await bench.rpc(
        "bdev_error_inject_error", name="EE_M", io_type=io_type, error_type=error_type, **params
    )


def fails(io: Callable[[], object]) -> int:
    """Return the errno that a request fails with; 0 if it does not."""
    try:
        io()
    except OSError as error:
        return error.errno or -1
    return 0


def write(io: BdevIO, block: int, data: bytes) -> Request:
    return io.start(Op.WRITE, block * 512, 0, [data])


@on_bench()
async def test_without_rules_everything_goes_through(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    io.write(512, b"x" * 512)
    io.flush()
    io.reset()
    assert io.read(512, 512) == b"x" * 512
    await bench.close("EE_M")


@on_bench()
async def test_so_many_of_a_type_fail_and_no_more(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "read", num=2)
    io.write(0, bytes(512))
    assert [fails(lambda: io.read(0, 512)) for _ in range(4)] == [errno.EIO, errno.EIO, 0, 0]
    await bench.close("EE_M")


@on_bench(reactors=2)
async def test_reactors_count_together(bench: Bench) -> None:
    await make(bench)
    ios = [await bench.open("EE_M", reactor) for reactor in (0, 1)]
    await inject(bench, "write", num=3)
    outcomes = [fails(lambda io=io: io.write(0, bytes(512))) for _ in range(3) for io in ios]
    assert outcomes == [errno.EIO] * 3 + [0] * 3
    for reactor in (0, 1):
        await bench.close("EE_M", reactor)


@on_bench()
async def test_a_write_that_fails_changes_nothing(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    io.write(0, b"a" * 512)
    await inject(bench, "all")
    assert fails(lambda: io.write(0, b"b" * 512)) == errno.EIO
    assert fails(lambda: io.unmap(0, 512)) == errno.EIO
    assert fails(lambda: io.write_zeroes(0, 512)) == errno.EIO
    assert fails(io.flush) == errno.EIO
    assert fails(lambda: io.read(0, 512)) == errno.EIO
    assert io.read(0, 512) == b"a" * 512
    await bench.close("EE_M")


@on_bench()
async def test_clear_ends_it(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "all", num=100)
    await inject(bench, "clear")
    io.read(0, 512)
    await bench.close("EE_M")


@on_bench()
async def test_a_rate_hits_about_so_many(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "read", rate=25.0)
    hit = sum(fails(lambda: io.read(0, 512)) != 0 for _ in range(2000))
    assert 300 < hit < 700  # 500; ten standard deviations
    await inject(bench, "read", rate=100.0, num=5)
    assert sum(fails(lambda: io.read(0, 512)) != 0 for _ in range(10)) == 5
    await bench.close("EE_M")


@on_bench()
async def test_only_from_a_queue_depth_on(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "read", queue_depth=2, num=10)
    io.read(0, 512)
    await inject(bench, "write", "pending")
    held = write(io, 0, bytes(512))
    assert fails(lambda: io.read(0, 512)) == errno.EIO
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    held.finish()
    io.read(0, 512)
    await bench.close("EE_M")


@on_bench()
async def test_what_is_withheld_is_carried_out_when_it_is_resumed(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "write", "pending", num=2)
    held = [write(io, i, bytes([65 + i]) * 512) for i in range(2)]
    io.write(1024, b"C" * 512)
    assert io.read(0, 1536) == bytes(1024) + b"C" * 512
    assert not any(request.done for request in held)
    assert lib.bdev_in_flight(io.handle) == 2
    await bench.rpc("bdev_error_resume_pending", name="EE_M")
    for request in held:
        request.finish()
    assert io.read(0, 1536) == b"A" * 512 + b"B" * 512 + b"C" * 512
    await bench.close("EE_M")


@on_bench()
async def test_a_reset_ends_what_is_withheld(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "write", "pending")
    held = write(io, 0, b"h" * 512)
    io.reset()
    assert held.done
    assert fails(held.finish) == errno.ECANCELED
    assert io.read(0, 512) == bytes(512)
    await bench.close("EE_M")


@on_bench()
async def test_removal_does_not_wait_for_what_is_withheld(bench: Bench) -> None:
    await make(bench)
    io, disk = await bench.open("EE_M"), bench.registry.find("EE_M")
    await inject(bench, "write", "pending")
    held = write(io, 0, b"h" * 512)
    await bench.rpc("bdev_error_delete", name="EE_M")
    assert fails(held.finish) == errno.ENODEV
    await bench.registry.close(disk, bench.reactor)


@on_bench()
async def test_a_corrupt_read_has_one_byte_changed_and_the_disk_none(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    io.write(0, b"d" * 1024)
    await inject(bench, "read", "corrupt_data", corrupt_offset=700, corrupt_value=1)
    first, second = bytearray(600), bytearray(424)
    io.read_into(0, first, second)
    assert first + second == b"d" * 700 + b"e" + b"d" * 323
    assert io.read(0, 1024) == b"d" * 1024
    await bench.close("EE_M")


@on_bench()
async def test_a_corrupt_write_changes_the_disk_and_not_the_buffer(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "write", "corrupt_data", corrupt_offset=3, corrupt_value=255)
    data = bytearray(b"\x0f" * 512)
    io.write(0, memoryview(data)[:100], memoryview(data)[100:])
    assert data == b"\x0f" * 512
    assert io.read(0, 512) == b"\x0f" * 3 + b"\xf0" + b"\x0f" * 508
    await bench.close("EE_M")


@on_bench()
async def test_want_of_resources_only_takes_longer(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "write", "nomem", num=3)
    request = write(io, 0, b"n" * 512)
    assert not request.done
    request.finish()
    assert io.read(0, 512) == b"n" * 512
    (entry,) = await bench.rpc("bdev_get_bdevs", name="EE_M")
    assert entry["driver_specific"] == {"error": {"base_bdev": "M", "rules": {}}}
    await bench.close("EE_M")


@on_bench()
async def test_what_is_left_of_a_rule_is_shown(bench: Bench) -> None:
    await make(bench)
    io = await bench.open("EE_M")
    await inject(bench, "flush", num=3)
    assert fails(io.flush) == errno.EIO
    (entry,) = await bench.rpc("bdev_get_bdevs", name="EE_M")
    rules = entry["driver_specific"]["error"]["rules"]
    assert rules == {"flush": {"error_type": "failure", "left": 2}}
    await bench.close("EE_M")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"io_type": "read", "error_type": "corrupt_data"}, "corrupt_value 0"),
        ({"io_type": "flush", "error_type": "corrupt_data", "corrupt_value": 1}, "no data"),
        ({"io_type": "read", "error_type": "nvme_failure"}, "nvme_failure"),
        ({"io_type": "read", "num": -1}, "num -1"),
        ({"io_type": "read", "rate": 101.0}, "rate 101"),
        ({"io_type": "compare"}, "io_type"),
    ],
)
def test_nonsense_is_refused(params: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with Bench() as bench:
            await make(bench)
            with pytest.raises(OperationError, match=message):
                await bench.rpc("bdev_error_inject_error", name="EE_M", **params)

    asyncio.run(main())


@on_bench()
async def test_the_device_is_saved(bench: Bench) -> None:
    await make(bench)
    disk = bench.registry.find("EE_M")
    params = {"base_name": "M", "uuid": disk.uuid}
    assert disk.config() == {"method": "bdev_error_create", "params": params}
