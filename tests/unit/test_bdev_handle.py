"""What every handle does: checks before a request, accounts after it, removal, reset."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdev.io import Op, Request
from bdev.statistics import in_flight
from reactor.native import lib
from tests.support.bdevs import LocalDisk, file_disk, null_disk

BLOCKS = 1000


@pytest.fixture
def null() -> Iterator[LocalDisk]:
    disk = null_disk(BLOCKS)
    yield disk
    disk.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[LocalDisk]:
    """A disk whose requests stay in flight until it is polled."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(BLOCKS * 512))
    disk = file_disk(path, direct=False)
    yield disk
    disk.close()


def failure(disk: LocalDisk, op: Op, offset: int, length: int) -> int:
    buffers = [bytearray(length)] if op in (Op.READ, Op.WRITE) else []
    with pytest.raises(OSError, match=op.name) as caught:
        disk.io.start(op, offset, length, buffers).finish()
    return caught.value.errno or 0


RANGED = [Op.READ, Op.WRITE, Op.UNMAP, Op.WRITE_ZEROES]


@pytest.mark.parametrize("op", RANGED)
def test_a_range_past_the_end_is_refused(null: LocalDisk, op: Op) -> None:
    assert failure(null, op, (BLOCKS - 1) * 512, 1024) == errno.ERANGE


@pytest.mark.parametrize("op", RANGED)
def test_a_range_that_wraps_around_is_refused(null: LocalDisk, op: Op) -> None:
    assert failure(null, op, 2**64 - 512, 512) == errno.ERANGE


@pytest.mark.parametrize("op", [Op.UNMAP, Op.WRITE_ZEROES])
def test_a_length_that_wraps_around_is_refused(null: LocalDisk, op: Op) -> None:
    assert failure(null, op, 1024, 2**64 - 512) == errno.ERANGE


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (256, 512), (0, 100), (512, 513)])
@pytest.mark.parametrize("op", RANGED)
def test_a_range_of_broken_blocks_is_refused(
    null: LocalDisk, op: Op, offset: int, length: int
) -> None:
    assert failure(null, op, offset, length) == errno.EINVAL


@pytest.mark.parametrize("op", RANGED)
def test_the_last_block_and_no_block_at_the_end_are_in_range(null: LocalDisk, op: Op) -> None:
    for offset, length in (((BLOCKS - 1) * 512, 512), (BLOCKS * 512, 0)):
        buffers = [bytearray(length)] if op in (Op.READ, Op.WRITE) else []
        null.io.start(op, offset, length, buffers).finish()


def test_an_operation_that_does_not_exist_is_refused(null: LocalDisk) -> None:
    request = Request(null.selector, null.handle, 250, 0, 0, (), 0)  # type: ignore[arg-type]
    request.op = Op.READ
    with pytest.raises(OSError, match="not supported"):
        request.finish()


