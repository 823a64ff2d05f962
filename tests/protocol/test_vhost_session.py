"""What each message does, over a real socket, with a host that only takes notes."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from dataclasses import replace
from typing import cast

import pytest

from tests.support.descriptors import open_fds
from tests.support.vhost_peer import (
    FEATURES,
    GUEST_SIZE,
    REGION,
    USER,
    FakeDevice,
    Peer,
    connected,
    memory,
    ring,
)
from vhost.descriptors import log_stride
from vhost.messages import (
    MAX_FD_QUEUES,
    NEED_REPLY,
    U64,
    VERSION,
    BackendRequest,
    Config,
    Feature,
    Header,
    Inflight,
    Log,
    MemoryTable,
    ProtocolFeature,
    Region,
    Request,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vhost.session import PROTOCOL_FEATURES, TRANSPORT_FEATURES
from vhost.shared_memory import MAX_MEM_SLOTS

SLOTS = int(ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.REPLY_ACK)


async def test_what_is_offered_is_told() -> None:
    async with connected() as peer:
        features = FEATURES | TRANSPORT_FEATURES
        assert await peer.ask(Request.GET_FEATURES) == U64(features)
        assert await peer.ask(Request.GET_PROTOCOL_FEATURES) == U64(PROTOCOL_FEATURES)
        await peer.negotiate(PROTOCOL_FEATURES)
        assert await peer.ask(Request.GET_QUEUE_NUM) == U64(MAX_FD_QUEUES)
        assert await peer.ask(Request.GET_MAX_MEM_SLOTS) == U64(MAX_MEM_SLOTS)


async def test_a_queue_runs_once_everything_is_known_and_enabled() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.describe_ring()
        await peer.kick()
        await peer.settle()
        assert not peer.host.running
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
        await peer.settle()
        assert peer.host.calls == ["memory 1", "start 0 at 0"]


async def test_a_queue_starts_enabled_without_protocol_features() -> None:
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(FEATURES))
        await peer.share_memory()
        await peer.describe_ring()
        await peer.kick()
        await peer.settle()
        assert peer.host.running == {0}


async def test_a_queue_may_be_described_before_there_is_memory() -> None:
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(FEATURES))
        await peer.describe_ring()
        await peer.kick()
        await peer.share_memory()
        await peer.settle()
        assert peer.host.running == {0}


async def test_a_queue_without_kick_descriptor_is_polled() -> None:
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(FEATURES))
        await peer.share_memory()
        await peer.describe_ring()
        await peer.send(Request.SET_VRING_KICK, VringFd(0, no_fd=True))
        await peer.settle()
        assert peer.session.record.queue(0).kick == -1
        assert peer.host.running == {0}


async def test_get_vring_base_stops_the_queue_and_tells_where_it_stopped() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        answer = await peer.ask(Request.GET_VRING_BASE, VringState(0, 0))
        assert answer == VringState(0, peer.host.base)
        assert not peer.host.running


async def test_a_stopped_queue_starts_again_with_the_next_kick_where_it_is_told_to() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        await peer.ask(Request.GET_VRING_BASE, VringState(0, 0))
        await peer.send(Request.SET_VRING_BASE, VringState(0, 42))
        await peer.settle()
        assert not peer.host.running
        await peer.kick()
        await peer.settle()
        assert peer.host.calls[-1] == "start 0 at 42"


async def test_disabling_stops_and_enabling_goes_on_from_there() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 0))
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
        await peer.settle()
        assert peer.host.calls == ["stop 0", f"start 0 at {peer.host.base}"]


async def test_another_call_descriptor_reaches_a_queue_without_a_stop() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        await peer.kick(Request.SET_VRING_CALL)
        await peer.send(Request.SET_VRING_CALL, VringFd(0, no_fd=True))
        await peer.settle()
        assert peer.session.record.queue(0).call == -1
        assert peer.host.calls == ["call 0", "call 0"]


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_ERR])
async def test_a_new_descriptor_reaches_a_queue_that_runs(request_: Request) -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        await peer.kick(request_)
        await peer.settle()
        assert peer.host.calls == ["stop 0", f"start 0 at {peer.host.base}"]


async def test_the_same_addresses_again_do_not_disturb_a_queue() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        await peer.send(Request.SET_VRING_ADDR, ring())
        await peer.send(Request.SET_FEATURES, U64(FEATURES | Feature.PROTOCOL_FEATURES))
        await peer.settle()
        assert peer.host.calls == []


async def test_reset_owner_stops_all_queues_and_keeps_the_rest() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue(0)
        await peer.start_queue(3)
        await peer.send(Request.RESET_OWNER)
        await peer.settle()
        assert not peer.host.running
        assert peer.session.record.features == FEATURES | Feature.PROTOCOL_FEATURES
        assert len(peer.session.record.memory) == 1


async def test_calls_never_block() -> None:
    async with connected() as peer:
        await peer.kick(Request.SET_VRING_CALL)
        await peer.settle()
        assert not os.get_blocking(peer.session.record.queue(0).call)


# --- memory


async def test_memory_may_change_under_a_queue_that_runs() -> None:
    async with connected() as peer:
        await peer.negotiate(SLOTS)
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        more = SingleRegion(Region(GUEST_SIZE, 4096, USER + GUEST_SIZE, 0))
        with memory(4096) as file:
            assert await peer.acknowledged(Request.ADD_MEM_REG, more, [file.fileno()]) == 0
        assert await peer.acknowledged(Request.REM_MEM_REG, more) == 0
        assert peer.host.calls == ["memory 2", "memory 1"]
        assert peer.session.record.table().regions == (REGION,)


async def test_memory_that_is_removed_is_closed() -> None:
    async with connected() as peer:
        await peer.negotiate(SLOTS)
        with memory() as file:
            before = len(open_fds())
            region = SingleRegion(REGION)
            assert await peer.acknowledged(Request.ADD_MEM_REG, region, [file.fileno()]) == 0
            assert len(open_fds()) == before + 1
            # Some front-ends send a descriptor here, too.
            assert await peer.acknowledged(Request.REM_MEM_REG, region, [file.fileno()]) == 0
            assert len(open_fds()) == before


async def test_a_region_is_removed_whatever_offset_is_given() -> None:
    async with connected() as peer:
        await peer.negotiate(SLOTS)
        await peer.share_memory()
        other = Region(REGION.guest, REGION.size, REGION.user, 4096)
        assert await peer.acknowledged(Request.REM_MEM_REG, SingleRegion(other)) == 0
        assert peer.session.record.memory == []


async def test_a_queue_whose_rings_lose_their_memory_ends_the_connection() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        other = MemoryTable((Region(0, GUEST_SIZE, USER + GUEST_SIZE, 0),))
        with memory() as file:
            await peer.send(Request.SET_MEM_TABLE, other, [file.fileno()])
        assert "queue 0: descriptor ring is" in await peer.gone()
        assert "stop 0" in peer.host.calls


# --- configuration space


async def test_the_configuration_is_read_from_its_offset_and_padded() -> None:
    async with connected() as peer:
        await peer.negotiate(int(ProtocolFeature.CONFIG))
        answer = await peer.ask(Request.GET_CONFIG, Config(8, 4, 0, bytes(4)))
        assert answer == Config(8, 4, 0, bytes([8, 9, 10, 11]))
        answer = await peer.ask(Request.GET_CONFIG, Config(56, 256, 0, bytes(256)))
        assert answer == Config(56, 256, 0, bytes([56, 57, 58, 59]) + bytes(252))


async def test_front_ends_on_old_libraries_find_the_configuration_at_0x100() -> None:
    """Cloud Hypervisor up to v46 does, and would see a disk of no size."""
    async with connected() as peer:
        await peer.negotiate(int(ProtocolFeature.CONFIG))
        answer = await peer.ask(Request.GET_CONFIG, Config(0x108, 4, 1, bytes(4)))
        assert answer == Config(0x108, 4, 1, bytes([8, 9, 10, 11]))


async def test_a_refused_write_to_the_configuration_is_told_and_survived() -> None:
    async with connected() as peer:
        await peer.negotiate(int(ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK))
        assert await peer.acknowledged(Request.SET_CONFIG, Config(4, 1, 0, b"x")) == 1
        assert await peer.acknowledged(Request.SET_CONFIG, Config(0, 2, 1, b"ab")) == 0
        assert cast("FakeDevice", peer.device).written == [(0, b"ab", True)]
        assert peer.warnings == ["refused: SET_CONFIG: offset is 4: 0"]


async def test_what_is_written_reaches_the_queues_once() -> None:
    async with connected() as peer:
        await peer.negotiate(int(ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK))
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        for _ in range(2):
            assert await peer.acknowledged(Request.SET_CONFIG, Config(0, 2, 0, b"ab")) == 0
        assert peer.host.calls == ["stop 0", f"start 0 at {peer.host.base}"]
        answer = await peer.ask(Request.GET_CONFIG, Config(0, 3, 0, bytes(3)))
        assert answer == Config(0, 3, 0, b"ab\2")


# --- resetting

RESETS = int(
    ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.STATUS
    | ProtocolFeature.CONFIG
    | ProtocolFeature.REPLY_ACK
)


@pytest.mark.parametrize(
    ("request_", "payload", "base"),
    # After SET_STATUS a front-end may still ask where a ring has stopped; QEMU 7.2 does.
    [(Request.RESET_DEVICE, None, 0), (Request.SET_STATUS, U64(0), 7)],
)
async def test_a_reset_stops_everything_and_forgets_what_the_driver_did(
    request_: Request, payload: U64 | None, base: int
) -> None:
    async with connected() as peer:
        await peer.negotiate(RESETS)
        await peer.share_memory()
        await peer.start_queue()
        assert await peer.acknowledged(Request.SET_STATUS, U64(15)) == 0
        assert await peer.acknowledged(Request.SET_CONFIG, Config(0, 1, 0, b"a")) == 0
        assert await peer.acknowledged(request_, payload) == 0
        assert not peer.host.running
        assert await peer.ask(Request.GET_STATUS) == U64(0)
        answer = await peer.ask(Request.GET_CONFIG, Config(0, 1, 0, bytes(1)))
        assert answer == Config(0, 1, 0, b"\0")
        await peer.kick()
        await peer.settle()
        assert not peer.host.running  # it must be enabled again, too
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
        await peer.settle()
        assert peer.host.calls[-1] == f"start 0 at {base}"


async def test_the_status_is_kept_and_stops_nothing() -> None:
    async with connected() as peer:
        await peer.negotiate(RESETS)
        await peer.share_memory()
        await peer.start_queue()
        assert await peer.acknowledged(Request.SET_STATUS, U64(15)) == 0
        assert await peer.ask(Request.GET_STATUS) == U64(15)
        assert peer.host.running == {0}


async def test_a_status_of_more_than_eight_bits_ends_the_connection() -> None:
    async with connected() as peer:
        await peer.negotiate(RESETS)
        assert await peer.acknowledged(Request.SET_STATUS, U64(0x100)) == 1
        assert await peer.gone() == "connection closed: SET_STATUS: status is 0x100: <= 0xff"


# --- the dirty log of a migration

LOGGING = int(ProtocolFeature.LOG_SHMFD | ProtocolFeature.REPLY_ACK)
LOG_ALL = U64(FEATURES | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL)
LOG_BYTES = GUEST_SIZE // 4096 // 8


async def give_log(peer: Peer, size: int = LOG_BYTES, *, real: int = 4096) -> None:
    with memory(real) as file:
        await peer.send(Request.SET_LOG_BASE, Log(size, 0), [file.fileno()])


async def test_a_log_is_answered_when_it_is_used_in_place_of_the_former() -> None:
    async with connected() as peer:
        await peer.negotiate(LOGGING)
        await peer.share_memory()
        await peer.start_queue()
        peer.host.calls.clear()
        for _ in range(2):
            await give_log(peer)
            message = await peer.connection.receive()
            assert message is not None
            assert (message.header.request, message.is_reply) == (Request.SET_LOG_BASE, True)
            assert message.payload == bytes(8)
        assert peer.host.calls == ["memory 1", "memory 1"]


async def test_a_log_event_is_an_eventfd_and_is_used() -> None:
    async with connected() as peer:
        await peer.negotiate(LOGGING)
        event = os.eventfd(0)
        for _ in range(2):
            assert await peer.acknowledged(Request.SET_LOG_FD, None, [event]) == 0
        os.close(event)
        with memory() as file:
            assert await peer.acknowledged(Request.SET_LOG_FD, None, [file.fileno()]) == 1
        assert "an eventfd" in await peer.gone()


@pytest.mark.parametrize(
    ("size", "real", "why"),
    [
        (LOG_BYTES - 1, 4096, "log size is 31: a bit for each 4096 bytes up to guest address"),
        (8192, 4096, "size of the file"),
    ],
)
async def test_a_log_that_is_too_small_is_refused(size: int, real: int, why: str) -> None:
    async with connected() as peer:
        await peer.negotiate(LOGGING)
        await peer.share_memory()
        await give_log(peer, size, real=real)
        assert why in await peer.gone()


async def test_memory_that_the_log_has_no_bits_for_is_refused_only_while_logging() -> None:
    async with connected() as peer:
        await peer.negotiate(LOGGING)
        await give_log(peer, 1)
        (await peer.connection.receive()).fds.close()  # type: ignore[union-attr]
        await peer.share_memory()
        await peer.settle()
        await peer.send(Request.SET_FEATURES, LOG_ALL)
        await peer.share_memory()
        assert "memory: log size is 1" in await peer.gone()


async def test_a_used_ring_that_is_logged_past_the_log_is_refused() -> None:
    async with connected() as peer:
        await peer.negotiate(LOGGING)
        await peer.share_memory()
        await give_log(peer)
        (await peer.connection.receive()).fds.close()  # type: ignore[union-attr]
        await peer.start_queue()
        await peer.send(Request.SET_FEATURES, LOG_ALL)
        logged = replace(ring(), flags=VringAddr.F_LOG, log=GUEST_SIZE - 6 - 8 * 128)
        assert await peer.acknowledged(Request.SET_VRING_ADDR, logged) == 0
        assert peer.host.running == {0}
        await peer.send(Request.SET_VRING_ADDR, replace(logged, log=logged.log + 4))
        assert "queue 0: log size is 32" in await peer.gone()


# --- requests of the back-end

CHANNEL = int(ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK)


async def give_channel(peer: Peer) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        fds = [theirs.fileno()]
        assert await peer.acknowledged(Request.SET_BACKEND_REQ_FD, fds=fds) == 0
    ours.setblocking(False)
    return ours


async def test_a_change_of_the_configuration_is_told() -> None:
    async with connected() as peer:
        await peer.negotiate(CHANNEL)
        with await give_channel(peer) as channel:
            peer.session.config_changed()
            header = Header(BackendRequest.CONFIG_CHANGE_MSG, VERSION, 0)
            assert channel.recv(100) == header.to_bytes()


async def test_the_last_channel_counts_and_the_former_is_closed() -> None:
    async with connected() as peer:
        await peer.negotiate(CHANNEL)
        with await give_channel(peer) as first, await give_channel(peer) as second:
            peer.session.config_changed()
            assert first.recv(100) == b""
            assert len(second.recv(100)) == Header.WIRE.size


async def test_a_channel_that_nobody_reads_makes_nobody_wait() -> None:
    async with connected() as peer:
        await peer.negotiate(CHANNEL)
        with await give_channel(peer) as channel:
            for _ in range(10_000):
                peer.session.config_changed()
            assert not peer.warnings
            whole = bytearray()
            with suppress(BlockingIOError):
                while part := channel.recv(1 << 20):
                    whole += part
            assert 0 < len(whole) < 10_000 * Header.WIRE.size
            assert len(whole) % Header.WIRE.size == 0


async def test_a_channel_that_is_closed_is_given_up() -> None:
    async with connected() as peer:
        await peer.negotiate(CHANNEL)
        (await give_channel(peer)).close()
        peer.session.config_changed()
        peer.session.config_changed()
        assert peer.warnings == ["requests to the front-end end here: [Errno 32] Broken pipe"]
        await peer.settle()


async def test_without_config_nothing_is_told() -> None:
    async with connected() as peer:
        await peer.negotiate(CHANNEL & ~ProtocolFeature.CONFIG)
        with await give_channel(peer) as channel:
            peer.session.config_changed()
            with pytest.raises(BlockingIOError):
                channel.recv(100)


@pytest.mark.parametrize("kind", ["memory", "datagram"])
async def test_a_channel_that_is_no_stream_ends_the_connection(kind: str) -> None:
    async with connected() as peer:
        await peer.negotiate(CHANNEL)
        ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
        with ours, theirs, memory() as file:
            fd = file.fileno() if kind == "memory" else theirs.fileno()
            await peer.send(Request.SET_BACKEND_REQ_FD, None, [fd])
        assert "a Unix stream socket" in await peer.gone()


# --- in-flight logs


async def test_an_area_that_the_front_end_brings_is_recovered_from_once() -> None:
    async with connected() as peer:
        await peer.negotiate(int(ProtocolFeature.INFLIGHT_SHMFD))
        await peer.share_memory()
        await peer.send(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128))
        message = await peer.connection.receive()
        assert message is not None
        with message:
            area = Inflight.from_bytes(message.payload, "test")
            assert area == Inflight(2 * log_stride(128, packed=False), 0, 2, 128)
            assert os.fstat(message.fds[0]).st_size == area.mmap_size
            await peer.send(Request.SET_INFLIGHT_FD, area, [message.fds[0]])
        await peer.describe_ring(1)
        await peer.kick(index=1)
        await peer.send(Request.SET_VRING_ENABLE, VringState(1, 1))
        await peer.kick(index=1)
        await peer.settle()
        log = peer.session.record.queue(1).log
        assert log is not None
        assert (log.offset, log.size) == (
            log_stride(128, packed=False),
            log_stride(128, packed=False),
        )
        assert peer.host.calls == ["memory 1", "recover 1 at 0", "stop 1", "start 1 at 7"]


async def test_a_queue_without_area_gets_a_log_of_ours() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue(255)
        log = peer.session.record.queue(255).log
        assert log is not None
        assert os.fstat(log.fd).st_size >= log.offset + log.size
        assert log.size >= log_stride(128, packed=False)


STRIDE = log_stride(128, packed=False)


@pytest.mark.parametrize(
    ("area", "size", "text"),
    [
        (Inflight(2 * STRIDE - 1, 0, 2, 128), 1 << 20, "mmap size is"),
        (Inflight(2 * STRIDE, 0, 2, 128), STRIDE, "size of the file is"),
        (Inflight(STRIDE, 4096, 1, 128), 4096 + STRIDE - 1, "size of the file is"),
        (Inflight(STRIDE, 8, 1, 128), 1 << 20, "mmap offset is"),
    ],
)
async def test_an_area_that_is_not_all_there_ends_the_connection(
    area: Inflight, size: int, text: str
) -> None:
    async with connected() as peer:
        await peer.negotiate(ProtocolFeature.INFLIGHT_SHMFD)
        with memory(size) as fd:
            await peer.send(Request.SET_INFLIGHT_FD, area, [fd.fileno()])
        assert text in await peer.gone()


async def test_a_queue_larger_than_its_area_ends_the_connection() -> None:
    async with connected() as peer:
        await peer.negotiate(int(ProtocolFeature.INFLIGHT_SHMFD))
        await peer.share_memory()
        with memory(log_stride(64, packed=False)) as file:
            area = Inflight(log_stride(64, packed=False), 0, 1, 64)
            await peer.send(Request.SET_INFLIGHT_FD, area, [file.fileno()])
        await peer.describe_ring(size=128)
        await peer.kick()
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
        assert "queue 0: size is 128" in await peer.gone()


# --- need_reply


async def test_need_reply_is_answered_only_after_it_is_negotiated() -> None:
    async with connected() as peer:
        await peer.send(Request.SET_OWNER, flags=NEED_REPLY)
        await peer.settle()
        await peer.send(Request.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
        assert await peer.acknowledged(Request.SET_OWNER) == 0


async def test_a_message_with_a_reply_has_only_that() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.send(Request.GET_FEATURES, flags=NEED_REPLY)
        message = await peer.connection.receive()
        assert message is not None
        assert message.payload == struct.pack("=Q", FEATURES | TRANSPORT_FEATURES)
        await peer.settle()


async def test_need_reply_tells_of_a_failure_before_the_connection_ends() -> None:
    async with connected() as peer:
        await peer.negotiate()
        assert await peer.acknowledged(Request.SET_VRING_NUM, VringState(0, 0)) == 1
        assert await peer.gone() == (
            "connection closed: SET_VRING_NUM: num is 0: 1 to 32768 entries"
        )


async def test_a_host_that_cannot_serve_a_queue_ends_the_connection() -> None:
    async with connected() as peer:
        peer.host.fail = "no room"
        await peer.negotiate()
        await peer.share_memory()
        await peer.describe_ring()
        await peer.kick()
        assert await peer.acknowledged(Request.SET_VRING_ENABLE, VringState(0, 1)) == 1
        assert (
            await peer.gone() == "connection closed: SET_VRING_ENABLE: request is failed: no room"
        )


async def test_a_broken_queue_is_noted_and_can_be_stopped_and_started_again() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        await peer.start_queue()
        peer.session.queue_broke(0, "descriptor loop")
        assert peer.session.record.queue(0).broken == "descriptor loop"
        assert peer.warnings == ["queue 0 stopped: descriptor loop"]
        await peer.ask(Request.GET_VRING_BASE, VringState(0, 0))
        await peer.kick()
        await peer.settle()
        assert peer.host.running == {0}
        assert peer.session.record.queue(0).broken == ""


# --- what ends the connection


@pytest.mark.parametrize(
    ("region", "size", "text"),
    [
        (Region(0, 8192, USER, 0), 4096, "size of the file is 0x1000"),
        (Region(0, 4096, USER, 4096), 4096, "size of the file is 0x1000"),
        (Region(1, 4096, USER, 0), 8192, "guest is 0x1"),
        (Region(0, 4097, USER, 0), 8192, "size is 0x1001"),
        (Region(0, 4096, USER + 8, 0), 8192, "user is 0x7f0000000008"),
        (Region(0, 4096, USER, 512), 8192, "offset is 0x200"),
    ],
)
async def test_a_region_that_cannot_be_mapped(region: Region, size: int, text: str) -> None:
    async with connected() as peer:
        with memory(size) as file:
            await peer.send(Request.SET_MEM_TABLE, MemoryTable((region,)), [file.fileno()])
        assert f"SET_MEM_TABLE: {text}" in await peer.gone()


async def test_a_descriptor_that_is_no_memory() -> None:
    async with connected() as peer:
        read_end, write_end = os.pipe()
        await peer.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)), [read_end])
        os.close(read_end)
        os.close(write_end)
        assert "SET_MEM_TABLE: descriptor is pipe:" in await peer.gone()


async def test_memory_that_is_read_only() -> None:
    async with connected() as peer:
        with memory() as file:
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
            await peer.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)), [fd])
            os.close(fd)
        assert "not open for both" in await peer.gone()


async def test_a_kick_that_is_no_eventfd() -> None:
    async with connected() as peer:
        with memory() as file:
            await peer.send(Request.SET_VRING_KICK, VringFd(0), [file.fileno()])
        assert "SET_VRING_KICK: descriptor is /memfd:guest" in await peer.gone()


async def test_a_region_that_overlaps_one_that_was_added() -> None:
    async with connected() as peer:
        await peer.negotiate(SLOTS)
        await peer.share_memory()
        with memory() as file:
            again = SingleRegion(Region(REGION.size - 4096, 4096, USER + 2 * REGION.size, 0))
            await peer.send(Request.ADD_MEM_REG, again, [file.fileno()])
        assert "ADD_MEM_REG: region is" in await peer.gone()


async def test_more_regions_than_there_are_slots() -> None:
    async with connected() as peer:
        await peer.negotiate(SLOTS)
        with memory(4096) as file:
            for place in range(MAX_MEM_SLOTS):
                region = SingleRegion(Region(place * 4096, 4096, USER + place * 4096, 0))
                assert await peer.acknowledged(Request.ADD_MEM_REG, region, [file.fileno()]) == 0
            region = SingleRegion(Region(1 << 40, 4096, USER + (1 << 40), 0))
            await peer.send(Request.ADD_MEM_REG, region, [file.fileno()])
        assert "number of regions is 510" in await peer.gone()


@pytest.mark.parametrize(
    "addr",
    [
        VringAddr(0, 0, USER + GUEST_SIZE - 16, USER, USER, 0),
        VringAddr(0, 0, USER, USER - 16, USER, 0),
        VringAddr(0, 0, USER, USER, USER + GUEST_SIZE, 0),
    ],
)
async def test_a_ring_outside_of_memory(addr: VringAddr) -> None:
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(FEATURES))
        await peer.share_memory()
        await peer.send(Request.SET_VRING_NUM, VringState(0, 128))
        await peer.send(Request.SET_VRING_ADDR, addr)
        await peer.kick()
        assert "within one region of memory" in await peer.gone()


@pytest.mark.parametrize(
    ("request_", "payload", "text"),
    [
        (99, None, "request 99: request is 99"),
        (Request.SEND_RARP, None, "SEND_RARP: request is 19"),
        (Request.SET_FEATURES, U64(1 << 25), "SET_FEATURES: features is 0x2000000"),
        (Request.SET_PROTOCOL_FEATURES, U64(1 << 2), "SET_PROTOCOL_FEATURES: features is 0x4"),
        (Request.GET_QUEUE_NUM, None, "only after MQ is negotiated"),
        (Request.GET_CONFIG, Config(0, 4), "only after CONFIG is negotiated"),
        (Request.GET_FEATURES, U64(0), "GET_FEATURES: size is 8"),
        (Request.SET_VRING_ADDR, VringAddr(0, 1, 0, 0, 0, 0), "no log was negotiated"),
    ],
)
async def test_a_message_that_may_not_be_sent(
    request_: int, payload: U64 | Config | VringAddr | None, text: str
) -> None:
    async with connected() as peer:
        await peer.send(request_, payload)
        assert text in await peer.gone()


async def test_a_reply_that_nobody_asked_for() -> None:
    async with connected() as peer:
        await peer.send(Request.GET_FEATURES, flags=1 << 2)
        assert "GET_FEATURES: flags is 0x5" in await peer.gone()


async def test_disconnecting_with_queues_running_leaves_nothing_behind() -> None:
    async with connected() as peer:
        await peer.negotiate()
        await peer.share_memory()
        for index in (0, 5):
            await peer.start_queue(index)
        assert peer.host.running == {0, 5}
    assert peer.host.running == set()


@pytest.mark.parametrize(
    ("size", "base", "text"), [(96, 0, "size is 96"), (128, 1 << 16, "base is 65536")]
)
async def test_what_only_a_packed_ring_may_have(size: int, base: int, text: str) -> None:
    async with connected() as peer:
        await peer.send(Request.SET_FEATURES, U64(FEATURES))
        await peer.share_memory()
        await peer.describe_ring(size=size)
        await peer.send(Request.SET_VRING_BASE, VringState(0, base))
        await peer.kick()
        assert f"queue 0: {text}" in await peer.gone()


async def test_a_packed_ring_has_any_size_and_a_base_with_two_indices() -> None:
    async with connected() as peer:
        cast("FakeDevice", peer.device).features |= Feature.RING_PACKED
        await peer.send(Request.SET_FEATURES, U64(FEATURES | Feature.RING_PACKED))
        await peer.share_memory()
        await peer.describe_ring(size=96)
        await peer.send(Request.SET_VRING_BASE, VringState(0, 0x80008000))
        await peer.kick()
        await peer.settle()
        assert peer.host.calls[-1] == f"start 0 at {0x80008000}"
