"""The driver's side of a packed ring (virtio 1.2, section 2.8), with the test as its device."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import PATIENCE
from vhost.frontend_link import FrontendError
from vhost.frontend_memory import PACKED_BASE, DriverQueue, FrontendMemory
from vhost.workload import Runner, Workload

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2


class Device:
    """What a device does: looks at descriptors, and uses chains in any order."""

    def __init__(self, queue: DriverQueue) -> None:
        self.queue = queue
        self.taken, self.taken_wrap = 0, True
        self.used, self.used_wrap = 0, True
        self.lengths: dict[int, int] = {}

    def descriptor(self, place: int, table: int | None = None) -> tuple[int, int, int, int]:
        """Return address, length, identifier and flags."""
        start = self.queue.desc if table is None else table
        raw = self.queue.memory.read(start + 16 * place, 16)
        found: tuple[int, int, int, int] = struct.unpack("<QIHH", raw)
        return found

    def take(self) -> int | None:
        """Take a chain and return its identifier; None when there is none."""
        length = 0
        while True:
            *_, ident, flags = self.descriptor(self.taken)
            if bool(flags & AVAIL) != self.taken_wrap or bool(flags & USED) == self.taken_wrap:
                assert length == 0, "a chain that is not complete was made available"
                return None
            length += 1
            self.taken, self.taken_wrap = self._after(self.taken, self.taken_wrap, 1)
            if not flags & NEXT:
                assert ident not in self.lengths
                self.lengths[ident] = length
                return ident

    def _after(self, place: int, wrap: bool, count: int) -> tuple[int, bool]:
        place += count
        return (place - self.queue.size, not wrap) if place >= self.queue.size else (place, wrap)

    def use(self, ident: int, written: int = 0) -> None:
        """Give a chain back."""
        flags = AVAIL | USED if self.used_wrap else 0
        self.queue.write_descriptor(self.used, 0, written, flags, ident)
        length = self.lengths.pop(ident, 1)
        self.used, self.used_wrap = self._after(self.used, self.used_wrap, length)

    def ask_kicks(self, flags: int, place: int = 0, wrap: bool = True) -> None:
        """Write the device's event suppression."""
        event = struct.pack("<HH", place | wrap << 15, flags)
        self.queue.memory.write(self.queue.used, event)

    def asked_calls(self) -> tuple[int, int, bool]:
        """Return the driver's event suppression: flags, place, wrap counter."""
        off_wrap, flags = struct.unpack("<HH", self.queue.memory.read(self.queue.avail, 4))
        return flags, off_wrap & 0x7FFF, bool(off_wrap >> 15)


@pytest.fixture
def memory() -> Iterator[FrontendMemory]:
    shared = FrontendMemory(4 << 20)
    yield shared
    shared.close()


@pytest.fixture
def queue(memory: FrontendMemory) -> Iterator[DriverQueue]:
    with DriverQueue(memory, 0, 8, event_idx=True, packed=True) as made:
        yield made


def kicked(queue: DriverQueue) -> bool:
    try:
        return os.eventfd_read(queue.kick_fd) > 0
    except BlockingIOError:
        return False


def test_a_chain_stands_in_a_row(queue: DriverQueue) -> None:
    device = Device(queue)
    ident = queue.add([(0x1000, 16, False), (0x2000, 512, True), (0x3000, 1, True)])
    queue.publish()
    first, second, third = (device.descriptor(place) for place in range(3))
    assert first == (0x1000, 16, ident, NEXT | AVAIL)
    assert second == (0x2000, 512, ident, NEXT | WRITE | AVAIL)
    assert third == (0x3000, 1, ident, WRITE | AVAIL)


def test_an_indirect_chain_takes_one_descriptor(queue: DriverQueue) -> None:
    device = Device(queue)
    ident = queue.add([(0x1000, 16, False), (0x2000, 1, True)], indirect=True)
    queue.publish()
    table, *rest = device.descriptor(0)
    assert rest == [32, ident, INDIRECT | AVAIL]
    assert device.descriptor(0, table) == (0x1000, 16, 0, 0)
    assert device.descriptor(1, table) == (0x2000, 1, 0, WRITE)


def test_nothing_is_published_before_publish(queue: DriverQueue) -> None:
    device = Device(queue)
    idents = [queue.add([(0x1000, 16, False)] * 2) for _ in range(3)]
    assert device.take() is None
    queue.publish()
    assert [device.take() for _ in range(4)] == [*idents, None]


def test_a_full_ring_says_so_and_stays_as_it_is(queue: DriverQueue) -> None:
    for _ in range(2):
        queue.add([(0x1000, 1, False)] * 3)
    with pytest.raises(OSError, match="front_queue_add") as caught:
        queue.add([(0x1000, 1, False)] * 3)
    assert caught.value.errno == errno.ENOSPC
    assert queue.pending == 2
    queue.add([(0x1000, 1, False)] * 2)


