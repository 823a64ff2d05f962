"""A queue that a reactor serves: where it is, and what the reactor is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhost.messages import VringAddr
from vhost.record import QueueRecord


@dataclass(slots=True)
class ServedQueue:
    """A queue and where it is."""

    record: QueueRecord
    cpu: int
    slot: int  # of the statistics
    handle: int | None = None  # what the device's open() returned
    attached: bool = False  # its reactor serves it


def ring_args(
    features: int, queue: QueueRecord, *, recover: bool
) -> tuple[dict[str, Any], list[int]]:
    """Return vhost.worker_queue.RingArgs for a queue, and the descriptors that go with it."""
    assert queue.ring is not None
    assert queue.log is not None
    fds: list[int] = []

    def place(fd: int) -> int:
        if fd < 0:
            return -1
        fds.append(fd)
        return len(fds) - 1

    ring = {
        "size": queue.size,
        "base": queue.base,
        "features": features,
        "desc": queue.ring.desc,
        "avail": queue.ring.avail,
        "used": queue.ring.used,
        "log_used": bool(queue.ring.flags & VringAddr.F_LOG),
        "used_log": queue.ring.log,
        "kick": place(queue.kick),
        "call": place(queue.call),
        "error": place(queue.error),
        "log": place(queue.log.fd),
        "log_offset": queue.log.offset,
        "log_size": queue.log.size,
        "recover": recover,
    }
    return ring, fds
