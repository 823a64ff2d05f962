"""Post-copy migration: the messages, and disks whose driver's memory is still to come."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.postcopy import Destination, Image, go_on
from tests.support.stack import CPUS, Stack, stack
from tests.support.vhost_peer import REGION, Peer, connected, memory
from vhost import postcopy
from vhost.frontend import WANTED_FEATURES, BlkFrontend
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.frontend_memory import PAGE
from vhost.messages import (
    U64,
    Feature,
    MemoryTable,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringState,
)
from vhost.virtio_blk import BlkRequest

pytestmark = pytest.mark.skipif(
    not postcopy.features(), reason="this user may not have the kernel wait for pages"
)

PROTOCOL = ProtocolFeature.PAGEFAULT | ProtocolFeature.REPLY_ACK
SLOTS = PROTOCOL | ProtocolFeature.CONFIGURE_MEM_SLOTS


# --- messages -------------------------------------------------------------------------------------


async def advised(peer: Peer, protocol: int = PROTOCOL) -> None:
    await peer.negotiate(protocol)
    await peer.send(Request.POSTCOPY_ADVISE)
    message = await peer.connection.receive()
    assert message is not None, peer.warnings
    with message:
        assert (message.payload, len(message.fds)) == (b"", 1)


async def listening(peer: Peer, protocol: int = PROTOCOL) -> None:
    await advised(peer, protocol)
    assert await peer.acknowledged(Request.POSTCOPY_LISTEN) == 0


async def share_memory(peer: Peer) -> MemoryTable:
    """Send the memory, and return what the back-end answers."""
    with memory() as fd:
        await peer.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)), [fd.fileno()])
    message = await peer.connection.receive()
    assert message is not None, peer.warnings
    return MemoryTable.from_bytes(message.payload, "SET_MEM_TABLE")


async def test_memory_is_answered_with_its_addresses_and_used_once_that_is_confirmed() -> None:
    async with connected() as peer:
        await listening(peer)
        table = await share_memory(peer)
        assert [(each.guest, each.size, each.user) for each in table.regions] == [
            (REGION.guest, REGION.size, 0x1000 + REGION.guest)
        ]
        await peer.describe_ring()
        await peer.kick()
        await peer.kick(Request.SET_VRING_CALL)
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
        await peer.settle()
        assert peer.host.running == set()
        await peer.send(Request.SET_MEM_TABLE, U64(0))
        await peer.settle()
        assert peer.host.running == {0}


async def test_regions_that_are_added_are_answered_one_by_one() -> None:
    async with connected() as peer:
        await listening(peer, SLOTS)
        for number in range(2):
            region = SingleRegion(REGION.__class__(number << 32, REGION.size, number << 33, 0))
            with memory() as fd:
                await peer.send(Request.ADD_MEM_REG, region, [fd.fileno()])
            message = await peer.connection.receive()
            assert message is not None, peer.warnings
            answer = SingleRegion.from_bytes(message.payload, "ADD_MEM_REG").region
            assert answer.user == 0x1000 + (number << 32)
        await peer.send(Request.ADD_MEM_REG, U64(0))
        await peer.settle()
        assert not peer.session.record.unconfirmed


async def test_memory_that_changes_meanwhile_is_confirmed_anew() -> None:
    async with connected() as peer:
        await listening(peer)
        await share_memory(peer)
        await peer.send(Request.SET_MEM_TABLE, U64(0))
        await peer.start_queue()
        await share_memory(peer)
        assert peer.host.running == set()
        await peer.send(Request.SET_MEM_TABLE, U64(0))
        await peer.settle()
        assert peer.host.running == {0}


async def test_memory_from_before_is_not_used_until_it_is_sent_again() -> None:
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        await peer.share_memory()
        await advised(peer)
        assert await peer.acknowledged(Request.POSTCOPY_LISTEN) == 0
        await peer.describe_ring()
        await peer.kick()
        await peer.send(Request.SET_VRING_ENABLE, VringState(0, 1))
        await peer.settle()
        assert peer.host.running == set()


async def test_the_end_is_answered_when_queues_are_served_as_others() -> None:
    async with connected() as peer:
        await listening(peer)
        assert await peer.ask(Request.POSTCOPY_END) == U64(0)
        assert peer.host.calls[-1] == "end post-copy"
        await peer.share_memory()  # which has no answer any more
        await peer.start_queue()


async def test_a_front_end_that_is_not_ready_ends_the_connection() -> None:
    async with connected() as peer:
        await listening(peer)
        await share_memory(peer)
        await peer.send(Request.SET_MEM_TABLE, U64(1))
        assert "SET_MEM_TABLE: result" in await peer.gone()


@pytest.mark.parametrize(
    "requests",
    [
        [Request.POSTCOPY_LISTEN],
        [Request.POSTCOPY_END],
        [Request.POSTCOPY_ADVISE, Request.POSTCOPY_ADVISE],
        [Request.POSTCOPY_ADVISE, Request.POSTCOPY_LISTEN, Request.POSTCOPY_LISTEN],
    ],
)
async def test_messages_in_another_order_end_the_connection(requests: list[Request]) -> None:
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        for request in requests:
            await peer.send(request)
        while (message := await peer.connection.receive()) is not None:
            message.fds.close()
        assert "state is" in peer.warnings[-1]


async def test_a_queue_that_runs_cannot_become_one_of_post_copy() -> None:
    async with connected() as peer:
        await peer.negotiate(PROTOCOL)
        await peer.share_memory()
        await peer.start_queue()
        await peer.send(Request.POSTCOPY_ADVISE)
        assert "a queue runs" in await peer.gone()


async def test_a_front_end_that_goes_meanwhile_has_its_process_killed() -> None:
    async with connected() as peer:
        await advised(peer)
        peer.connection.close()
    assert peer.host.calls[-1] == "drop"


# --- disks ----------------------------------------------------------------------------------------


@asynccontextmanager
async def disks(kind: str, tmp_path: Path) -> AsyncIterator[Stack]:
    """Serve "b0", of a kind, and "other" on the same reactor."""
    async with stack(CPUS[:1]) as made:
        if kind == "malloc":
            await made.call("bdev_malloc_create", name="D0", num_blocks=8192, block_size=512)
        else:
            path = tmp_path / "disk"
            path.write_bytes(bytes(4 << 20))
            await made.call("bdev_uring_create", name="D0", filename=str(path), block_size=512)
        await made.call("bdev_malloc_create", name="M1", num_blocks=8192, block_size=512)
        for ctrlr, name in (("b0", "D0"), ("other", "M1")):
            await made.call(
                "vhost_create_blk_controller", ctrlr=ctrlr, dev_name=name, packed_ring=True
            )
        yield made


def connect(target: Stack, packed: bool = False) -> BlkFrontend:
    return BlkFrontend.connect(
        target.socket("b0"),
        queue_size=64,
        memory=4 << 20,
        regions=2,
        packed=packed,
        features=WANTED_FEATURES & ~Feature.EVENT_IDX,
        protocol_features=WANTED_PROTOCOL | ProtocolFeature.PAGEFAULT,
    )


class Requests:
    """Requests that stand in the ring when the guest moves, each in pages of its own."""

    COUNT = 8

    def __init__(self, front: BlkFrontend) -> None:
        self.front = front
        self.written = [os.urandom(512) for _ in range(self.COUNT)]
        self.known = os.urandom(self.COUNT * 512)
        front.write(1 << 20, self.known)
        front.stop()
        memory = front.memory
        self.margins: list[int] = []
        self.pending = []
        for number in range(self.COUNT):
            # A margin of bytes that the device never touches, in the pages that it writes.
            margin = memory.allocate(PAGE)
            memory.write(margin, bytes([number + 1]) * PAGE)
            self.margins.append(margin)
            self.pending.append(front.submit(BlkRequest.OUT, number, self.written[number]))
            self.pending.append(front.submit(BlkRequest.IN, 2048 + number, length=512))

    def check(self) -> None:
        """Look at everything, now that all of the memory is here."""
        self.front.poll()
        assert all(pending.done and pending.status == 0 for pending in self.pending)
        read = b"".join(pending.data for pending in self.pending[1::2])
        assert read == self.known
        for number, margin in enumerate(self.margins):
            assert self.front.memory.read(margin, PAGE) == bytes([number + 1]) * PAGE


def served(target: Stack) -> bool:
    (session,) = [each for each in target.sessions() if each["queues"]]
    statistics = session["queues"][0]["statistics"]
    return (
        statistics is not None
        and statistics["requests"] >= 2 * Requests.COUNT
        and statistics["in_flight"] == 0
    )


@pytest.mark.parametrize(
    ("kind", "packed", "slots"),
    [
        pytest.param("malloc", False, False, id="malloc-split-table"),
        pytest.param("file", True, True, id="file-packed-slots"),
        pytest.param("file", False, True, id="file-split-slots"),
    ],
)
async def test_requests_are_served_in_memory_that_is_still_to_come(
    tmp_path: Path, kind: str, packed: bool, slots: bool
) -> None:
    """Every page that the device touches is asked for; none is taken for one of zeroes."""
    async with disks(kind, tmp_path) as target:
        front = await target.in_thread(lambda: connect(target, packed))
        requests = await target.in_thread(lambda: Requests(front))
        destination = await target.in_thread(lambda: go_on(front, Image(front.memory), slots=slots))
        await target.in_thread(front.start)
        await target.until(lambda: served(target))
        (session,) = target.sessions()
        assert session["queues"][0]["reactor"] == "postcopy-0"
        assert len(set(destination.asked)) > 3
        await target.in_thread(destination.give_all)
        assert await target.in_thread(lambda: front.raw.number(Request.POSTCOPY_END)) == 0
        requests.check()
        (session,) = target.sessions()
        assert session["queues"][0]["reactor"] == f"reactor-{CPUS[0]}"
        assert target.cluster.lent == []
        # What the one that was lent has done is not forgotten.
        assert session["queues"][0]["statistics"]["requests"] >= 2 * Requests.COUNT
        (disk,) = (await target.call("vhost_get_iostat", ctrlr="b0"))["controllers"]
        assert disk["num_read_ops"] >= Requests.COUNT

        def go_on_as_ever() -> None:
            front.write(0, b"a" * 4096)
            assert front.read(0, 4096) == b"a" * 4096

        await target.in_thread(go_on_as_ever)
        destination.close()
        await target.close(front)


async def withhold(target: Stack) -> tuple[BlkFrontend, Destination]:
    """Move a guest whose first request waits for a page that does not come."""
    front = await target.in_thread(lambda: connect(target))
    await target.in_thread(lambda: Requests(front))
    destination = await target.in_thread(lambda: go_on(front, Image(front.memory)))
    part = len(destination.image.parts[0])
    ring = {front.queues[0].desc, front.queues[0].avail, front.queues[0].used}
    start = front.memory.regions[0].guest
    rings = {(address - start) // PAGE * PAGE for address in ring}
    pages = {(0, offset) for offset in range(0, part, PAGE) if offset not in rings}
    destination.withheld = pages | {(1, offset) for offset in range(0, part, PAGE)}
    await target.in_thread(front.start)
    await target.until(lambda: any(page in destination.withheld for page in destination.asked))
    return front, destination


async def test_a_page_that_does_not_come_stops_nobody_else(tmp_path: Path) -> None:
    async with disks("malloc", tmp_path) as target:
        front, destination = await withhold(target)

        def use_the_other() -> None:
            with BlkFrontend.connect(target.socket("other")) as other:
                other.write(0, b"x" * 65536)
                assert other.read(0, 65536) == b"x" * 65536

        await target.in_thread(use_the_other)
        await target.until(lambda: len(target.sessions()) == 1)
        await target.in_thread(destination.release)
        await target.until(lambda: served(target))
        destination.close()
        await target.close(front)


async def test_a_front_end_that_goes_while_a_page_is_missing_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with disks("malloc", tmp_path) as target:
        front, destination = await withhold(target)
        (lent,) = target.cluster.lent
        process = psutil.Process(lent.pid)
        front.raw.close()
        await target.until(lambda: not target.sessions())
        assert not process.is_running()
        assert target.cluster.lent == []
        destination.close()
        front.close()


async def test_the_death_of_the_process_ends_the_connection(tmp_path: Path) -> None:
    async with disks("malloc", tmp_path) as target:
        front, destination = await withhold(target)
        (lent,) = target.cluster.lent
        psutil.Process(lent.pid).kill()
        await target.until(lambda: not target.sessions())
        assert not front.raw.alive()
        assert target.cluster.lent == []
        destination.close()
        front.close()


async def test_queues_stay_where_they_are_until_the_end(tmp_path: Path) -> None:
    async with disks("malloc", tmp_path) as target:
        front, destination = await withhold(target)
        with pytest.raises(Exception, match="post-copy"):
            await target.call("vhost_controller_move", ctrlr="b0", cpumask=hex(1 << CPUS[0]))
        await target.in_thread(destination.release)
        await target.until(lambda: served(target))
        destination.close()
        await target.close(front)
