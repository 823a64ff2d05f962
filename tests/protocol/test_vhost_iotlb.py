"""Drivers behind an IOMMU: what the messages do, and disks whose front-end is that IOMMU."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from tests.support.iommu import IommuFrontend
from tests.support.stack import CPUS, Stack, stack
from tests.support.vhost_peer import FEATURES, REGION, USER, Peer, connected, memory
from tests.support.waiting import PATIENCE, until
from vhost import translation
from vhost.connection import Connection
from vhost.frontend import FrontendError
from vhost.frontend_memory import PAGE
from vhost.messages import (
    NEED_REPLY,
    REPLY,
    U64,
    Feature,
    IotlbMessage,
    Log,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)
from vhost.virtio_blk import BlkRequest

TRANSLATED = FEATURES | Feature.PROTOCOL_FEATURES | Feature.ACCESS_PLATFORM
PROTOCOL = int(ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ)
RING = VringAddr(0, 0, 0x10000, 0x12000, 0x11000, 0x12000)  # in IOVAs, of 128 entries
READ, WRITE, BOTH = IotlbMessage.READ, IotlbMessage.WRITE, IotlbMessage.READ | IotlbMessage.WRITE


def update(iova: int, size: int = PAGE, *, user: int = 0, access: int = BOTH) -> IotlbMessage:
    return IotlbMessage(iova, size, user or USER + iova, access, IotlbMessage.UPDATE)


def invalidate(iova: int, size: int) -> IotlbMessage:
    return IotlbMessage(iova, size, 0, 0, IotlbMessage.INVALIDATE)


class Channel:
    """The front-end's end of the channel for requests of the back-end."""

    def __init__(self, sock: socket.socket) -> None:
        self.connection = Connection(sock)

    async def asked(self) -> IotlbMessage:
        """Return the next question; ``answer`` it if that is asked for."""
        async with asyncio.timeout(PATIENCE):
            message = await self.connection.receive()
        assert message is not None
        self.request, self.wants_reply = message.header.request, message.wants_reply
        return IotlbMessage.from_bytes(message.payload, "IOTLB_MSG")

    async def answer(self, result: int = 0) -> None:
        assert self.wants_reply
        await self.connection.send(self.request, U64(result), flags=REPLY)


@asynccontextmanager
async def driver(protocol: int = PROTOCOL) -> AsyncIterator[tuple[Peer, Channel]]:
    """A session with memory, whose driver has negotiated ACCESS_PLATFORM."""
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(TRANSLATED))
        await peer.send(Request.SET_PROTOCOL_FEATURES, U64(protocol))
        ours, theirs = socket.socketpair()
        with theirs:
            await peer.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            await peer.share_memory()
            await peer.settle()
        channel = Channel(ours)
        try:
            yield peer, channel
        finally:
            channel.connection.close()


async def start(peer: Peer) -> None:
    """Start a ring as far as the front-end does it."""
    await peer.send(Request.SET_VRING_NUM, VringState(0, 128))
    await peer.send(Request.SET_VRING_ADDR, RING)
    await peer.kick()
    await peer.kick(Request.SET_VRING_CALL)
    await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
    await peer.settle()


async def start_translated(peer: Peer) -> None:
    for page in (RING.desc, RING.avail, RING.used):
        assert await peer.acknowledged(Request.IOTLB_MSG, update(page)) == 0
    await start(peer)
    assert peer.host.running == {0}


async def called(peer: Peer, what: str) -> None:
    """Return when the host was asked for something."""
    await until(lambda: what in peer.host.calls)


# --- rings ----------------------------------------------------------------------------------------


async def test_a_ring_starts_when_all_of_it_is_translated() -> None:
    async with driver() as (peer, channel):
        await start(peer)
        wanted = [(RING.desc, READ), (RING.avail, READ), (RING.used, WRITE)]
        for place, (page, access) in enumerate(wanted):
            asked = await channel.asked()
            assert (asked.kind, asked.iova, asked.access) == (IotlbMessage.MISS, page, access)
            assert peer.host.running == set()
            user = USER + 0x80000 + place * PAGE
            assert await peer.acknowledged(Request.IOTLB_MSG, update(page, user=user)) == 0
            await channel.answer()
        assert peer.host.running == {0}
        ring = peer.session.record.queues[0].ring
        assert ring is not None
        assert (ring.desc, ring.avail, ring.used) == tuple(
            USER + 0x80000 + place * PAGE for place in range(3)
        )


