"""What is stored of a session comes back as it was, with other numbers for its descriptors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from reactor.operations import FileDescriptors
from vhost.descriptors import log_of, make_inflight
from vhost.iotlb import Translation
from vhost.journal import pack, unpack
from vhost.messages import Feature, Region, VringAddr
from vhost.record import Coalescing, DirtyLog, MappedRegion, SessionRecord


def descriptor() -> int:
    """Return one that can be told from others by its inode."""
    return os.memfd_create("test")


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino if fd >= 0 else -1


def full_record() -> SessionRecord:
    """Return a record in which everything is there."""
    record = SessionRecord(7, "b0", int(Feature.PROTOCOL_FEATURES), 3, 15, {32: 1}, descriptor())
    regions = [Region(n << 20, 1 << 20, n << 30, 4096) for n in range(3)]
    record.memory = [MappedRegion(region, descriptor()) for region in regions]
    record.dirty_log, record.log_event = DirtyLog(descriptor(), 4096, 8192), descriptor()
    record.inflight = replace(make_inflight(1, 128, packed=False), shared=True)
    record.own_inflight = make_inflight(4, 256, packed=True)
    record.coalescing = Coalescing(10, 1000)
    record.iotlb.add(Translation(4096, 8192, 1 << 30, 3))
    for index, area in ((0, record.inflight), (1, record.own_inflight)):
        queue = record.queue(index)
        queue.size, queue.base, queue.started, queue.enabled = 128, 5 + index, True, True
        queue.addr = queue.ring = VringAddr(index, 0, 16, 32, 64, 0)
        queue.kick, queue.call, queue.running = descriptor(), descriptor(), True
        queue.log = log_of(area, index)
    record.queue(2).error = descriptor()
    return record


@pytest.fixture
def record() -> Iterator[SessionRecord]:
    made = full_record()
    yield made
    made.close()


def facts(record: SessionRecord) -> list[object]:
    """Return all that has to be the same, descriptors by their inodes."""
    _, fds = pack(record, applied=False)
    logs = [
        None if queue.log is None else (inode(queue.log.fd), queue.log.offset, queue.log.size)
        for queue in record.queues.values()
    ]
    queues = [
        replace(queue, kick=-1, call=-1, error=-1, log=None) for queue in record.queues.values()
    ]
    plain = [record.id, record.controller, record.features, record.written, record.coalescing]
    return [
        *plain,
        [entry.region for entry in record.memory],
        record.iotlb.entries(),
        queues,
        logs,
        [inode(fd) for fd in fds],
    ]


def test_a_record_comes_back_with_all_its_descriptors(record: SessionRecord) -> None:
    data, fds = pack(record, applied=True)
    assert len(set(fds)) == len(fds)
    sent = FileDescriptors([os.dup(fd) for fd in fds])
    with sent:
        found, applied = unpack(data, sent)
    assert applied
    assert facts(found) == facts(record)
    assert not set(pack(found, applied=True)[1]) & set(fds)
    found.close()


def test_a_record_without_anything_comes_back() -> None:
    found, applied = unpack(pack(SessionRecord(1, "b1"), applied=False)[0], FileDescriptors())
    assert (found.id, found.controller, found.queues, applied) == (1, "b1", {}, False)


def test_a_log_that_is_no_part_of_an_area_any_more_is_forgotten(record: SessionRecord) -> None:
    assert record.own_inflight is not None
    os.close(record.own_inflight.fd)
    record.own_inflight = None
    data, fds = pack(record, applied=False)
    with FileDescriptors([os.dup(fd) for fd in fds]) as sent:
        found, _ = unpack(data, sent)
    assert found.queues[0].log is not None
    assert found.queues[1].log is None
    found.close()


def test_a_record_whose_descriptors_are_missing_is_refused(record: SessionRecord) -> None:
    data, fds = pack(record, applied=False)
    with FileDescriptors([os.dup(fd) for fd in fds[1:]]) as sent, pytest.raises(ValueError):
        unpack(data, sent)
