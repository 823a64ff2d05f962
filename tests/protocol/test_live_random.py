"""Whatever a front-end sends to a running target, and has in its memory: nothing is left of it.

The messages are those of test_vhost_session_random; here a reactor serves what they describe.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.test_vhost_session_random import Step, steps
from tests.support.stack import Stack, stack
from tests.support.vhost_peer import FEATURES, GUEST_SIZE, REGION, ring
from tests.support.waiting import PATIENCE, wait_until
from vhost.connection import Connection
from vhost.frontend import BlkFrontend
from vhost.messages import NEED_REPLY, U64, MemoryTable, Request, VringFd, VringState
from vhost.session import PROTOCOL_FEATURES

DATA = bytes(range(256)) * 16

# What has two queues served, which chance would seldom bring about.
RUNNING: list[Step] = [
    (Request.SET_FEATURES, U64(FEATURES), ()),
    (Request.SET_MEM_TABLE, MemoryTable((REGION,)), ("memory",)),
]
for index in range(2):
    RUNNING += [
        (Request.SET_VRING_NUM, VringState(index, 128), ()),
        (Request.SET_VRING_ADDR, ring(index), ()),
        (Request.SET_VRING_CALL, VringFd(index), ("eventfd",)),
        (Request.SET_VRING_KICK, VringFd(index), ("eventfd",)),
    ]


class Live:
    """A target in a thread of its own, and a guest whose disk is to go on working."""

    def __init__(self, target: Stack, loop: asyncio.AbstractEventLoop) -> None:
        self.target = target
        self._loop = loop
        self.guest = BlkFrontend.connect(target.socket("b"))
        self.guest.write(0, DATA)
        self.pid = target.cluster.reactors[0].pid

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something in the target's event loop."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def holds(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """Return descriptors of both processes, and what the reactor has mapped, by kind."""
        maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        mapped = Counter(line.split("/", 1)[1] for line in maps if "/memfd:" in line)
        return descriptors("self"), descriptors(self.pid), mapped


def descriptors(pid: object) -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found[os.readlink(entry.path).split(":[")[0]] += 1
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    ready: list[Live] = []
    up, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with stack() as target:
            await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
            await target.call("vhost_create_blk_controller", ctrlr="b", dev_name="m")
            ready.append(await asyncio.to_thread(Live, target, loop))
            await play(target, RUNNING, 0x80)  # a reactor connects when it first reports something
            up.set()
            await over.wait()
            await target.close(ready[0].guest)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(PATIENCE)
    yield ready[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(PATIENCE)


async def play(target: Stack, sequence: Sequence[Step], fill: int) -> None:
    """Be a front-end that sends these messages, with memory full of the same byte, and goes."""
    fds = {"memory": os.memfd_create("hostile"), "eventfd": os.eventfd(1)}
    fds["pipe"], fds["other end"] = os.pipe()
    fds["stream"], fds["its peer"] = (end.detach() for end in socket.socketpair())
    os.write(fds["memory"], bytes([fill]) * GUEST_SIZE)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(target.socket("b"))
    connection = Connection(sock)
    replies = asyncio.create_task(read_all(connection))
    try:
        await connection.send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
        for place, (request, payload, kinds) in enumerate(sequence):
            flags = NEED_REPLY if place % 2 else 0
            await connection.send(request, payload, [fds[kind] for kind in kinds], flags=flags)
        sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass  # one of them has ended the connection
    await replies
    connection.close()
    for fd in fds.values():
        os.close(fd)
    await target.until(lambda: len(target.sessions()) == 1)


async def read_all(connection: Connection) -> None:
    try:
        while (message := await connection.receive()) is not None:
            message.fds.close()
    except ConnectionResetError:
        pass


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([[], RUNNING]),
    st.lists(steps, max_size=25),
    st.sampled_from([0x00, 0x01, 0x80, 0xFF]),
)
def test_any_front_end_leaves_a_running_target_as_it_was(
    live: Live, first: Sequence[Step], then: Sequence[Step], fill: int
) -> None:
    before = live.holds()
    live.run(play(live.target, [*first, *then], fill))
    wait_until(  # a reactor unmaps when it gets to it
        lambda: live.holds() == before,
        lambda: [(now - then, then - now) for now, then in zip(live.holds(), before, strict=True)],
    )
    assert live.target.cluster.reactors[0].pid == live.pid
    assert live.guest.read(0, len(DATA)) == DATA