def test_operations_are_counted(null: LocalDisk) -> None:
    for _ in range(3):
        null.io.read(0, 1024)
    null.io.write(0, bytes(512))
    null.io.unmap(0, 4096)
    null.io.flush()
    assert list(null.stats.ops) == [3, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert list(null.stats.bytes) == [3072, 512, 0, 4096, 0, 0, 0, 0, 0, 0]
    assert null.stats.errors == in_flight(null.stats) == 0


def test_a_refused_request_is_an_error_and_no_operation(null: LocalDisk) -> None:
    failure(null, Op.READ, 1, 512)
    assert null.stats.errors == 1
    assert null.stats.ops[Op.READ] == 0


def test_latency_is_measured(slow: LocalDisk) -> None:
    before = lib.reactor_ticks()
    slow.io.read(0, 512)
    slow.io.read(0, 4096)
    spent = lib.reactor_ticks() - before
    stats = slow.stats
    assert 0 < stats.min_ticks[Op.READ] <= stats.max_ticks[Op.READ] <= spent
    assert stats.ticks[Op.READ] == stats.min_ticks[Op.READ] + stats.max_ticks[Op.READ]
    assert stats.min_ticks[Op.WRITE] == stats.max_ticks[Op.WRITE] == 0


def test_requests_in_flight_are_shown(slow: LocalDisk) -> None:
    requests = [slow.io.start(Op.WRITE, i * 512, buffers=[bytes(512)]) for i in range(5)]
    assert lib.bdev_in_flight(slow.handle) == in_flight(slow.stats) == 5
    for request in requests:
        request.finish()
    assert lib.bdev_in_flight(slow.handle) == in_flight(slow.stats) == 0


def test_a_handle_with_requests_in_flight_does_not_close(slow: LocalDisk) -> None:
    request = slow.io.start(Op.READ, buffers=[bytearray(512)])
    assert lib.bdev_close(slow.handle) == -errno.EBUSY
    request.finish()


def test_a_removed_disk_refuses_every_operation(null: LocalDisk) -> None:
    lib.bdev_remove(null.handle)
    for op in Op:
        assert failure(null, op, 0, 512) == errno.ENODEV


def test_an_idle_disk_is_drained_at_once_and_says_so_once(null: LocalDisk) -> None:
    lib.bdev_remove(null.handle)
    lib.bdev_remove(null.handle)
    null.poll()
    assert len(null.notices) == 1


def test_removal_lets_requests_in_flight_complete_and_then_says_so(slow: LocalDisk) -> None:
    data = b"kept" * 128
    requests = [slow.io.start(Op.WRITE, i * 512, buffers=[data]) for i in range(8)]
    requests.append(slow.io.start(Op.RESET))
    lib.bdev_remove(slow.handle)
    assert failure(slow, Op.READ, 0, 512) == errno.ENODEV
    assert slow.notices == []
    for request in requests:
        request.finish()
    slow.poll()
    assert len(slow.notices) == 1


def test_another_size_holds_from_then_on(null: LocalDisk) -> None:
    lib.bdev_set_blocks(null.handle, BLOCKS + 8)
    null.io.read((BLOCKS + 7) * 512, 512)
    lib.bdev_set_blocks(null.handle, 1)
    assert failure(null, Op.READ, 512, 512) == errno.ERANGE


def test_a_reset_of_an_idle_disk_completes_at_once(slow: LocalDisk) -> None:
    assert slow.io.start(Op.RESET).done


def test_a_reset_completes_after_what_was_submitted_before_it(slow: LocalDisk) -> None:
    before = [slow.io.start(Op.WRITE, i * 512, buffers=[bytes(512)]) for i in range(8)]
    reset = slow.io.start(Op.RESET)
    assert not reset.done
    while not reset.done:
        slow.poll()
    assert all(request.done for request in before)
    for request in (*before, reset):
        request.finish()


def test_resets_are_not_held_up_by_what_comes_later(slow: LocalDisk) -> None:
    """A stream of new requests that never ends must not starve a reset."""
    stream = [slow.io.start(Op.READ, buffers=[bytearray(512)]) for _ in range(4)]
    reset = slow.io.start(Op.RESET)
    for _ in range(10_000):
        if reset.done:
            break
        stream.append(slow.io.start(Op.READ, buffers=[bytearray(512)]))
        slow.poll()
    assert reset.done
    for request in (*stream, reset):
        request.finish()


def test_several_resets_complete_in_their_order(slow: LocalDisk) -> None:
    order = []
    requests = []
    for _ in range(3):
        requests += [slow.io.start(Op.WRITE, i * 512, buffers=[bytes(512)]) for i in range(3)]
        requests.append(slow.io.start(Op.RESET))
    resets = requests[3::4]
    while not all(request.done for request in requests):
        slow.poll()
        order.append([reset.done for reset in resets])
    assert all(done == sorted(done, reverse=True) for done in order)
    for request in requests:
        request.finish()
    assert slow.stats.ops[Op.RESET] == 3
    assert in_flight(slow.stats) == 0
