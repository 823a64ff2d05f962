"""The device's state on its way through a pipe: out of one session, and into another."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from tests.support.stack import stack
from tests.support.vhost_peer import FEATURES, Peer, connected
from vhost.device_state import FAILED, MAX_STATE, NO_FD
from vhost.frontend import BlkFrontend
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.messages import U64, Config, Feature, ProtocolFeature, Request, StateTransfer
from vhost.payloads import Payload
from vhost.virtio_blk import WRITEBACK

SAVE, LOAD = StateTransfer(StateTransfer.SAVE, 0), StateTransfer(StateTransfer.LOAD, 0)
PROTOCOL = int(ProtocolFeature.DEVICE_STATE | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)
GOOD = {"version": 1, "device": 2, "features": int(FEATURES), "written": {0: 7}}


async def transfer(peer: Peer, how: StateTransfer, fd: int) -> U64:
    await peer.send(Request.SET_DEVICE_STATE_FD, how, [fd])
    message = await peer.connection.receive()
    assert message is not None, peer.warnings
    with message:
        return U64.from_bytes(message.payload, "")


async def saved(peer: Peer) -> bytes:
    """Return the state of a session."""
    reading, writing = os.pipe()
    assert await transfer(peer, SAVE, writing) == U64(NO_FD)
    os.close(writing)
    assert await peer.ask(Request.CHECK_DEVICE_STATE) == U64(0)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read()


async def loaded(peer: Peer, state: bytes) -> Payload:
    """Have a session load a state, and return what it says of it."""
    reading, writing = os.pipe()
    assert await transfer(peer, LOAD, reading) == U64(NO_FD)
    os.close(reading)
    os.set_blocking(writing, False)
    with os.fdopen(writing, "wb", buffering=0) as pipe:
        rest = memoryview(state)
        while rest:
            rest = rest[pipe.write(rest) or 0 :]
            await peer.settle()
    return await peer.ask(Request.CHECK_DEVICE_STATE)


async def test_what_was_written_goes_to_the_next_session() -> None:
    async with connected() as source:
        await source.negotiate(PROTOCOL)
        await source.send(Request.SET_CONFIG, Config(0, 1, 0, b"a"))
        state = await saved(source)
    async with connected() as destination:
        await destination.negotiate(PROTOCOL)
        assert await loaded(destination, state) == U64(0)
        answer = await destination.ask(Request.GET_CONFIG, Config(0, 4))
        assert isinstance(answer, Config)
        assert answer.data == b"a\x01\x02\x03"


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (b"", "truncated"),
        (b"\xc1" * 8, "malformed"),
        ({**GOOD, "version": 2}, "Invalid enum value 2"),
        ({**GOOD, "device": 8}, "of a device of type 8, not 2"),
        ({**GOOD, "features": -1}, "features are -1"),
        ({**GOOD, "more": 1}, "unknown field `more`"),
        ({**GOOD, "written": {0: 256}}, "byte 0 of the configuration space is 256"),
        ({**GOOD, "written": {-1: 0}}, "byte -1 of the configuration space"),
        ({**GOOD, "written": {5: 0}}, "SET_CONFIG: offset is 5"),
        ({"version": 1}, "missing required field `device`"),
        (b"\xc0" * (MAX_STATE + 1), f"more than {MAX_STATE} bytes"),
    ],
)
async def test_what_is_no_state_of_ours_is_refused(state: Any, why: str) -> None:
    raw = state if isinstance(state, bytes) else msgspec.msgpack.encode(state)
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        assert await loaded(peer, raw) == U64(FAILED)
        assert why in peer.warnings[-1]
        assert peer.session.record.written == {}


@pytest.mark.parametrize("how", [SAVE, LOAD])
async def test_a_device_that_runs_has_no_state_to_transfer(how: StateTransfer) -> None:
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        await peer.share_memory()
        await peer.start_queue()
        ends = os.pipe()
        assert await transfer(peer, how, ends[how.direction == StateTransfer.SAVE]) == U64(
            NO_FD | FAILED
        )
        assert await peer.ask(Request.CHECK_DEVICE_STATE) == U64(FAILED)
        for end in ends:
            os.close(end)


async def test_what_is_no_pipe_ends_the_connection() -> None:
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        fd = os.memfd_create("state")
        await peer.send(Request.SET_DEVICE_STATE_FD, SAVE, [fd])
        os.close(fd)
        assert "an end of a pipe" in await peer.gone()


async def test_a_transfer_that_never_ends_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhost.device_state.TIME_LIMIT", 0.05)
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        reading, writing = os.pipe()
        await transfer(peer, LOAD, reading)
        assert await peer.ask(Request.CHECK_DEVICE_STATE) == U64(FAILED)
        os.close(reading)
        os.close(writing)


async def test_a_front_end_that_goes_in_between_leaves_nothing() -> None:
    reading, writing = os.pipe()
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        await transfer(peer, LOAD, reading)
    os.close(reading)
    os.close(writing)


async def test_the_cache_mode_of_a_disk_moves_with_its_guest() -> None:
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call("vhost_create_blk_controller", ctrlr="b", dev_name="m")

        def connect() -> BlkFrontend:
            wanted = WANTED_PROTOCOL | ProtocolFeature.DEVICE_STATE
            return BlkFrontend.connect(target.socket("b"), protocol_features=wanted)

        def move() -> tuple[BlkFrontend, BlkFrontend]:
            source, destination = connect(), connect()
            source.write_config(WRITEBACK, b"\0")
            for disk, how in ((source, SAVE), (destination, LOAD)):
                disk.stop()
                end = pipe[0] if how == LOAD else pipe[1]
                disk.raw.send(Request.SET_DEVICE_STATE_FD, how, [end])
                reply = disk.raw.receive()
                assert U64.from_bytes(reply.data, "") == U64(NO_FD)
                os.close(end)
                assert disk.raw.number(Request.CHECK_DEVICE_STATE) == 0
            destination.start()
            destination.refresh_config()
            return source, destination

        pipe = os.pipe()
        fronts = await target.in_thread(move)
        assert fronts[1].config.writeback == 0
        assert Feature.VERSION_1 & fronts[1].features
        await target.close(*fronts)
