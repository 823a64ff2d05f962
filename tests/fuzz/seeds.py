"""Writes the inputs that fuzzing of rings begins with: ``python -m tests.fuzz.seeds``.

Each is a driver that keeps to the rules, so that a fuzzer has only to break them. The form of an
input is described in fuzz_ring.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus" / "ring"
PACKED, EVENT_IDX, INDIRECT, IN_ORDER, NOTIFY_ON_EMPTY, READ_ONLY, LOG, NO_KICKS = (
    1 << bit for bit in range(8)
)
KICKED, SILENT, MEDDLE, RESTART, RECOVER, TURN = 0, 1, 3, 4, 5, 6
AVAIL, USED, TABLE, HEADER, DATA, STATUS = 0x800, 0xC00, 0x1000, 0x1800, 0x3E00, 0x1F00
NEXT, WRITE, INDIRECT_FLAG, PACKED_AVAIL, PACKED_USED = 1, 2, 4, 1 << 7, 1 << 15
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13

Buffer = tuple[int, int, int]  # address, bytes, flags


def setup(flags: int, size: int) -> bytes:
    """Return the beginning of an input."""
    return struct.pack("<BBHH", flags, size, *((0x8000, 0x8000) if flags & PACKED else (0, 0)))


def patch(kind: int, offset: int, data: bytes) -> bytes:
    """Return a step that writes ``data``."""
    return struct.pack("<BHB", kind, offset, len(data)) + data


def request(kind: int, data: bytes = b"", length: int = 512) -> tuple[bytes, list[Buffer]]:
    """Return the step that writes a request's header and data, and its buffers."""
    step = patch(SILENT, HEADER, struct.pack("<IIQ", kind, 0, 1))
    buffers: list[Buffer] = [(HEADER, 16, 0)]
    if data:
        step += patch(SILENT, DATA, data)
        buffers.append((DATA, len(data), 0))
    elif kind == OUT:
        buffers.append((DATA, length, 0))
    elif length:
        buffers.append((DATA, length, WRITE))
    return step, [*buffers, (STATUS, 1, WRITE)]


def split(buffers: list[Buffer], count: int = 1) -> bytes:
    """Return the steps that make a chain available, ``count`` times in all."""
    descs = b"".join(
        struct.pack("<QIHH", a, n, f | (NEXT if i + 1 < len(buffers) else 0), i + 1)
        for i, (a, n, f) in enumerate(buffers)
    )
    return patch(SILENT, 0, descs) + patch(KICKED, AVAIL, struct.pack("<HHH", 0, count, 0))


def packed(buffers: list[Buffer], place: int = 0, wrap: bool = True) -> bytes:
    """Return the step that makes a chain available."""
    flags = PACKED_AVAIL if wrap else PACKED_USED
    descs = b"".join(
        struct.pack("<QIHH", a, n, 7, flags | f | (NEXT if i + 1 < len(buffers) else 0))
        for i, (a, n, f) in enumerate(buffers)
    )
    return patch(KICKED, 16 * place, descs)


def split_table(buffers: list[Buffer]) -> tuple[bytes, list[Buffer]]:
    """Put a chain into an indirect table."""
    table = b"".join(
        struct.pack("<QIHH", a, n, f | (NEXT if i + 1 < len(buffers) else 0), i + 1)
        for i, (a, n, f) in enumerate(buffers)
    )
    return patch(SILENT, TABLE, table), [(TABLE, len(table), INDIRECT_FLAG)]


def packed_table(buffers: list[Buffer]) -> tuple[bytes, list[Buffer]]:
    """Put a chain into an indirect table of the other format."""
    table = b"".join(struct.pack("<QIHH", a, n, 0, f) for a, n, f in buffers)
    return patch(SILENT, TABLE, table), [(TABLE, len(table), INDIRECT_FLAG)]


def log(entries: Iterable[tuple[int, int]], size: int) -> bytes:
    """Return the log of a packed ring whose entries are (number, descriptors) in flight."""
    taken = dict(entries)
    used = sum(taken.values())
    header = struct.pack("<QHHHHHHBB7x", 0, 1, size, used, used, 0, 0, 1, 1)
    body = b""
    for place in range(size):
        following = size if place == size - 1 else place + 1
        num = taken.get(place, 0)
        flags = WRITE if num else 0
        body += struct.pack(
            *("<BxHHHQHHIQ", num > 0, following, place + num - 1 if num else 0, num, place),
            *(3, flags, 64, DATA),
        )
    return header + body


def seeds() -> dict[str, bytes]:
    """Return all inputs by name."""
    found = {}
    ranges = struct.pack("<QIIQII", 0, 8, 0, 16, 8, 0)
    requests = {
        "read": request(IN),
        "write": request(OUT),
        "flush": request(FLUSH, length=0),
        "get-id": request(GET_ID, length=20),
        "discard": request(DISCARD, ranges),
        "write-zeroes": request(WRITE_ZEROES, ranges),
        "read-across-regions": request(IN, length=1024),
    }
    for name, (step, buffers) in requests.items():
        found[f"split-{name}"] = setup(EVENT_IDX | INDIRECT, 8) + step + split(buffers)
        found[f"packed-{name}"] = setup(PACKED | INDIRECT, 8) + step + packed(buffers)
    step, buffers = requests["read"]
    table, head = split_table(buffers)
    found["split-indirect"] = setup(INDIRECT, 8) + step + table + split(head)
    table, head = packed_table(buffers)
    found["packed-indirect"] = setup(PACKED | INDIRECT, 8) + step + table + packed(head)
    for name, kind in (("restart", RESTART), ("recover", RECOVER)):
        again = bytes([kind])
        found[f"split-{name}"] = setup(0, 8) + step + split(buffers) + again + split(buffers, 2)
        found[f"packed-{name}"] = (
            setup(PACKED, 8) + step + packed(buffers) + again + packed(buffers, 3)
        )
    found["packed-in-order"] = setup(PACKED | IN_ORDER, 8) + step + packed(buffers) * 2
    found["packed-in-flight"] = (
        setup(PACKED | LOG, 4)
        + step
        + patch(MEDDLE, 0, log([(0, 1), (1, 2)], 4))
        + bytes([RECOVER])
    )
    # An entry that is free twice over: chains 0-1 and 1.
    found["packed-in-two-chains"] = (
        setup(PACKED | LOG, 4)
        + step
        + patch(MEDDLE, 0, log([(0, 2), (1, 1)], 4))
        + bytes([RECOVER])
    )
    found["packed-stop-after-recovery"] = found["packed-in-flight"] + bytes([RESTART])
    entry = struct.pack("<B5xHQ", 1, 0, 1)
    found["split-in-flight"] = (
        setup(LOG, 8)
        + step
        + split(buffers)
        + patch(MEDDLE, 0, struct.pack("<QHHHH", 0, 1, 8, 0, 0) + entry)
        + bytes([RECOVER])
    )
    return found


if __name__ == "__main__":
    for name, data in seeds().items():
        (CORPUS / name).write_bytes(data)