@given(
    st.integers(5, 17),
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.randoms()), max_size=80),
)
def test_chains_come_back_in_any_order(size: int, steps: list[tuple[int, bool, object]]) -> None:
    out: dict[int, int] = {}
    with (
        closing(FrontendMemory(1 << 20)) as memory,
        DriverQueue(memory, 0, size, packed=True) as queue,
    ):
        device = Device(queue)
        for count, indirect, random in steps:
            taken = 1 if indirect else count
            if sum(out.values()) + taken > size:
                ident = random.choice(sorted(out))  # type: ignore[attr-defined]
                device.use(ident, count)
                assert queue.reap() == [(ident, count)]
                del out[ident]
                continue
            ident = queue.add([(0x1000, 1, False)] * count, indirect=indirect)
            assert ident not in out
            queue.publish()
            assert device.take() == ident
            out[ident] = taken
        for ident in out:
            device.use(ident)
        assert [ident for ident, _ in queue.reap()] == list(out)
        assert queue.pending == 0
        queue.add([(0x1000, 1, False)] * size)


def test_a_device_that_wants_no_kicks_gets_none(queue: DriverQueue) -> None:
    device = Device(queue)
    for flags, wanted in [(ENABLE, True), (DISABLE, False), (ENABLE, True)]:
        device.ask_kicks(flags)
        queue.add([(0x1000, 1, False)])
        queue.publish()
        assert kicked(queue) is wanted


def test_a_kick_follows_the_descriptor_that_the_device_names(queue: DriverQueue) -> None:
    device = Device(queue)
    seen = []
    device.ask_kicks(DESC, 4)
    for lap in range(6):  # makes 0-1, 2-3, 4-5, 6-7 available, then 0-1 and 2-3 of the next lap
        if lap == 4:
            device.ask_kicks(DESC, 2, wrap=False)
        queue.add([(0x1000, 1, False)] * 2)
        queue.publish()
        seen.append(kicked(queue))
        ident = device.take()
        assert ident is not None
        device.use(ident)
        queue.reap()
    assert seen == [False, False, True, False, False, True]


def test_a_batch_that_passes_the_named_descriptor_is_kicked_once(queue: DriverQueue) -> None:
    Device(queue).ask_kicks(DESC, 3)
    for _ in range(6):
        queue.add([(0x1000, 1, False)])
    queue.publish()
    assert os.eventfd_read(queue.kick_fd) == 1


def test_a_signal_is_asked_for_where_we_stand_while_we_sleep(queue: DriverQueue) -> None:
    device = Device(queue)
    for _ in range(9):
        queue.add([(0x1000, 1, False)])
        queue.publish()
        ident = device.take()
        assert ident is not None
        device.use(ident)
        queue.reap()
    assert device.asked_calls()[0] == DISABLE
    assert not queue.wait(0.001, spin=0)
    assert device.asked_calls() == (DISABLE, 1, False)  # the place is left from the sleep


def test_waiting_ends_when_something_comes_back(queue: DriverQueue) -> None:
    device = Device(queue)
    queue.add([(0x1000, 1, False)])
    queue.publish()
    ident = device.take()
    assert ident is not None
    assert not queue.wait(0)
    device.use(ident, 5)
    assert queue.wait(PATIENCE)
    assert queue.reap() == [(ident, 5)]


@pytest.mark.parametrize("ident", [1, 7, 8, 0xFFFF])
def test_a_chain_that_the_device_does_not_have_is_refused(queue: DriverQueue, ident: int) -> None:
    queue.add([(0x1000, 1, False)])
    queue.publish()
    Device(queue).use(ident)
    with pytest.raises(FrontendError, match="chain that it does not have"):
        queue.reap()


def test_a_load_refuses_what_it_was_never_given(memory: FrontendMemory) -> None:
    with DriverQueue(memory, 0, 64, packed=True) as queue:
        work = Workload(size=1 << 20, depth=4, runtime=60)
        Device(queue).use(63)
        with Runner(work, [queue], memory) as runner:
            runner.start()
            with pytest.raises(OSError) as caught:
                runner.finish()
    assert caught.value.errno == errno.EPROTO


def test_it_begins_with_both_wrap_counters_set(queue: DriverQueue) -> None:
    assert queue.base == PACKED_BASE == 1 << 15 | 1 << 31


@pytest.mark.parametrize(("size", "good"), [(0, False), (3, True), (100, True), (32769, False)])
def test_any_size_to_32768_will_do(memory: FrontendMemory, size: int, good: bool) -> None:
    if good:
        DriverQueue(memory, 0, size, packed=True).close()
    else:
        with pytest.raises(ValueError, match="at most 32768"):
            DriverQueue(memory, 0, size, packed=True)
