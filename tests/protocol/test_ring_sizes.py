"""Rings of every size that is allowed, and one that is reset while another goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.stack import Stack, stack
from vhost.frontend import WANTED_FEATURES, BlkFrontend
from vhost.frontend_memory import DriverQueue
from vhost.io import run_workload
from vhost.messages import Feature
from vhost.workload import Workload

SIZE = 16 << 20  # bytes of the disk


@asynccontextmanager
async def disk() -> AsyncIterator[Stack]:
    async with stack() as made:
        await made.call("bdev_malloc_create", name="M0", num_blocks=SIZE // 512, block_size=512)
        await made.call("vhost_create_blk_controller", ctrlr="b0", dev_name="M0", packed_ring=True)
        yield made


@pytest.mark.parametrize(
    ("size", "packed"),
    [(4, False), (32768, False), (3, True), (1000, True), (32768, True)],
)
async def test_a_ring_of_this_size_carries_verified_load(size: int, packed: bool) -> None:
    """Requests come back through the whole ring more than once."""
    async with disk() as target:
        depth = min(128, size // 3)
        work = Workload(
            SIZE, "randrw", depth=depth, requests=max(2000, size), verify=True, indirect=False
        )

        def load() -> None:
            with BlkFrontend(target.socket("b0"), packed=packed) as front:
                results = run_workload(front, work, queue_size=size)
                assert front.queues[0].size == size
            assert (results.good, results.first_error) == (True, "")

        await target.in_thread(load)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_queue_that_is_reset_begins_anew_and_the_other_goes_on(packed: bool) -> None:
    """Virtio 1.2, section 2.6.1: the driver takes a ring away and gives another one."""
    async with disk() as target:

        def work() -> None:
            with BlkFrontend.connect(
                target.socket("b0"),
                queues=2,
                queue_size=64,
                packed=packed,
                features=WANTED_FEATURES | Feature.RING_RESET,
            ) as front:
                assert front.features & Feature.RING_RESET
                for index in range(5):
                    front.write(index * 4096, bytes([index]) * 4096, queue=1)
                old = front.queues[1]
                front.stop_queue(old)
                front.write(0, b"\x77" * 4096, queue=0)
                event_idx = bool(front.features & Feature.EVENT_IDX)
                front.queues[1] = DriverQueue(
                    front.memory, 1, 32, event_idx=event_idx, packed=packed
                )
                front.start_queue(front.queues[1])
                assert front.read(0, 4096, queue=1) == b"\x77" * 4096
                assert front.read(4096, 4096, queue=0) == b"\1" * 4096
                old.close()

        await target.in_thread(work)
