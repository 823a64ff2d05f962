"""What a reactor is told of a queue, and the C structures that are made of it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import msgspec

from reactor.errors import OperationError
from reactor.native import CData, ffi
from reactor.operations import FileDescriptors


class RingArgs(msgspec.Struct, forbid_unknown_fields=True):
    """What a ring is: see struct vq_setup. ``fds`` are places in the event's descriptors, or -1."""

    size: int
    base: int
    features: int
    desc: int
    avail: int
    used: int
    log_used: bool
    used_log: int
    kick: int
    call: int
    error: int
    log: int
    log_offset: int
    log_size: int
    recover: bool


class CoalescingArgs(msgspec.Struct, forbid_unknown_fields=True):
    """When a queue holds signals back: see vhost/coalescing.h."""

    delay_base_us: int
    iops_threshold: int


class BlkArgs(msgspec.Struct, forbid_unknown_fields=True):
    """What a virtio-blk queue is beside a ring: see struct blk_setup."""

    slot: int
    readonly: bool
    write_through: bool
    discard: bool
    write_zeroes: bool
    max_discard_sectors: int
    max_discard_segments: int
    serial: str


def ring_setup(source: int, ring: RingArgs, fds: FileDescriptors) -> CData:
    """Return a struct vq_setup; OperationError(-EINVAL) for a descriptor that did not come."""

    def descriptor(place: int) -> int:
        if place >= len(fds):
            raise OperationError(-errno.EINVAL, f"descriptor {place} of {len(fds)}")
        return fds[place] if place >= 0 else -1

    fields: Mapping[str, Any] = {
        "id": source,
        "size": ring.size,
        "base": ring.base,
        "features": ring.features,
        "desc": ring.desc,
        "avail": ring.avail,
        "used": ring.used,
        "log_used": ring.log_used,
        "used_log": ring.used_log,
        "kick_fd": descriptor(ring.kick),
        "call_fd": descriptor(ring.call),
        "error_fd": descriptor(ring.error),
        "inflight_fd": descriptor(ring.log),
        "inflight_offset": ring.log_offset,
        "inflight_size": ring.log_size,
        "recover": ring.recover,
    }
    return ffi.new("struct vq_setup *", fields)


def blk_setup(blk: BlkArgs) -> CData:
    """Return a struct blk_setup."""
    fields = msgspec.structs.asdict(blk)
    fields["serial"] = blk.serial.encode()[:20]
    return ffi.new("struct blk_setup *", fields)
