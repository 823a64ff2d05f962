"""In-band notifications: kicks, calls and errors as messages, and as many queues as they allow."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable

import pytest

from tests.support.stack import stack
from tests.support.vhost_peer import FEATURES, Peer, connected, ring
from tests.support.waiting import PATIENCE
from vhost.backend_channel import RequestChannel
from vhost.connection import Connection
from vhost.frontend_device import IN_BAND
from vhost.inband import InBand
from vhost.messages import (
    MAX_FD_QUEUES,
    MAX_QUEUES,
    REPLY,
    U64,
    BackendRequest,
    Feature,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
)
from vhost.record import SessionRecord
from vhost.virtio_blk import BlkRequest

NEEDED = int(
    ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MQ
)


async def set_up(peer: Peer, index: int = 0) -> None:
    """Describe everything about a queue but its eventfds."""
    await peer.negotiate(NEEDED)
    await peer.share_memory()
    await peer.describe_ring(index)
    await peer.send(Request.SET_VRING_ENABLE, VringState(index, 1))


async def open_channel(peer: Peer) -> Connection:
    ours, theirs = socket.socketpair()
    with theirs:
        await peer.send(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
    return Connection(ours)


async def taken(channel: Connection) -> tuple[int, VringState]:
    """Return the next request of the back-end, which waits for an answer."""
    async with asyncio.timeout(PATIENCE):
        message = await channel.receive()
    assert message is not None
    assert message.wants_reply
    return message.header.request, VringState.from_bytes(message.payload, "")


async def test_a_kick_in_a_message_starts_the_queue_and_is_passed_on() -> None:
    async with connected() as peer:
        await set_up(peer)
        await peer.settle()
        assert not peer.host.running
        assert await peer.acknowledged(Request.VRING_KICK, VringState(0, 0)) == 0
        assert peer.host.running == {0}
        queue = peer.session.record.queue(0)
        assert os.eventfd_read(queue.kick) == 1
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        assert os.eventfd_read(queue.kick) == 1
        assert peer.host.calls.count("start 0 at 0") == 1


async def test_a_stopped_queue_starts_again_with_the_next_kick() -> None:
    async with connected() as peer:
        await set_up(peer)
        await peer.send(Request.VRING_KICK, VringState(0, 0))
        await peer.ask(Request.GET_VRING_BASE, VringState(0, 0))
        assert not peer.host.running
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        assert peer.host.calls[-1] == f"start 0 at {peer.host.base}"


@pytest.mark.parametrize("what", ["call", "error"])
async def test_a_signal_of_the_device_becomes_a_message(what: str) -> None:
    request = {"call": BackendRequest.VRING_CALL, "error": BackendRequest.VRING_ERR}[what]
    async with connected() as peer:
        await set_up(peer, index=3)
        channel = await open_channel(peer)
        await peer.acknowledged(Request.VRING_KICK, VringState(3, 0))
        os.eventfd_write(getattr(peer.session.record.queue(3), what), 5)
        assert await taken(channel) == (request, VringState(3, 0))
        channel.close()


async def test_signals_wait_for_the_answer_and_become_one() -> None:
    async with connected() as peer:
        await set_up(peer)
        channel = await open_channel(peer)
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        call = peer.session.record.queue(0).call
        os.eventfd_write(call, 1)
        first = await taken(channel)
        for _ in range(3):
            os.eventfd_write(call, 1)
            await peer.settle()
        await channel.send(first[0], U64(0), flags=REPLY)
        assert await taken(channel) == first
        await channel.send(first[0], U64(0), flags=REPLY)
        await peer.settle()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await channel.receive()
        channel.close()


async def test_signals_that_came_before_the_channel_are_sent_over_it() -> None:
    async with connected() as peer:
        await set_up(peer)
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        os.eventfd_write(peer.session.record.queue(0).call, 1)
        await peer.settle()
        channel = await open_channel(peer)
        assert await taken(channel) == (BackendRequest.VRING_CALL, VringState(0, 0))
        channel.close()


async def test_a_signal_whose_answer_never_came_is_sent_over_the_next_channel() -> None:
    async with connected() as peer:
        await set_up(peer)
        former = await open_channel(peer)
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        os.eventfd_write(peer.session.record.queue(0).call, 1)
        told = await taken(former)
        channel = await open_channel(peer)
        assert await taken(channel) == told
        former.close()
        channel.close()


async def test_a_channel_that_answers_nonsense_is_used_no_more() -> None:
    async with connected() as peer:
        await set_up(peer)
        channel = await open_channel(peer)
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        os.eventfd_write(peer.session.record.queue(0).call, 1)
        await taken(channel)
        await channel.send(BackendRequest.IOTLB_MSG, U64(0), flags=REPLY)
        async with asyncio.timeout(PATIENCE):
            assert await channel.receive() is None
        await peer.settle()
        assert "reply: request is 1" in peer.warnings[-1]
        channel.close()


async def test_eventfds_that_are_announced_are_preferred() -> None:
    async with connected() as peer:
        await set_up(peer)
        channel = await open_channel(peer)
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            await peer.send(request, VringFd(0), [fd])
        await peer.settle()
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        os.eventfd_write(peer.session.record.queue(0).call, 1)
        assert os.eventfd_read(fd) == 2
        os.close(fd)
        channel.close()


async def test_a_queue_that_wants_no_signals_gets_no_messages() -> None:
    async with connected() as peer:
        await set_up(peer)
        await peer.send(Request.SET_VRING_CALL, VringFd(0, no_fd=True))
        await peer.acknowledged(Request.VRING_KICK, VringState(0, 0))
        assert peer.session.record.queue(0).call == -1


@pytest.mark.parametrize("missing", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK])
async def test_without_what_it_needs_it_ends_the_connection(missing: ProtocolFeature) -> None:
    async with connected() as peer:
        await peer.send(Request.SET_PROTOCOL_FEATURES, U64(NEEDED & ~missing))
        assert "only with REPLY_ACK and BACKEND_REQ" in await peer.gone()


async def test_a_kick_needs_the_feature() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.send(Request.VRING_KICK, VringState(0, 0))
        assert "only after INBAND_NOTIFICATIONS is negotiated" in await peer.gone()


async def test_there_are_more_queues_with_messages_than_with_eventfds() -> None:
    async with connected() as peer:
        await peer.negotiate(NEEDED)
        assert await peer.ask(Request.GET_QUEUE_NUM) == U64(MAX_FD_QUEUES)
        channel = await open_channel(peer)
        assert await peer.ask(Request.GET_QUEUE_NUM) == U64(MAX_QUEUES)
        await set_up(peer, index=MAX_QUEUES - 1)
        await peer.acknowledged(Request.VRING_KICK, VringState(MAX_QUEUES - 1, 0))
        assert peer.host.running == {MAX_QUEUES - 1}
        channel.close()


async def test_who_announces_eventfds_has_as_many_queues_as_they_can_name() -> None:
    """QEMU negotiates what is offered, and cuts the index of SET_VRING_CALL to eight bits."""
    async with connected() as peer:
        await set_up(peer)
        channel = await open_channel(peer)
        await peer.send(Request.SET_VRING_CALL, VringFd(MAX_FD_QUEUES & 0xFF, no_fd=True))
        assert await peer.ask(Request.GET_QUEUE_NUM) == U64(MAX_FD_QUEUES)
        await peer.send(Request.SET_VRING_NUM, VringState(MAX_FD_QUEUES, 128))
        assert "index is 256: less than 256" in await peer.gone()
        channel.close()


async def test_without_the_feature_there_are_256_queues() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.send(Request.SET_FEATURES, U64(FEATURES | Feature.PROTOCOL_FEATURES))
        await peer.send(Request.SET_VRING_ADDR, ring(MAX_FD_QUEUES))
        assert "index is 256: less than 256" in await peer.gone()


async def test_a_session_that_begins_with_a_record_goes_on_sending() -> None:
    """As when a control process takes a connection over."""
    ours, theirs = socket.socketpair()
    record = SessionRecord(1, "b", protocol_features=NEEDED, backend_channel=ours.detach())
    record.queue(2).call = os.eventfd(1, os.EFD_NONBLOCK)
    requests = RequestChannel(record, pytest.fail)
    inband, channel = InBand(record, requests), Connection(theirs)
    assert await taken(channel) == (BackendRequest.VRING_CALL, VringState(2, 0))
    inband.close()
    requests.close()
    record.close()
    channel.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_disk_is_driven_by_messages(packed: bool) -> None:
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call(
            "vhost_create_blk_controller", ctrlr="b", dev_name="m", packed_ring=packed
        )
        disk = await target.connect("b", protocol_features=IN_BAND, packed=packed, queues=2)
        assert disk.protocol & ProtocolFeature.INBAND_NOTIFICATIONS

        def work() -> None:
            disk.spin = 0.0  # every answer is waited for
            for index in range(2):
                disk.write(4096 * index, bytes([index + 1]) * 4096, queue=index)
            disk.stop()
            disk.start()
            for _ in range(20):
                assert disk.read(0, 8192, queue=1) == bytes([1]) * 4096 + bytes([2]) * 4096

        await target.in_thread(work)
        (session,) = target.sessions()
        assert session["queues"][1]["statistics"]["calls"] > 0
        await target.close(disk)


def pattern(index: int) -> bytes:
    return index.to_bytes(4, "little") * 128


async def test_1024_queues_each_carry_requests() -> None:
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call("vhost_create_blk_controller", ctrlr="b", dev_name="m")
        disk = await target.connect(
            "b", protocol_features=IN_BAND, queues=MAX_QUEUES, queue_size=16, timeout=20.0
        )
        assert disk.config.num_queues == MAX_QUEUES

        def on_each(request: int, data: Callable[[int], bytes], length: int) -> list[bytes]:
            """Have a request on its way on every queue, and return what came back."""
            sent = [
                disk.submit(request, index, data(index), length=length, queue=index)
                for index in range(MAX_QUEUES)
            ]
            end = time.monotonic() + 10.0
            while not all(one.done for one in sent) and time.monotonic() < end:
                disk.poll()
            return [one.data for one in sent]

        def work() -> None:
            on_each(BlkRequest.OUT, pattern, 0)
            assert on_each(BlkRequest.IN, lambda _: b"", 512) == list(
                map(pattern, range(MAX_QUEUES))
            )

        await target.in_thread(work)
        (session,) = target.sessions()
        counts = [queue["statistics"]["requests"] for queue in session["queues"]]
        assert counts == [2] * MAX_QUEUES
        await target.close(disk)
