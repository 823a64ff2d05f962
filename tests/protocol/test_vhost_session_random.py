"""Whatever a front-end sends, a session neither fails unplanned nor leaks a descriptor."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.vhost_peer import FEATURES, GUEST_SIZE, USER, Peer, connected, ring
from vhost.descriptors import log_stride
from vhost.messages import (
    MESSAGES,
    NEED_REPLY,
    U64,
    Config,
    Feature,
    Inflight,
    Log,
    MemoryTable,
    Payload,
    Region,
    Request,
    SingleRegion,
    StateTransfer,
    VringFd,
    VringState,
)
from vhost.session import PROTOCOL_FEATURES

PROTOCOL, LOG_ALL = Feature.PROTOCOL_FEATURES, Feature.LOG_ALL

Step = tuple[int, Payload | None, Sequence[str]]

indices = st.integers(0, 3)
# Mostly what a sane front-end could send, in any order: garbage would end the connection at once.
pages = st.integers(0, 4).map(lambda page: page * 4096)
regions = st.builds(
    lambda at, size: Region(at, size, USER + at, 0),
    st.sampled_from([0, GUEST_SIZE, 4096]),
    st.sampled_from([GUEST_SIZE, 4096, 4096 * 256]),
)
states = st.builds(VringState, indices, st.sampled_from([0, 1, 2, 64, 128, 3]))
steps: st.SearchStrategy[Step] = st.one_of(
    st.tuples(
        st.sampled_from(
            [r for r, known in MESSAGES.items() if known.payload is None and not known.fds[0]]
        ),
        st.none(),
        st.just(()),
    ),
    st.tuples(
        st.just(Request.SET_FEATURES),
        st.sampled_from([0, FEATURES, FEATURES | PROTOCOL, FEATURES | PROTOCOL | LOG_ALL]).map(U64),
        st.just(()),
    ),
    st.tuples(
        st.just(Request.SET_MEM_TABLE),
        regions.map(lambda region: MemoryTable((region,))),
        st.sampled_from([("memory",), ("memory",), ("memory",), ("pipe",), ()]),
    ),
    st.tuples(
        st.sampled_from([Request.ADD_MEM_REG, Request.REM_MEM_REG]),
        regions.map(SingleRegion),
        st.just(("memory",)),
    ),
    st.tuples(
        st.sampled_from(
            [
                Request.SET_VRING_NUM,
                Request.SET_VRING_BASE,
                Request.GET_VRING_BASE,
                Request.SET_VRING_ENABLE,
            ]
        ),
        states,
        st.just(()),
    ),
    st.tuples(
        st.just(Request.SET_DEVICE_STATE_FD),
        st.builds(StateTransfer, st.sampled_from([0, 0, 1, 2]), st.just(0)),
        st.sampled_from([("pipe",), ("other end",), ("memory",)]),
    ),
    st.tuples(
        st.just(Request.VRING_KICK),
        st.builds(VringState, st.sampled_from([0, 1, 2, 300]), st.just(0)),
        st.just(()),
    ),
    st.tuples(st.just(Request.SET_VRING_ADDR), indices.map(ring), st.just(())),
    st.tuples(
        st.sampled_from([Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]),
        indices.map(VringFd),
        st.sampled_from([("eventfd",), ("eventfd",), ("eventfd",), ("memory",)]),
    ),
    st.tuples(
        st.sampled_from([Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]),
        indices.map(lambda index: VringFd(index, no_fd=True)),
        st.just(()),
    ),
    st.tuples(
        st.just(Request.SET_INFLIGHT_FD),
        st.builds(
            Inflight, st.just(4 * log_stride(128, packed=False)), pages, st.just(4), st.just(128)
        ),
        st.just(("memory",)),
    ),
    st.tuples(
        st.just(Request.GET_INFLIGHT_FD),
        st.builds(Inflight, st.just(0), st.just(0), indices, st.just(128)),
        st.just(()),
    ),
    st.tuples(
        st.just(Request.SET_BACKEND_REQ_FD),
        st.none(),
        st.sampled_from([("stream",), ("stream",), ("pipe",)]),
    ),
    st.tuples(
        st.just(Request.SET_LOG_BASE),
        st.builds(Log, st.sampled_from([1, GUEST_SIZE // 4096 // 8, 1 << 20]), st.just(0)),
        st.just(("memory",)),
    ),
    st.tuples(st.just(Request.SET_LOG_FD), st.none(), st.sampled_from([("eventfd",), ("pipe",)])),
    st.tuples(st.sampled_from([Request.RESET_DEVICE, Request.GET_STATUS]), st.none(), st.just(())),
    st.tuples(st.just(Request.SET_STATUS), st.integers(0, 20).map(U64), st.just(())),
    st.tuples(
        st.sampled_from([Request.GET_CONFIG, Request.SET_CONFIG]),
        st.builds(Config, st.integers(0, 70), st.just(2), st.just(0), st.just(b"ab")),
        st.just(()),
    ),
    st.tuples(
        st.integers(0, 50),
        st.binary(max_size=80).map(lambda data: Config(0, 0, 0, data)),
        st.lists(st.sampled_from(["memory", "eventfd", "pipe"]), max_size=3),
    ),
)


async def play(steps: Sequence[Step]) -> None:
    """Send every step; the back-end may close the connection at any of them."""
    fds = {"memory": os.memfd_create("guest"), "eventfd": os.eventfd(0)}
    fds["pipe"], fds["other end"] = os.pipe()
    fds["stream"], fds["its peer"] = (end.detach() for end in socket.socketpair())
    os.ftruncate(fds["memory"], GUEST_SIZE)
    try:
        await play_with(fds, steps)
    finally:
        for fd in fds.values():
            os.close(fd)


async def play_with(fds: dict[str, int], steps: Sequence[Step]) -> None:
    async with connected() as peer:
        reader = asyncio.create_task(drain(peer))
        await peer.send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
        try:
            for place, (request, payload, kinds) in enumerate(steps):
                flags = NEED_REPLY if place % 2 else 0
                await peer.send(request, payload, [fds[kind] for kind in kinds], flags)
        except (BrokenPipeError, ConnectionResetError):
            assert peer.warnings
        peer.socket.shutdown(socket.SHUT_WR)
        await reader


async def drain(peer: Peer) -> None:
    """Read replies until the back-end closes."""
    try:
        while (message := await peer.connection.receive()) is not None:
            message.fds.close()
    except ConnectionResetError:
        pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=30))
def test_any_sequence_of_messages_leaves_nothing_behind(steps: Sequence[Step]) -> None:
    asyncio.run(play(steps))
