"""What is behind a SCSI host: its disks, as their commands describe them (SPC-5, SBC-4)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from vhost.frontend_link import FrontendError
from vhost.frontend_scsi import Answer, ScsiFrontend
from vhost.virtio_scsi import Response

MAX_TARGETS = 64  # that are looked at, as SPDK does
_ATTEMPTS = 8  # while unit attentions are reported
_ROOM = 4096  # bytes of an answer

_GOOD, _CHECK_CONDITION = 0x00, 0x02
_UNIT_ATTENTION = 0x6
_BLOCK_LIMITS, _PROVISIONING = 0xB0, 0xB2
_LBPU = 0x80  # UNMAP is supported
_WRITE_PROTECTED = 0x80


def scan(host: ScsiFrontend) -> Iterator[dict[str, Any]]:
    """Yield vhost.initiator_session.Disk's members for every disk. FrontendError."""
    for target in range(min(host.config.max_target + 1, MAX_TARGETS)):
        for lun in _luns(host, target):
            disk = _describe(host, target, lun)
            if disk is not None:
                yield disk


def _ask(host: ScsiFrontend, target: int, lun: int, cdb: bytes) -> Answer:
    for _ in range(_ATTEMPTS):
        answer = host.command(target, lun, cdb, into=_ROOM)
        if answer.response or answer.status != _CHECK_CONDITION:
            break
        if not answer.sense or _sense_key(answer.sense) != _UNIT_ATTENTION:
            break
    return answer


def _sense_key(sense: bytes) -> int:
    place = 1 if sense[0] & 0x7F >= 0x72 else 2
    return sense[place] & 0xF if len(sense) > place else 0


def _data(host: ScsiFrontend, target: int, lun: int, cdb: bytes, least: int) -> bytes:
    """Return at least ``least`` bytes, or none if the command fails."""
    answer = _ask(host, target, lun, cdb)
    good = not answer.response and answer.status == _GOOD
    return answer.data if good and len(answer.data) >= least else b""


def _luns(host: ScsiFrontend, target: int) -> list[int]:
    """REPORT LUNS: SPC-5, section 6.35."""
    cdb = struct.pack(">BBBBBBIBB", 0xA0, 0, 0, 0, 0, 0, _ROOM, 0, 0)
    answer = _ask(host, target, 0, cdb)
    if answer.response == Response.BAD_TARGET:
        return []
    raw = answer.data
    if answer.response or answer.status or len(raw) < 8:
        return [0]
    count = min(int.from_bytes(raw[:4], "big"), len(raw) - 8) // 8
    numbers = (raw[8 + 8 * i : 16 + 8 * i] for i in range(count))
    return [(raw[0] & 0x3F) << 8 | raw[1] for raw in numbers]


def _page(host: ScsiFrontend, target: int, lun: int, page: int, least: int) -> bytes:
    """Return a page of vital product data: SPC-5, section 6.7."""
    return _data(host, target, lun, struct.pack(">BBBHB", 0x12, 1, page, 255, 0), least)


def _describe(host: ScsiFrontend, target: int, lun: int) -> dict[str, Any] | None:
    inquiry = _data(host, target, lun, struct.pack(">BBBHB", 0x12, 0, 0, 255, 0), 5)
    if not inquiry or inquiry[0] != 0:  # a direct-access device that is there
        return None
    capacity = _data(host, target, lun, struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0), 12)
    if not capacity:
        raise FrontendError(f"{host.path}: target {target} LUN {lun} has no READ CAPACITY (16)")
    last, block_size = struct.unpack_from(">QI", capacity)
    mode = _data(host, target, lun, bytes([0x1A, 0, 0x3F, 0, 255, 0]), 4)
    limits = _page(host, target, lun, _BLOCK_LIMITS, 28)
    provisioning = _page(host, target, lun, _PROVISIONING, 6)
    unmap = 0
    if limits and provisioning and provisioning[5] & _LBPU:
        unmap = min(int.from_bytes(limits[20:24], "big"), (1 << 31) // block_size) * block_size
    return {
        "target": target,
        "lun": lun,
        "block_size": block_size,
        "num_blocks": last + 1,
        "readonly": bool(mode and mode[2] & _WRITE_PROTECTED),
        "flush": True,
        "max_unmap": unmap,
        "max_zeroes": 0,
    }
