"""Rings that stop without a drain: what has not been begun waits in the front-end's log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.stack import Stack, stack
from tests.support.vhost_peer import Peer, connected
from vhost.descriptors import log_stride
from vhost.frontend import BlkFrontend, Pending
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.messages import U64, Inflight, ProtocolFeature, Request, VringState
from vhost.virtio_blk import BlkRequest

SUSPEND = ProtocolFeature.GET_VRING_BASE_INFLIGHT
NEEDED = int(SUSPEND | ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.REPLY_ACK)
REQUESTS = 32


async def running(peer: Peer, protocol: int = NEEDED, *, logs: int = 1) -> None:
    """Have queue 0 run with a log of the front-end's, if ``logs`` are more than none."""
    await peer.negotiate(protocol)
    await peer.share_memory()
    if logs:
        ask = Inflight(0, 0, logs, 128)
        await peer.send(Request.GET_INFLIGHT_FD, ask)
        message = await peer.connection.receive()
        assert message is not None
        with message:
            area = Inflight(logs * log_stride(128, packed=False), 0, logs, 128)
            await peer.send(Request.SET_INFLIGHT_FD, area, list(message.fds))
    await peer.start_queue()
    peer.host.calls.clear()


async def test_a_queue_with_a_log_is_suspended_and_goes_on_from_there() -> None:
    async with connected() as peer:
        await running(peer)
        await peer.ask(Request.GET_VRING_BASE, VringState(0, 0))
        await peer.kick()
        await peer.settle()
        assert peer.host.calls == ["suspend 0", f"recover 0 at {peer.host.base}"]


@pytest.mark.parametrize(
    ("protocol", "logs"), [(NEEDED & ~int(SUSPEND), 1), (NEEDED, 0)], ids=["feature", "log"]
)
async def test_without_feature_or_log_it_is_drained(protocol: int, logs: int) -> None:
    async with connected() as peer:
        await running(peer, protocol, logs=logs)
        await peer.ask(Request.GET_VRING_BASE, VringState(0, 0))
        assert peer.host.calls == ["stop 0"]


async def test_all_that_stops_a_queue_for_another_reason_drains_it() -> None:
    async with connected() as peer:
        await running(peer)
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 0))
        await peer.settle()
        assert peer.host.calls == ["stop 0"]


async def test_the_feature_needs_a_log() -> None:
    async with connected() as peer:
        await peer.send(Request.SET_PROTOCOL_FEATURES, U64(SUSPEND))
        assert "GET_VRING_BASE_INFLIGHT only with INFLIGHT_SHMFD" in await peer.gone()


@asynccontextmanager
async def slow_disk(packed: bool) -> AsyncIterator[Stack]:
    """Serve a disk that is allowed two requests a second."""
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call("bdev_set_qos_limit", name="m", rw_ios_per_sec=2)
        await target.call(
            "vhost_create_blk_controller", ctrlr="b", dev_name="m", packed_ring=packed
        )
        yield target


def send(disk: BlkFrontend) -> list[Pending]:
    return [
        disk.submit(BlkRequest.OUT, place, bytes([place + 1]) * 512) for place in range(REQUESTS)
    ]


@pytest.mark.parametrize("again", ["the same session", "another session"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_what_waits_for_its_turn_is_served_after_the_next_start(
    packed: bool, again: str
) -> None:
    async with slow_disk(packed) as target:
        disk = await target.connect("b", protocol_features=WANTED_PROTOCOL | SUSPEND, packed=packed)
        sent = await target.in_thread(lambda: send(disk))
        # All were taken: a drain would wait for a quarter of a minute.
        await target.until(lambda: target.sessions()[0]["inflight_task_cnt"] > REQUESTS - 3)
        await target.in_thread(disk.stop)
        await target.in_thread(disk.poll)
        assert disk.queues[0].pending > REQUESTS // 2
        await target.call("bdev_set_qos_limit", name="m", rw_ios_per_sec=0)

        def finish() -> bytes:
            if again == "the same session":
                disk.start()
            else:
                disk.reconnect()
            assert [one.wait().status for one in sent] == [0] * REQUESTS
            return disk.read(0, 512 * REQUESTS)

        data = await target.in_thread(finish)
        assert data == b"".join(bytes([place + 1]) * 512 for place in range(REQUESTS))
        await target.close(disk)


async def test_a_device_that_answers_no_more_does_not_hold_a_guest_back() -> None:
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call("bdev_error_create", base_name="m")
        await target.call("vhost_create_blk_controller", ctrlr="b", dev_name="EE_m")
        stuck = {"name": "EE_m", "io_type": "write", "error_type": "pending"}
        await target.call("bdev_error_inject_error", num=REQUESTS, **stuck)
        disk = await target.connect("b", protocol_features=WANTED_PROTOCOL | SUSPEND)
        sent = await target.in_thread(lambda: send(disk))
        await target.until(lambda: target.sessions()[0]["inflight_task_cnt"] == REQUESTS)
        await target.in_thread(disk.stop)
        assert disk.queues[0].pending == REQUESTS

        def finish() -> bytes:
            disk.start()
            assert [one.wait().status for one in sent] == [0] * REQUESTS
            return disk.read(0, 512 * REQUESTS)

        data = await target.in_thread(finish)
        assert data == b"".join(bytes([place + 1]) * 512 for place in range(REQUESTS))
        await target.close(disk)


async def test_requests_that_were_taken_back_count_as_not_made() -> None:
    async with slow_disk(packed=False) as target:
        disk = await target.connect("b", protocol_features=WANTED_PROTOCOL | SUSPEND)
        await target.in_thread(lambda: send(disk))
        await target.until(lambda: target.sessions()[0]["inflight_task_cnt"] > REQUESTS - 3)
        await target.in_thread(disk.stop)
        (counted,) = (await target.call("bdev_get_iostat", name="m"))["bdevs"]
        assert counted["num_write_ops"] < REQUESTS // 2
        assert not counted.get("io_error")
        await target.close(disk)
