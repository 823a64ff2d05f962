"""Messages and descriptors over a real Unix socket."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support.descriptors import open_fds
from vhost.connection import Connection
from vhost.messages import (
    MAX_FDS,
    MAX_PAYLOAD,
    NEED_REPLY,
    U64,
    VERSION,
    Header,
    ProtocolError,
    Request,
    VringFd,
)

FEATURES = Header(Request.SET_FEATURES, VERSION, 8).to_bytes() + U64(5).to_bytes()


@pytest.fixture(params=[False, True], ids=["reads", "looks"])
def peeks(request: pytest.FixtureRequest) -> bool:
    """Whether messages stay in the socket until they are consumed."""
    found: bool = request.param
    return found


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = array.array("i", fds)
    assert sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]) == len(data)


async def test_a_message_may_come_byte_by_byte(
    pair: tuple[socket.socket, socket.socket], peeks: bool
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    waiting = asyncio.create_task(connection.receive())
    for byte in FEATURES:
        await asyncio.sleep(0)
        pair[1].send(bytes([byte]))
    message = await waiting
    assert message is not None
    assert (message.name, message.payload) == ("SET_FEATURES", U64(5).to_bytes())


async def test_messages_that_come_together_are_told_apart(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    pair[1].send(FEATURES * 3)
    for _ in range(3):
        message = await connection.receive()
        assert message is not None
        assert message.payload == U64(5).to_bytes()
        connection.consume(message)


async def test_descriptors_belong_to_the_message_that_they_came_with(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    read_end, write_end = os.pipe()
    kick = Header(Request.SET_VRING_KICK, VERSION, 8).to_bytes() + VringFd(0).to_bytes()
    pair[1].send(FEATURES)
    send_fds(pair[1], kick, [write_end])
    pair[1].send(FEATURES)
    counts = []
    for _ in range(3):
        message = await connection.receive()
        assert message is not None
        connection.consume(message)
        with message:
            counts.append(len(message.fds))
            if message.fds:
                assert not os.get_inheritable(message.fds[0])
                os.write(message.fds[0], b"x")
    assert counts == [0, 1, 0]
    assert os.read(read_end, 2) == b"x"
    os.close(read_end)
    os.close(write_end)


async def test_what_is_sent_is_received(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = Connection(pair[0]), Connection(pair[1])
    read_end, write_end = os.pipe()
    await one.send(Request.SET_VRING_CALL, VringFd(3), [write_end], flags=NEED_REPLY)
    message = await two.receive()
    assert message is not None
    with message:
        assert (message.header.request, message.wants_reply) == (Request.SET_VRING_CALL, True)
        assert VringFd.from_bytes(message.payload, "test") == VringFd(3)
        assert len(message.fds) == 1
    os.close(read_end)
    os.close(write_end)


async def test_the_end_between_messages_is_none(
    pair: tuple[socket.socket, socket.socket], peeks: bool
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    pair[1].close()
    assert await connection.receive() is None


async def test_the_end_within_a_message_is_an_error(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    pair[1].send(FEATURES[:15])
    pair[1].close()
    with pytest.raises(ConnectionResetError):
        await connection.receive()


async def test_half_a_message_times_out_and_leaks_no_descriptor(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks, time_limit=0.01)
    read_end, write_end = os.pipe()
    before = open_fds()
    send_fds(pair[1], FEATURES[:15], [read_end, write_end])
    with pytest.raises(TimeoutError):
        await connection.receive()
    assert open_fds() == before
    os.close(read_end)
    os.close(write_end)


async def test_too_many_descriptors_are_refused_and_closed(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    before = open_fds()
    send_fds(pair[1], FEATURES, [pair[1].fileno()] * (MAX_FDS + 1))
    with pytest.raises(ProtocolError, match="descriptors"):
        await connection.receive()
    assert open_fds() == before


async def test_a_payload_that_is_too_large_is_refused_before_it_is_read(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    pair[1].send(struct.pack("=III", Request.SET_FEATURES, VERSION, MAX_PAYLOAD + 1))
    with pytest.raises(ProtocolError, match="SET_FEATURES: size"):
        await connection.receive()


async def test_a_peer_that_does_not_read_cannot_hold_the_sender(
    pair: tuple[socket.socket, socket.socket],
    peeks: bool,
) -> None:
    connection = Connection(pair[0], peeks=peeks, time_limit=0.01)

    async def send_for_ever() -> None:
        while True:
            await connection.send(Request.SET_FEATURES, U64(0))

    with pytest.raises(TimeoutError):
        await send_for_ever()


async def test_closing_wakes_the_receiver(
    pair: tuple[socket.socket, socket.socket], peeks: bool
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    waiting = asyncio.create_task(connection.receive())
    await asyncio.sleep(0)
    connection.close()
    with pytest.raises(ConnectionResetError):
        await waiting


async def test_what_is_looked_at_stays_until_it_is_consumed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    first, second = Connection(pair[0], peeks=True), Connection(pair[0].dup(), peeks=True)
    kick = Header(Request.SET_VRING_KICK, VERSION, 8).to_bytes() + VringFd(0).to_bytes()
    before = open_fds()
    with os.fdopen(os.memfd_create("kick")) as file:
        send_fds(pair[1], kick, [file.fileno()])
        pair[1].send(FEATURES)
    for connection in (first, second):  # as one process after the other
        message = await connection.receive()
        assert message is not None
        with message:
            assert (message.name, len(message.fds)) == ("SET_VRING_KICK", 1)
            assert connection.looked_at == len(kick)
    second.consume(message)
    assert second.looked_at == 0
    message = await second.receive()
    assert message is not None
    assert (message.name, len(message.fds)) == ("SET_FEATURES", 0)
    assert open_fds() == before
    second.close()


@pytest.mark.parametrize("cut", [5, 12, 15])
async def test_a_message_in_pieces_has_the_descriptors_of_all_of_them_once(
    pair: tuple[socket.socket, socket.socket], peeks: bool, cut: int
) -> None:
    connection = Connection(pair[0], peeks=peeks)
    kick = Header(Request.SET_VRING_KICK, VERSION, 8).to_bytes() + VringFd(0).to_bytes()
    with os.fdopen(os.memfd_create("kick")) as file:
        send_fds(pair[1], kick[:cut], [file.fileno()])
        send_fds(pair[1], kick[cut:], [file.fileno()])
        send_fds(pair[1], kick, [file.fileno()])
    counts = []
    for _ in range(2):
        message = await connection.receive()
        assert message is not None
        connection.consume(message)
        with message:
            counts.append(len(message.fds))
    assert counts == [2, 1]
