"""The driver's side of a virtqueue, with the test as its device."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import PATIENCE, wait_until
from vhost.frontend_link import FrontendError
from vhost.frontend_memory import DriverQueue, FrontendMemory
from vhost.workload import Runner, Workload

NEXT, WRITE, INDIRECT = 1, 2, 4


@pytest.fixture
def memory() -> Iterator[FrontendMemory]:
    shared = FrontendMemory(4 << 20)
    yield shared
    shared.close()


@pytest.fixture
def queue(memory: FrontendMemory) -> Iterator[DriverQueue]:
    with DriverQueue(memory, 0, 8) as made:
        yield made


@pytest.fixture
def event_queue(memory: FrontendMemory) -> Iterator[DriverQueue]:
    with DriverQueue(memory, 0, 8, event_idx=True) as made:
        yield made


def u16(queue: DriverQueue, address: int) -> int:
    return int(struct.unpack("<H", queue.memory.read(address, 2))[0])


def descriptor(queue: DriverQueue, place: int, table: int | None = None) -> tuple[int, ...]:
    raw = queue.memory.read((queue.desc if table is None else table) + 16 * place, 16)
    return struct.unpack("<QIHH", raw)


def use(queue: DriverQueue, *entries: tuple[int, int]) -> None:
    """Do what a device does: put entries into the used ring and move its index."""
    index = queue.used_idx
    for head, written in entries:
        place = queue.used + 4 + 8 * (index % queue.size)
        queue.memory.write(place, struct.pack("<II", head, written))
        index = (index + 1) & 0xFFFF
    queue.memory.write(queue.used + 2, struct.pack("<H", index))


def kicked(queue: DriverQueue) -> bool:
    try:
        return os.eventfd_read(queue.kick_fd) > 0
    except BlockingIOError:
        return False


def test_a_chain_is_linked_in_the_ring(queue: DriverQueue) -> None:
    head = queue.add([(0x1000, 16, False), (0x2000, 512, True), (0x3000, 1, True)])
    first, second, third = (descriptor(queue, place) for place in range(3))
    assert head == 0
    assert first == (0x1000, 16, NEXT, 1)
    assert second == (0x2000, 512, NEXT | WRITE, 2)
    assert third == (0x3000, 1, WRITE, 0)


def test_an_indirect_chain_takes_one_descriptor(queue: DriverQueue) -> None:
    head = queue.add([(0x1000, 16, False), (0x2000, 1, True)], indirect=True)
    table, length, flags, _next = descriptor(queue, head)
    assert (length, flags) == (32, INDIRECT)
    assert descriptor(queue, 0, table) == (0x1000, 16, NEXT, 1)
    assert descriptor(queue, 1, table) == (0x2000, 1, WRITE, 0)


def test_nothing_is_published_before_publish(queue: DriverQueue) -> None:
    queue.add([(0x1000, 16, False)])
    assert u16(queue, queue.avail + 2) == 0
    queue.publish()
    assert u16(queue, queue.avail + 2) == 1


def test_a_full_ring_says_so_and_stays_as_it_is(queue: DriverQueue) -> None:
    for _ in range(2):
        queue.add([(0x1000, 1, False)] * 3)
    with pytest.raises(OSError, match="front_queue_add") as caught:
        queue.add([(0x1000, 1, False)] * 3)
    assert caught.value.errno == errno.ENOSPC
    assert queue.pending == 2
    queue.add([(0x1000, 1, False)] * 2)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.randoms()), max_size=60))
def test_descriptors_come_back_in_any_order(steps: list[tuple[int, bool, object]]) -> None:
    out: dict[int, int] = {}
    with (
        closing(FrontendMemory(1 << 20)) as memory,
        DriverQueue(memory, 0, 16) as queue,
    ):
        for count, indirect, random in steps:
            taken = 1 if indirect else count
            if sum(out.values()) + taken > 16:
                head = random.choice(sorted(out))  # type: ignore[attr-defined]
                use(queue, (head, count))
                assert queue.reap() == [(head, count)]
                del out[head]
                continue
            head = queue.add([(0x1000, 1, False)] * count, indirect=indirect)
            assert head not in out
            out[head] = taken
        use(queue, *((head, 0) for head in out))
        assert [head for head, _ in queue.reap()] == list(out)
        assert queue.pending == 0
        queue.add([(0x1000, 1, False)] * 16)


def test_a_device_that_wants_no_kicks_gets_none(queue: DriverQueue) -> None:
    queue.add([(0x1000, 1, False)])
    queue.publish()
    assert kicked(queue)
    queue.memory.write(queue.used, struct.pack("<H", 1))  # VIRTQ_USED_F_NO_NOTIFY
    queue.add([(0x1000, 1, False)])
    queue.publish()
    assert not kicked(queue)


def test_kicks_follow_the_avail_event_across_the_wrap(memory: FrontendMemory) -> None:
    with DriverQueue(memory, 0, 8, event_idx=True) as queue:
        avail_event = queue.used + 4 + 8 * queue.size
        for index in range(0x10000 + 16):
            wanted = index % 3 == 0
            event = index if wanted else index + 5
            memory.write(avail_event, struct.pack("<H", event & 0xFFFF))
            head = queue.add([(0x1000, 1, False)])
            before = queue.kicks
            queue.publish()
            assert queue.kicks - before == wanted
            use(queue, (head, 0))
            queue.reap()


def test_signals_are_asked_for_only_while_waiting(event_queue: DriverQueue) -> None:
    used_event = event_queue.avail + 4 + 2 * event_queue.size
    assert u16(event_queue, used_event) == 0xFFFF
    event_queue.add([(0x1000, 1, False)])
    event_queue.publish()
    assert not event_queue.wait(0.01)
    assert u16(event_queue, used_event) == 0xFFFF


def test_a_signal_ends_the_wait(queue: DriverQueue) -> None:
    head = queue.add([(0x1000, 1, False)])
    queue.publish()
    use(queue, (head, 7))
    os.eventfd_write(queue.call_fd, 1)
    started = time.monotonic()
    assert queue.wait(PATIENCE)
    assert time.monotonic() - started < 5
    assert queue.reap() == [(head, 7)]


@pytest.mark.parametrize("head", [1, 7, 8, 0xFFFF, 0xFFFFFFFF])
def test_a_head_that_the_device_does_not_have_is_refused(queue: DriverQueue, head: int) -> None:
    queue.add([(0x1000, 1, False)] * 2)
    queue.publish()
    use(queue, (head, 0))
    with pytest.raises(FrontendError, match="a chain that it does not have"):
        queue.reap()


def test_a_head_that_comes_back_twice_is_refused(queue: DriverQueue) -> None:
    head = queue.add([(0x1000, 1, False)])
    queue.add([(0x1000, 1, False)])
    use(queue, (head, 0), (head, 0))
    with pytest.raises(FrontendError, match="a chain that it does not have"):
        queue.reap()


def test_an_index_that_runs_away_is_refused(queue: DriverQueue) -> None:
    queue.add([(0x1000, 1, False)])
    queue.memory.write(queue.used + 2, struct.pack("<H", 500))
    with pytest.raises(FrontendError, match="a chain that it does not have"):
        queue.reap()


def test_any_head_can_be_made_available(queue: DriverQueue) -> None:
    queue.write_descriptor(5, 0xDEAD0000, 16, NEXT, 5)
    queue.add_head(5)
    queue.add_head(1234)
    queue.publish()
    assert [u16(queue, queue.avail + 4 + 2 * place) for place in range(2)] == [5, 1234]
    use(queue, (5, 0))
    assert queue.reap() == [(5, 0)]


@pytest.mark.parametrize("size", [0, 3, 100, 65536])
def test_a_ring_of_no_possible_size_is_refused(memory: FrontendMemory, size: int) -> None:
    with pytest.raises(ValueError, match=f"queue size {size}"):
        DriverQueue(memory, 0, size)


@given(st.data())
def test_allocations_never_overlap_and_all_come_back(data: st.DataObject) -> None:
    regions = data.draw(st.integers(1, 3))
    with closing(FrontendMemory(64 << 10, regions=regions, hole=0)) as memory:
        whole = list(memory._free)
        taken: list[tuple[int, int]] = []
        for _ in range(data.draw(st.integers(0, 30))):
            give_back: bool = data.draw(st.booleans())
            if taken and give_back:
                memory.free(*taken.pop(data.draw(st.integers(0, len(taken) - 1))))
                continue
            size = data.draw(st.integers(1, 9000))
            try:
                address = memory.allocate(size)
            except MemoryError:
                continue
            memory.write(address, bytes(size))
            assert all(address + size <= other or other + n <= address for other, n in taken)
            taken.append((address, size))
        for each in taken:
            memory.free(*each)
        assert memory._free == whole


def load(memory: FrontendMemory, queue: DriverQueue, **options: object) -> Runner:
    work = Workload(**{"size": 1 << 20, "runtime": 30.0, **options})  # type: ignore[arg-type]
    return Runner(work, [queue], memory)


@pytest.fixture
def wide_queue(memory: FrontendMemory) -> Iterator[DriverQueue]:
    with DriverQueue(memory, 0, 64) as made:
        yield made


def wait_for_requests(queue: DriverQueue, count: int) -> None:
    wait_until(lambda: u16(queue, queue.avail + 2) == count)


@pytest.mark.parametrize("head", [1, 63, 64, 0x80000000])
def test_a_load_ends_when_the_device_returns_nonsense(
    memory: FrontendMemory, wide_queue: DriverQueue, head: int
) -> None:
    with load(memory, wide_queue, depth=4) as runner:
        runner.start()
        wait_for_requests(wide_queue, 4)
        use(wide_queue, (head, 0))
        with pytest.raises(OSError, match="load_run") as caught:
            runner.finish()
    assert caught.value.errno == errno.EPROTO


def test_a_load_ends_when_the_device_says_nothing(
    memory: FrontendMemory, wide_queue: DriverQueue
) -> None:
    with load(memory, wide_queue, depth=4, stall=0.05) as runner:
        runner.start()
        with pytest.raises(FrontendError, match=r"has not answered for 0\.05 s"):
            runner.finish()


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_load_can_be_ended_without_its_device(
    memory: FrontendMemory, wide_queue: DriverQueue, interrupt: bool
) -> None:
    with load(memory, wide_queue, depth=4, interrupt=interrupt) as runner:
        runner.start()
        wait_for_requests(wide_queue, 4)
        runner.stop(drain=False)
        assert runner.finish().total.ops == 0
    assert wide_queue.pending == 0


def test_a_request_without_status_is_an_error(
    memory: FrontendMemory, wide_queue: DriverQueue
) -> None:
    with load(memory, wide_queue, depth=1, requests=1) as runner:
        runner.start()
        wait_for_requests(wide_queue, 1)
        use(wide_queue, (0, 0))
        results = runner.finish()
    assert results.errors == 1
    assert results.first_error.startswith("read at byte ")
    assert results.first_error.endswith("the device says nothing")


def test_requests_say_type_and_sector(memory: FrontendMemory, wide_queue: DriverQueue) -> None:
    options = {"mode": "write", "depth": 3, "requests": 3, "offset": 8192, "block_size": 1024}
    with load(memory, wide_queue, **options) as runner:
        runner.start()
        wait_for_requests(wide_queue, 3)
        heads = [u16(wide_queue, wide_queue.avail + 4 + 2 * place) for place in range(3)]
        seen = []
        for head in heads:
            header, length, flags, second = descriptor(wide_queue, head)
            assert (length, flags) == (16, NEXT)
            _data, length, flags, third = descriptor(wide_queue, second)
            assert (length, flags) == (1024, NEXT)
            status, length, flags, _next = descriptor(wide_queue, third)
            assert (length, flags) == (1, WRITE)
            seen.append(struct.unpack("<IIQ", memory.read(header, 16)))
            memory.write(status, b"\0")
        use(wide_queue, *((head, 1) for head in heads))
        results = runner.finish()
    assert seen == [(1, 0, 16), (1, 0, 18), (1, 0, 20)]
    assert (results.write.ops, results.errors) == (3, 0)


def test_a_load_that_does_not_fit_is_refused(
    memory: FrontendMemory, wide_queue: DriverQueue
) -> None:
    with pytest.raises(FrontendError, match="queue 0 of 64 entries: No space left on device"):
        load(memory, wide_queue, depth=22)
    before = list(memory._free)
    with pytest.raises(FrontendError, match="Invalid argument for depth 4"):
        load(memory, wide_queue, depth=4, block_size=1000)
    assert memory._free == before