async def test_what_is_logged_of_a_used_ring_is_where_the_guest_has_it() -> None:
    """QEMU gives the used ring's IOVA as its log address."""
    async with driver() as (peer, _channel):
        await peer.send(Request.SET_FEATURES, U64(TRANSLATED | Feature.LOG_ALL))
        with memory() as log:
            await peer.send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL | 2))
            await peer.send(Request.SET_LOG_BASE, Log(1 << 12, 0), [log.fileno()])
            message = await peer.connection.receive()
            assert message is not None
            message.fds.close()
        for page in (RING.desc, RING.avail):
            assert await peer.acknowledged(Request.IOTLB_MSG, update(page)) == 0
        moved = update(RING.used, user=USER + 0x70000)
        assert await peer.acknowledged(Request.IOTLB_MSG, moved) == 0
        await start(peer)
        ring = peer.session.record.queues[0].ring
        assert ring is not None
        assert ring.log == REGION.guest + 0x70000


async def test_a_ring_that_loses_its_translation_stops_and_asks_for_a_new_one() -> None:
    async with driver() as (peer, channel):
        await start_translated(peer)
        assert await peer.acknowledged(Request.IOTLB_MSG, invalidate(RING.used, PAGE)) == 0
        assert peer.host.running == set()
        assert (await channel.asked()).iova == RING.used
        moved = update(RING.used, user=USER + 0x90000)
        assert await peer.acknowledged(Request.IOTLB_MSG, moved) == 0
        assert peer.host.running == {0}
        ring = peer.session.record.queues[0].ring
        assert ring is not None
        assert ring.used == USER + 0x90000


async def test_a_ring_that_is_put_elsewhere_starts_again_there() -> None:
    async with driver() as (peer, _channel):
        await start_translated(peer)
        moved = update(RING.desc, user=USER + 0x90000)
        assert await peer.acknowledged(Request.IOTLB_MSG, moved) == 0
        assert "stop 0" in peer.host.calls
        assert peer.host.running == {0}


async def test_a_translation_that_says_the_same_again_stops_nothing() -> None:
    async with driver() as (peer, _channel):
        await start_translated(peer)
        assert await peer.acknowledged(Request.IOTLB_MSG, update(RING.desc)) == 0
        assert "stop 0" not in peer.host.calls


async def test_memory_that_goes_takes_its_translations_with_it() -> None:
    async with driver() as (peer, channel):
        await start_translated(peer)
        with memory() as fd:
            other = MemoryTable((REGION.__class__(0, 1 << 20, USER + (1 << 30), 0),))
            await peer.send(Request.SET_MEM_TABLE, other, [fd.fileno()])
        assert (await channel.asked()).iova == RING.desc
        assert peer.host.running == set()
        assert len(peer.session.record.iotlb) == 0


# --- requests -------------------------------------------------------------------------------------


async def test_a_request_that_waits_goes_on_when_all_of_its_buffer_is_known() -> None:
    async with driver() as (peer, channel):
        await start_translated(peer)
        peer.session.queue_waits(0, 0x40800, PAGE, WRITE)
        for page in (0x40800, 0x41000):
            asked = await channel.asked()
            assert (asked.iova, asked.access) == (page, WRITE)
            assert "resume 0" not in peer.host.calls
            assert await peer.acknowledged(Request.IOTLB_MSG, update(page & -PAGE)) == 0
            await channel.answer()
        await called(peer, "resume 0")


async def test_what_has_come_meanwhile_is_not_asked_for() -> None:
    async with driver() as (peer, _channel):
        await start_translated(peer)
        assert await peer.acknowledged(Request.IOTLB_MSG, update(0x40000)) == 0
        peer.session.queue_waits(0, 0x40000, 16, READ)
        await called(peer, "resume 0")


async def test_an_address_that_the_front_end_refuses_breaks_the_queue() -> None:
    async with driver() as (peer, channel):
        await start_translated(peer)
        peer.session.queue_waits(0, 0x40000, 16, READ)
        await channel.asked()
        await channel.answer(1)
        await called(peer, "fault 0")
        failed = await channel.asked()
        assert (failed.kind, failed.iova) == (IotlbMessage.ACCESS_FAIL, 0x40000)
        assert not channel.wants_reply


@pytest.mark.parametrize("access", [0, READ])
async def test_an_address_without_a_useful_answer_breaks_the_queue(
    monkeypatch: pytest.MonkeyPatch, access: int
) -> None:
    monkeypatch.setattr(translation, "ANSWER_LIMIT", 0.05)
    async with driver() as (peer, channel):
        await start_translated(peer)
        peer.session.queue_waits(0, 0x40000, 16, WRITE)
        await channel.asked()
        if access:
            told = update(0x40000, access=access)
            assert await peer.acknowledged(Request.IOTLB_MSG, told) == 0
        await channel.answer()
        await called(peer, "fault 0")


