"""What a front-end may do wrong, against a running cluster: it pays for it alone, and is told so.

Each test harms a disk of its own; ``neighbour`` is served by the same reactor, and must go on. What
the parts make of bad input, value by value, is in tests/unit (messages, rings) and
test_vhost_session.py.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import running_cluster
from tests.support.cluster import Cluster
from tests.support.waiting import PATIENCE, wait_until
from vhost.frontend import BlkFrontend
from vhost.frontend_link import FrontendError, Link
from vhost.frontend_memory import DriverQueue
from vhost.messages import VERSION, Header, Request
from vhost.payloads import U64, MemoryTable, Region, VringFd, VringState

NEXT, WRITE, INDIRECT, AVAIL = 1, 2, 4, 1 << 7
PAGE = 4096
NUMBERS = itertools.count()


@dataclass
class Street:
    """A cluster of one reactor with a disk "neighbour", and one that is to be harmed."""

    cluster: Cluster
    neighbour: BlkFrontend
    reactors: dict[int, int]
    name: str = ""
    """Of the victim: another for each test, since each controller may log so many lines only."""

    @property
    def victim(self) -> str:
        """The socket of the disk that is to be harmed."""
        return str(self.cluster.socket(self.name))

    def sessions(self, name: str) -> list[dict[str, Any]]:
        """Return the descriptions of those who are connected to a disk."""
        (controller,) = self.cluster.rpc("vhost_get_controllers", name=name)
        found: list[dict[str, Any]] = controller["sessions"]
        return found

    def build(self, name: str) -> None:
        """Serve a disk of 1 MiB."""
        self.cluster.rpc("bdev_malloc_create", name=name, num_blocks=2048, block_size=512)
        self.cluster.rpc("vhost_create_blk_controller", ctrlr=name, dev_name=name, packed_ring=True)

    def tear_down(self, name: str) -> None:
        """Serve it no more, once its front-ends are gone."""
        wait_until(lambda: not self.sessions(name))
        self.cluster.rpc("vhost_delete_controller", ctrlr=name)
        self.cluster.rpc("bdev_malloc_delete", name=name)

    def said(self, text: str, since: int) -> bool:
        """Wait for ``text`` in what the cluster has logged after ``since`` characters."""
        wait_until(
            lambda: text in self.cluster.log[since:],
            lambda: f"{text!r} is not in the log:\n{self.cluster.log[since:]}",
        )
        return True

    def check(self) -> None:
        """Nothing but the victim has noticed anything."""
        assert self.cluster.reactors() == self.reactors, self.cluster.log
        block = os.urandom(512)
        self.neighbour.write(512, block)
        assert self.neighbour.read(512, 512) == block
        assert not self.neighbour.queues[0].broken()
        # And the victim's socket takes the next front-end as if nothing had happened.
        with BlkFrontend.connect(self.victim) as next_one:
            next_one.write(0, block)
            assert next_one.read(0, 512) == block


@pytest.fixture(scope="module")
def running(cpus: list[int]) -> Iterator[Street]:
    with running_cluster(cpus=cpus[:1]) as cluster:
        street = Street(cluster, None, cluster.reactors())  # type: ignore[arg-type]
        street.build("neighbour")
        with BlkFrontend.connect(cluster.socket("neighbour")) as street.neighbour:
            yield street


@pytest.fixture
def street(running: Street) -> Iterator[Street]:
    running.name = f"victim-{next(NUMBERS)}"
    running.build(running.name)
    yield running
    running.check()
    running.tear_down(running.name)


# --- messages -----------------------------------------------------------------------------------


def message(request: int, body: bytes, *, size: int | None = None, flags: int = VERSION) -> bytes:
    return Header(request, flags, len(body) if size is None else size).to_bytes() + body


KICK = message(Request.SET_VRING_KICK, VringFd(0).to_bytes())


def table(*regions: Region) -> bytes:
    return message(Request.SET_MEM_TABLE, MemoryTable(regions).to_bytes())


def region(guest: int, size: int = PAGE, user: int | None = None) -> Region:
    return Region(guest, size, guest if user is None else user, 0)


MALFORMED: dict[str, tuple[bytes, int, str]] = {  # bytes, descriptors of memory, what is said
    "no version": (message(Request.GET_FEATURES, b"", flags=0), 0, "GET_FEATURES: flags is 0x0"),
    "unknown": (message(99, b""), 0, "request 99"),
    "a reply": (message(Request.GET_FEATURES, b"", flags=VERSION | 4), 0, "flags is 0x5"),
    "too short": (message(Request.SET_FEATURES, bytes(4)), 0, "SET_FEATURES: size is 4"),
    "too long": (message(Request.SET_FEATURES, bytes(16)), 0, "SET_FEATURES: size is 16"),
    "no end": (message(Request.SET_FEATURES, b"", size=1 << 30), 0, "size is 1073741824"),
    "too few descriptors": (KICK, 0, "SET_VRING_KICK: number of descriptors is 0"),
    "too many descriptors": (KICK, 2, "SET_VRING_KICK: number of descriptors is 2"),
    "descriptors for nothing": (
        message(Request.SET_FEATURES, U64(0).to_bytes()),
        1,
        "SET_FEATURES: number of descriptors is 1",
    ),
    "more descriptors than any message has": (KICK, 20, "descriptors"),
    "a kick that is memory": (KICK, 1, "SET_VRING_KICK: descriptor is /memfd:bad"),
    "a region without memory": (table(region(0)), 0, "SET_MEM_TABLE: number of descriptors is 0"),
    "a region of no bytes": (table(region(0, 0)), 1, "region 0.size is 0"),
    "a region that overflows": (table(region(-PAGE % (1 << 64), 2 * PAGE)), 1, "region 0.guest is"),
    "a region larger than its file": (table(region(0, 1 << 40)), 1, "size of the file is"),
    "regions that overlap": (
        table(region(0, 2 * PAGE), region(PAGE, PAGE, 1 << 40)),
        2,
        "region 1 is 0x1000",
    ),
    "a queue that is not": (
        message(Request.SET_VRING_NUM, VringState(5000, 128).to_bytes()),
        0,
        "index is 5000",
    ),
    "a queue of no entries": (
        message(Request.SET_VRING_NUM, VringState(0, 0).to_bytes()),
        0,
        "num is 0",
    ),
}


@pytest.mark.parametrize(("data", "count", "text"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_ends_its_connection(
    street: Street, data: bytes, count: int, text: str
) -> None:
    since = len(street.cluster.log)
    fds = [os.memfd_create("bad") for _ in range(count)]
    for fd in fds:
        os.ftruncate(fd, 2 * PAGE)
    link = Link(street.victim)
    try:
        link.send_bytes(data, fds)
        wait_until(lambda: not link.alive())
    finally:
        link.close()
        for fd in fds:
            os.close(fd)
    assert street.said(text, since)


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "eventfd", "read-only"])
def test_what_is_no_memory_ends_the_connection(street: Street, tmp_path: Path, kind: str) -> None:
    since = len(street.cluster.log)
    fds = open_no_memory(kind, tmp_path)
    link = Link(street.victim)
    try:
        link.send_bytes(table(region(0)), fds[:1])
        wait_until(lambda: not link.alive())
    finally:
        link.close()
        for fd in fds:
            os.close(fd)
    assert street.said("SET_MEM_TABLE: descriptor is", since)


def open_no_memory(kind: str, path: Path) -> list[int]:
    """Return descriptors, the first of which is of that kind."""
    if kind == "pipe":
        return list(os.pipe())
    if kind == "socket":
        return [end.detach() for end in socket.socketpair()]
    if kind == "directory":
        return [os.open(path, os.O_RDONLY)]
    if kind == "eventfd":
        return [os.eventfd(0)]
    file = path / "file"
    file.write_bytes(bytes(PAGE))
    return [os.open(file, os.O_RDONLY)]


def test_half_a_message_is_not_waited_for_by_others(street: Street) -> None:
    since = len(street.cluster.log)
    link = Link(street.victim)
    try:
        link.send_bytes(message(Request.SET_FEATURES, bytes(8))[:15])
        street.check()  # while the rest is missing
    finally:
        link.close()
    assert street.said("within a message", since)


def test_many_bad_connections_are_a_few_lines(street: Street) -> None:
    control = psutil.Process(street.cluster.pid)
    street.check()
    descriptors = control.num_fds()
    since = len(street.cluster.log)
    for _ in range(100):
        link = Link(street.victim)
        link.send_bytes(message(99, b""))
        wait_until(lambda link=link: not link.alive())  # type: ignore[misc]
        link.close()
    assert street.said("request 99", since)
    assert len(lines(street, since)) < 40
    wait_until(lambda: control.num_fds() <= descriptors)


# --- rings --------------------------------------------------------------------------------------


def wait_broken(queue: DriverQueue) -> None:
    """Wait until the error eventfd is signalled."""
    readable, _, _ = select.select([queue.error_fd], [], [], PATIENCE)
    assert readable, "the error eventfd was not signalled"
    assert queue.broken()


def offer(front: BlkFrontend, *descriptors: tuple[int, int, int, int]) -> None:
    """Write (address, bytes, flags, next) descriptors from 0 upwards; offer and kick 0."""
    queue = front.queues[0]
    for place, (address, length, flags, following) in enumerate(descriptors):
        queue.write_descriptor(place, address, length, flags, following)
    queue.add_head(0)
    queue.publish()
    queue.kick()


def outside(front: BlkFrontend) -> int:
    last = front.memory.regions[-1]
    return int(last.guest + last.size)


Wreck = Callable[[BlkFrontend, int], None]

SPLIT: dict[str, tuple[Wreck, str]] = {
    "an index too far ahead": (
        lambda front, _: front.queues[0].set_avail_idx(front.queues[0].size + 1),
        "avail ring",
    ),
    "a head past the ring": (
        lambda front, _: front.queues[0].add_head(front.queues[0].size),
        "head",
    ),
    "a loop": (lambda front, at: offer(front, (at, 16, NEXT, 1), (at, 16, NEXT, 0)), "loop"),
    "a loop of one": (lambda front, at: offer(front, (at, 16, NEXT, 0)), "loop"),
    "a next past the table": (lambda front, at: offer(front, (at, 16, NEXT, 9999)), "9999"),
    "the wrong direction": (
        lambda front, at: offer(front, (at, 16, NEXT | WRITE, 1), (at, 16, 0, 0)),
        "follows a writable one",
    ),
    "an address outside": (
        lambda front, at: offer(front, (outside(front), 16, NEXT, 1), (at, 1, WRITE, 0)),
        "outside of guest memory",
    ),
    "a length that leaves memory": (
        lambda front, at: offer(front, (at, 0xFFFFFFFF, NEXT, 1), (at, 1, WRITE, 0)),
        "outside of guest memory",
    ),
    "an end that overflows": (
        lambda front, at: offer(front, ((1 << 64) - 8, 16, NEXT, 1), (at, 1, WRITE, 0)),
        "outside of guest memory",
    ),
    "a table outside": (
        lambda front, _: offer(front, (outside(front), 32, INDIRECT, 0)),
        "indirect table",
    ),
    "half a descriptor in a table": (
        lambda front, at: offer(front, (at, 24, INDIRECT, 0)),
        "indirect table of 24 bytes",
    ),
}


@pytest.mark.parametrize(("wreck", "text"), SPLIT.values(), ids=SPLIT.keys())
def test_a_bad_split_ring_stops_its_queue(street: Street, wreck: Wreck, text: str) -> None:
    harm(street, wreck, text, packed=False)


def offer_packed(front: BlkFrontend, *descriptors: tuple[int, int, int]) -> None:
    """Write (address, bytes, flags) descriptors from 0 upwards, the first one last; kick."""
    queue = front.queues[0]
    for place, (address, length, flags) in reversed(list(enumerate(descriptors))):
        queue.write_descriptor(place, address, length, flags | AVAIL, 0)
    queue.kick()


PACKED: dict[str, tuple[Wreck, str]] = {
    "a chain without end": (
        lambda front, at: offer_packed(front, *[(at, 16, NEXT)] * front.queues[0].size),
        "descriptor",
    ),
    "the wrong direction": (
        lambda front, at: offer_packed(front, (at, 16, NEXT | WRITE), (at, 16, 0)),
        "follows a writable one",
    ),
    "an address outside": (
        lambda front, at: offer_packed(front, (outside(front), 16, NEXT), (at, 1, WRITE)),
        "outside of guest memory",
    ),
    "a table inside a chain": (
        lambda front, at: offer_packed(front, (at, 16, NEXT), (at, 32, INDIRECT)),
        "inside a chain",
    ),
}


@pytest.mark.parametrize(("wreck", "text"), PACKED.values(), ids=PACKED.keys())
def test_a_bad_packed_ring_stops_its_queue(street: Street, wreck: Wreck, text: str) -> None:
    harm(street, wreck, text, packed=True)


def harm(street: Street, wreck: Wreck, text: str, *, packed: bool) -> None:
    since = len(street.cluster.log)
    with BlkFrontend.connect(street.victim, queues=2, packed=packed) as front:
        front.write(0, bytes(512), queue=1)
        wreck(front, front.memory.allocate(4096))
        front.queues[0].publish()
        front.queues[0].kick()
        wait_broken(front.queues[0])
        assert street.said(text, since)
        # The other queue of the same disk has done nothing wrong.
        front.write(512, bytes(512), queue=1)
        assert not front.queues[1].broken()
        assert len([line for line in lines(street, since) if text in line]) == 1


def lines(street: Street, since: int) -> list[str]:
    return street.cluster.log[since:].splitlines()


# --- memory that goes away ----------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_truncated_buffers_stop_the_queue(street: Street, packed: bool) -> None:
    since = len(street.cluster.log)
    with BlkFrontend.connect(street.victim, regions=2, packed=packed) as front:
        header = front.memory.allocate(64)
        front.memory.write(header, struct.pack("<IIQ", 0, 0, 0))
        gone = front.memory.regions[1].guest
        os.ftruncate(front.memory.fds[1], 0)
        queue = front.queues[0]
        queue.add([(header, 16, False), (gone, 4096, True), (header + 16, 1, True)])
        queue.publish()
        wait_broken(queue)
        assert street.said("guest memory was truncated while in use", since)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_truncated_rings_stop_the_queue(street: Street, packed: bool) -> None:
    since = len(street.cluster.log)
    with BlkFrontend.connect(street.victim, packed=packed) as front:
        front.read(0, 512)
        os.ftruncate(front.memory.fds[0], 0)  # from here on we may not touch it either
        front.queues[0].kick()
        wait_broken(front.queues[0])
        assert street.said("guest memory was truncated while in use", since)


def test_a_log_of_ours_cannot_be_truncated(street: Street) -> None:
    with BlkFrontend.connect(street.victim) as front:
        assert front._inflight is not None
        with pytest.raises(PermissionError):
            os.ftruncate(front._inflight[1], 0)
        assert front.read(0, 512) == bytes(512)


def test_a_log_that_the_front_end_brings_can_be_truncated(street: Street) -> None:
    since = len(street.cluster.log)
    with BlkFrontend.connect(street.victim) as front:
        assert front._inflight is not None
        log, ours = front._inflight
        own = os.memfd_create("log")
        os.ftruncate(own, log.mmap_offset + log.mmap_size)
        front.stop()
        front._inflight = (log, own)
        os.close(ours)
        front.start()
        os.ftruncate(own, 0)
        front.submit(0, 0, length=512)
        wait_broken(front.queues[0])
        assert street.said("in-flight log was truncated while in use", since)


def test_a_front_end_that_is_refused_says_so(street: Street) -> None:
    with BlkFrontend.connect(street.victim) as front:
        link: Any = front.raw
        with pytest.raises(FrontendError, match="refuses SET_VRING_NUM"):
            link.tell(Request.SET_VRING_NUM, VringState(0, 0))
