"""Stacks of bdevs in real reactor processes, through a vhost-user socket."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.support.gpt import gpt_disk
from tests.support.stack import CPUS, stack
from tests.support.waiting import PATIENCE
from vhost.frontend import RequestError

BLOCKS = 8192
LIMIT_US = 500_000  # longer than a loaded machine makes a reactor wait
KIB = 1024


async def test_a_stack_of_three_survives_the_death_of_its_reactor() -> None:
    """What was written before is read after, from the same connection."""
    async with stack(CPUS[:1]) as target:
        for name in ("M0", "M1"):
            await target.call("bdev_malloc_create", name=name, block_size=512, num_blocks=BLOCKS)
            await target.call("bdev_passthru_create", name=f"P{name}", base_bdev_name=name)
        await target.call(
            "bdev_raid_create",
            name="R",
            raid_level="raid0",
            strip_size_kb=16,
            base_bdevs=["PM0", "PM1"],
        )
        await target.call("bdev_set_qos_limit", name="R", rw_ios_per_sec=1_000_000)
        await target.call("vhost_create_blk_controller", ctrlr="disk", dev_name="R")
        front = await target.connect("disk")
        data = os.urandom(256 * KIB)
        await target.in_thread(lambda: front.write(8 * KIB, data))
        pid = target.cluster.reactors[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await target.in_thread(lambda: front.read(8 * KIB, len(data))) == data
        await target.close(front)
        await target.call("vhost_delete_controller", ctrlr="disk")
        for kind, name in (("raid", "R"), ("passthru", "PM0"), ("malloc", "M0")):
            await target.call(f"bdev_{kind}_delete", name=name)
        assert [bdev.name for bdev in target.registry] == ["M1", "PM1"]


async def test_partitions_are_found_through_a_reactor(tmp_path: Path) -> None:
    """The table is read by a reactor process, and the partition served by it."""
    path = tmp_path / "disk"
    path.write_bytes(gpt_disk([(64, 1023, "data")]))
    async with stack(CPUS[:1]) as target:
        await target.call("bdev_uring_create", name="F", filename=str(path), block_size=512)
        assert [bdev.name for bdev in target.registry] == ["F", "Fp1"]
        await target.call("vhost_create_blk_controller", ctrlr="part", dev_name="Fp1")
        front = await target.connect("part")
        assert front.size == 960 * 512
        await target.in_thread(lambda: front.write(0, b"p" * 4096))
        await target.in_thread(front.flush)
        assert path.read_bytes()[64 * 512 :][:4096] == b"p" * 4096
        await target.close(front)


async def test_what_a_guest_did_is_counted_by_queue_and_controller() -> None:
    """As the front-end counts it; and it stays when the reactor dies."""
    async with stack(CPUS[:1]) as target:
        await target.call("bdev_malloc_create", name="M", block_size=512, num_blocks=BLOCKS)
        await target.call("vhost_create_blk_controller", ctrlr="disk", dev_name="M")
        front = await target.connect("disk")
        for _ in range(5):
            await target.in_thread(lambda: front.read(0, 4096))
        await target.in_thread(lambda: front.write(512, bytes(1024)))
        reply = await target.call("vhost_get_iostat", ctrlr="disk", per_queue=True)
        (controller,) = reply["controllers"]
        pid = target.cluster.reactors[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await target.in_thread(lambda: front.read(0, 512))
        (later,) = (await target.call("vhost_get_iostat"))["controllers"]
        await target.close(front)
    assert (controller["num_read_ops"], controller["bytes_read"]) == (5, 5 * 4096)
    assert (controller["num_write_ops"], controller["bytes_written"]) == (1, 1024)
    assert controller["min_read_latency_ticks"] > 0
    assert sum(queue["num_read_ops"] for queue in controller["queues"]) == 5
    assert later["num_read_ops"] == 6
    assert "queues" not in later


async def test_a_request_that_takes_too_long_fails_for_the_guest_and_is_reported() -> None:
    """A write hangs in the device: it is aborted, and the disk goes on."""
    async with stack(CPUS[:1]) as target:
        await target.call("bdev_malloc_create", name="M", block_size=512, num_blocks=BLOCKS)
        await target.call("bdev_error_create", base_name="M")
        await target.call("vhost_create_blk_controller", ctrlr="disk", dev_name="EE_M")
        front = await target.connect("disk")
        hang = {"name": "EE_M", "io_type": "write", "error_type": "pending"}
        await target.call("bdev_error_inject_error", **hang)
        await target.call("bdev_set_timeout", name="EE_M", timeout_us=LIMIT_US, action="abort")
        with pytest.raises(RequestError, match="IOERR"):
            await target.in_thread(lambda: front.write(0, bytes(512)))
        await target.in_thread(lambda: front.write(0, b"x" * 512))
        assert await target.in_thread(lambda: front.read(0, 512)) == b"x" * 512
        await target.close(front)

        async def told() -> bool:
            (timeouts,) = await target.call("bdev_get_timeouts", name="EE_M")
            return (timeouts["timeouts"], timeouts["timeout_us"]) == (1, LIMIT_US)

        async with asyncio.timeout(PATIENCE):  # the reactor tells it, later than the guest
            while not await told():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