async def test_an_answer_may_come_after_the_reply_that_says_so() -> None:
    """It comes over another socket: neither says which is read first."""
    async with driver() as (peer, channel):
        await start_translated(peer)
        peer.session.queue_waits(0, 0x40000, 16, WRITE)
        await channel.asked()
        await channel.answer()
        await peer.settle()
        assert await peer.acknowledged(Request.IOTLB_MSG, update(0x40000)) == 0
        await called(peer, "resume 0")


async def test_without_reply_ack_no_reply_is_asked_for_and_silence_breaks_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(translation, "SILENCE_LIMIT", 0.05)
    async with driver(int(ProtocolFeature.BACKEND_REQ)) as (peer, channel):
        for page in (RING.desc, RING.avail, RING.used):
            await peer.send(Request.IOTLB_MSG, update(page))
        await start(peer)
        peer.session.queue_waits(0, 0x40000, 16, WRITE)
        assert (await channel.asked()).iova == 0x40000
        assert not channel.wants_reply
        await called(peer, "fault 0")


async def test_without_a_channel_nothing_can_be_asked_for() -> None:
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(TRANSLATED))
        await peer.send(Request.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
        await peer.share_memory()
        await start_translated(peer)
        peer.session.queue_waits(0, 0x40000, 16, WRITE)
        await called(peer, "fault 0")
        assert "gave no channel" in peer.warnings[-1]


# --- messages -------------------------------------------------------------------------------------


async def test_only_what_was_known_is_invalidated() -> None:
    async with driver() as (peer, _channel):
        assert await peer.acknowledged(Request.IOTLB_MSG, update(0x40000)) == 0
        assert await peer.acknowledged(Request.IOTLB_MSG, invalidate(0x50000, PAGE)) == 0
        assert not any(call.startswith("settle") for call in peer.host.calls)
        assert await peer.acknowledged(Request.IOTLB_MSG, invalidate(0x40010, 1)) == 0
        assert peer.host.calls[-1] == "settle 0x40010-0x40010 +"
        assert len(peer.session.record.iotlb) == 0


async def test_everything_is_invalidated_by_a_size_that_does_not_fit_in_64_bits() -> None:
    async with driver() as (peer, _channel):
        assert await peer.acknowledged(Request.IOTLB_MSG, update(0x40000)) == 0
        assert await peer.acknowledged(Request.IOTLB_MSG, invalidate(0, 0)) == 0
        assert peer.host.calls[-1] == f"settle 0x0-{2**64 - 1:#x} +"


async def test_a_reply_comes_without_reply_ack_too() -> None:
    async with driver(int(ProtocolFeature.BACKEND_REQ)) as (peer, _channel):
        await peer.send(Request.IOTLB_MSG, update(0x40000), flags=NEED_REPLY)
        message = await peer.connection.receive()
        assert message is not None
        assert U64.from_bytes(message.payload, "reply") == U64(0)


async def test_a_translation_to_what_is_no_memory_is_refused_and_survived() -> None:
    async with driver() as (peer, _channel):
        for user in (USER - PAGE, USER + REGION.size - PAGE + 1):
            told = update(0x40000, user=user)
            assert await peer.acknowledged(Request.IOTLB_MSG, told) == 1
        assert "within one region of memory" in peer.warnings[-1]
        assert await peer.acknowledged(Request.IOTLB_MSG, update(0x40000)) == 0


async def test_a_translation_for_who_has_no_iommu_is_refused_and_survived() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        assert await peer.acknowledged(Request.IOTLB_MSG, update(0x40000)) == 1
        assert "only after ACCESS_PLATFORM" in peer.warnings[-1]


@pytest.mark.parametrize(
    "message",
    [
        IotlbMessage(0, PAGE, USER, BOTH, IotlbMessage.MISS),
        IotlbMessage(0, PAGE, USER, BOTH, 9),
        IotlbMessage(0, PAGE, USER, 0, IotlbMessage.UPDATE),
        IotlbMessage(0, PAGE, USER, 4, IotlbMessage.UPDATE),
        IotlbMessage(0, 0, USER, BOTH, IotlbMessage.UPDATE),
        IotlbMessage(2**64 - PAGE, 2 * PAGE, USER, BOTH, IotlbMessage.UPDATE),
        IotlbMessage(0, PAGE, 2**64 - PAGE, BOTH, IotlbMessage.UPDATE),
        IotlbMessage(PAGE, 0, 0, 0, IotlbMessage.INVALIDATE),
    ],
)
async def test_a_message_that_makes_no_sense_ends_the_connection(message: IotlbMessage) -> None:
    async with driver() as (peer, _channel):
        await peer.send(Request.IOTLB_MSG, message)
        assert "IOTLB_MSG" in await peer.gone()


# --- disks ----------------------------------------------------------------------------------------


@asynccontextmanager
async def disk(cpus: list[int] = CPUS[:1], *, delay_ms: int = 0) -> AsyncIterator[Stack]:
    """Serve a malloc disk as controller "b0"; each request takes ``delay_ms`` at least."""
    async with stack(cpus) as made:
        await made.call("bdev_malloc_create", name="M0", num_blocks=32768, block_size=512)
        name = "M0"
        if delay_ms:
            latency: dict[str, Any] = dict.fromkeys(
                ("avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency"),
                delay_ms * 1000,
            )
            await made.call("bdev_delay_create", base_bdev_name="M0", name="D0", **latency)
            name = "D0"
        await made.call("vhost_create_blk_controller", ctrlr="b0", dev_name=name, packed_ring=True)
        yield made


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_data_goes_where_the_iommu_says_and_is_asked_for_once(packed: bool) -> None:
    data = os.urandom(300 << 10)
    async with disk(CPUS[:2]) as target:

        def work() -> None:
            path = target.socket("b0")
            with IommuFrontend.open(path, queues=2, packed=packed) as front:
                for queue in (0, 1):
                    front.write(1 << 20, data, queue=queue)
                    assert front.read(1 << 20, len(data), queue=queue) == data
                pages = [(miss.iova // PAGE, miss.access) for miss in front.misses]
                assert len(pages) == len(set(pages))
                # Another request in the same memory is served without a question.
                front.read(1 << 20, len(data))
                assert len(front.misses) == len(pages)

        await target.in_thread(work)


async def test_what_was_invalidated_is_asked_for_again() -> None:
    async with disk() as target:

        def work() -> None:
            with IommuFrontend.open(target.socket("b0")) as front:
                front.write(0, bytes(PAGE))
                before = len(front.misses)
                front.invalidate(0, 0)
                front.write(0, b"x" * PAGE)
                assert len(front.misses) > before
                assert front.read(0, PAGE) == b"x" * PAGE

        await target.in_thread(work)


def in_flight(target: Stack) -> int:
    statistics = target.sessions()[0]["queues"][0]["statistics"]
    return 0 if statistics is None else int(statistics["in_flight"])


async def test_an_invalidation_waits_for_the_requests_that_use_it() -> None:
    async with disk(delay_ms=300) as target:

        def work() -> None:
            with IommuFrontend.open(target.socket("b0")) as front:
                pending = front.submit(BlkRequest.IN, length=PAGE)
                while not in_flight(target):
                    time.sleep(0.001)
                front.poll()
                assert not pending.done
                front.invalidate(0, 0)
                front.poll()
                assert pending.done

        await target.in_thread(work)


async def test_memory_that_may_only_be_read_is_not_written() -> None:
    async with disk() as target:

        def work() -> None:
            path = target.socket("b0")
            with IommuFrontend.open(path, queues=2) as front:
                area = front.memory.allocate(PAGE, PAGE)  # a page that was never translated
                front.memory.write(area, b"u" * PAGE)
                front.allowed[area] = READ
                assert front.read(0, 512) == bytes(512)
                header = front.memory.allocate(16)
                front.memory.write(header, bytes(16))
                front.queues[0].add([(header, 16, False), (area, 513, True)])
                front.queues[0].publish()
                with pytest.raises(FrontendError, match="broken"):
                    front.read(0, 512)
                assert front.memory.read(area, PAGE) == b"u" * PAGE
                assert [failed.iova for failed in front.failures] == [area]
                assert front.read(0, 512, queue=1) == bytes(512)  # the other queue goes on

        await target.in_thread(work)


async def test_a_reactor_that_replaces_another_knows_what_was_told() -> None:
    data = os.urandom(64 << 10)
    async with disk() as target:
        front = await target.in_thread(lambda: IommuFrontend.open(target.socket("b0")))
        await target.in_thread(lambda: front.write(0, data))
        asked = len(front.misses)
        os.kill(target.cluster.reactors[0].pid or 0, 9)
        assert await target.in_thread(lambda: front.read(0, len(data))) == data
        pages = {miss.iova // PAGE for miss in front.misses[:asked]}
        assert not {miss.iova // PAGE for miss in front.misses[asked:]} & pages
        with suppress(FrontendError):
            await target.close(front)
