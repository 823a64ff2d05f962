"""A SCSI target in the process of the test, driven CDB by CDB.

The device is the real ``struct scsi_target`` over a real bdev, polled by hand.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from bdev.ranges import RangeTable
from reactor.native import CData, ffi, lib

GOOD, CHECK_CONDITION, CONDITION_MET, BUSY, CONFLICT = 0, 2, 4, 8, 0x18
NO_SENSE, NOT_READY, MEDIUM_ERROR, HARDWARE_ERROR, ILLEGAL_REQUEST, UNIT_ATTENTION = (
    0,
    2,
    3,
    4,
    5,
    6,
)
DATA_PROTECT, MISCOMPARE = 7, 14

INVALID_OPCODE = (ILLEGAL_REQUEST, 0x2000)
OUT_OF_RANGE = (ILLEGAL_REQUEST, 0x2100)
INVALID_FIELD = (ILLEGAL_REQUEST, 0x2400)
NO_SUCH_UNIT = (ILLEGAL_REQUEST, 0x2500)
INVALID_LIST = (ILLEGAL_REQUEST, 0x2600)
LIST_LENGTH = (ILLEGAL_REQUEST, 0x1A00)
PROTECTED = (DATA_PROTECT, 0x2700)

WELL_KNOWN = 256


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    status: int
    sense: bytes
    data: bytes  # what Data-In holds of what was transferred
    transferred: int
    overrun: bool

    @property
    def code(self) -> tuple[int, int] | None:
        """Return (sense key, additional sense code and qualifier), or None without sense data."""
        if not self.sense:
            return None
        if self.sense[0] & 0x7F == 0x72:
            return self.sense[1] & 0xF, self.sense[2] << 8 | self.sense[3]
        return self.sense[2] & 0xF, self.sense[12] << 8 | self.sense[13]

    @property
    def field(self) -> tuple[int, int | None] | None:
        """Return where the field pointer of fixed sense data points: byte and bit."""
        if len(self.sense) < 18 or not self.sense[15] & 0x80:
            return None
        bit = self.sense[15] & 7 if self.sense[15] & 8 else None
        return int.from_bytes(self.sense[16:18], "big"), bit

    @property
    def information(self) -> int | None:
        """Return the INFORMATION field of fixed sense data, if it is valid."""
        return (
            int.from_bytes(self.sense[3:7], "big") if self.sense and self.sense[0] & 0x80 else None
        )


class Pending:
    """A command that was started."""

    def __init__(
        self, port: Port, cdb: bytes, out: list[int], into: list[int], **rest: Any
    ) -> None:
        self.port = port
        self.buffers = [ffi.new("uint8_t[]", max(size, 1)) for size in [*out, *into]]
        self.sizes = into
        items = [(buffer, size) for buffer, size in zip(self.buffers, [*out, *into], strict=True)]
        self._out = ffi.new("struct scsi_buffer[]", items[: len(out)])
        self._in = ffi.new("struct scsi_buffer[]", items[len(out) :])
        self.setup = {
            "id": 77,
            "cdb": cdb.ljust(lib.SCSI_CDB_SIZE, b"\0"),
            "out": self._out,
            "in": self._in,
            "out_count": len(out),
            "in_count": len(into),
        } | rest
        self.exec: CData = ffi.NULL

    def fill(self, data: bytes, sizes: list[int]) -> None:
        """Put ``data`` in the buffers that the device reads."""
        at = 0
        for buffer, size in zip(self.buffers, sizes, strict=False):
            ffi.memmove(buffer, data[at : at + size], size)
            at += size

    def start(self) -> Pending:
        """Hand it to the target."""
        setup = ffi.new("struct scsi_exec_setup *", self.setup)
        self.exec = lib.scsi_exec_start(self.port.reactor, self.port.target, setup)
        assert self.exec != ffi.NULL
        return self

    @property
    def done(self) -> bool:
        """Say whether it has ended."""
        return bool(lib.scsi_exec_done(self.exec))

    def wait(self) -> Answer:
        """Poll until it has ended, and return how."""
        events = ffi.new("struct reactor_event[]", 4)
        notice = ffi.new("struct reactor_notice *")
        for _ in range(100_000):
            if self.done:
                break
            while lib.reactor_next_notice(self.port.reactor, notice):
                pass  # with one at hand, polling would not wait
            lib.reactor_poll(self.port.reactor, 1_000_000, events, 4)
        assert self.done, "the command never ended"
        while lib.reactor_next_notice(self.port.reactor, notice):
            pass
        outcome: CData = ffi.new("struct scsi_outcome *")
        lib.scsi_exec_outcome(self.exec, outcome)
        assert lib.scsi_exec_free(self.exec) == 0
        count = len(self.buffers) - len(self.sizes)
        got = b"".join(
            ffi.buffer(buffer, size)[:]
            for buffer, size in zip(self.buffers[count:], self.sizes, strict=True)
        )
        return Answer(
            outcome.status,
            ffi.buffer(outcome.sense, outcome.sense_length)[:],
            got[: outcome.transferred] if self.sizes else b"",
            outcome.transferred,
            outcome.overrun,
        )


class Port:
    """A target as one initiator reaches it."""

    def __init__(
        self, reactor: CData, unit: Unit | None, initiator: int, number: int, lun: int = 0
    ) -> None:
        self.reactor = reactor
        ports = {
            "initiator": initiator,
            "target": 0x3000_0000_0000_0100 + number,
            "relative": number,
        }
        self.target = lib.scsi_target_create(ffi.new("struct scsi_ports *", ports))
        if unit is not None:
            assert self.add(unit, lun) == 0

    def add(self, unit: Unit, lun: int, **identity: Any) -> int:
        """Let the target have ``unit`` at ``lun``: 0 or -errno."""
        text = {
            "vendor": b"TEST    ",
            "product": b"unit            ",
            "revision": b"0001",
            "serial": b"serial-1".ljust(32),
            "uuid": bytes(range(16)),
        } | identity
        made = ffi.new("struct scsi_identity *", text)
        place = ffi.new("struct scsi_place *", (unit.shared, 0, unit.keeper, unit.keeper >= 0))
        return int(lib.scsi_target_add(self.target, lun, unit.bdev, place, made))

    def prepare(
        self,
        cdb: bytes,
        out: bytes = b"",
        into: int = 0,
        *,
        lun: int = 0,
        cut: list[int] | None = None,
        **rest: Any,
    ) -> Pending:
        """Return a command; ``cut`` has the sizes of buffers where one is not enough."""
        sizes = cut or ([len(out)] if out else [])
        outs, ins = (
            (sizes, [into] if into else []) if out else ([], cut or ([into] if into else []))
        )
        pending = Pending(self, cdb, outs, ins, lun=lun, **rest)
        pending.fill(out, outs)
        return pending

    def run(self, cdb: bytes, out: bytes = b"", into: int = 0, **rest: Any) -> Answer:
        """Carry out a command."""
        return self.prepare(cdb, out, into, **rest).start().wait()

    def ready(self) -> Port:
        """Take the unit attention that a new nexus finds."""
        assert self.run(bytes(6)).code == (UNIT_ATTENTION, 0x2900)
        return self

    def close(self) -> None:
        """Free the target."""
        lib.scsi_target_free(self.target)


class Unit:
    """A bdev and the state that its ports share."""

    def __init__(self, reactor: CData, bdev: CData) -> None:
        self.reactor, self.bdev = reactor, bdev
        self.fd = os.memfd_create("unit")
        assert lib.scsi_shared_init(self.fd) == 0
        self.shared = lib.scsi_shared_map(self.fd)
        assert self.shared != ffi.NULL
        lib.scsi_shared_sit(self.shared, 0)
        self.keeper = -1  # an eventfd where something keeps reservations on disk
        self.ports: list[Port] = []
        self.ranges = RangeTable("unit")
        rc = lib.bdev_set_ranges(bdev, self.ranges.fd, 0)
        assert rc in (0, -errno.EEXIST)  # as another unit on the same bdev has done

    def port(self, initiator: int = 0x3000_0000_0000_0001, number: int = 1) -> Port:
        """Return a new port, whose initiator has heard of the power-on."""
        self.ports.append(Port(self.reactor, self, initiator, number))
        return self.ports[-1].ready()

    def close(self) -> None:
        """Free everything."""
        for port in self.ports:
            port.close()
        lib.scsi_shared_unmap(self.shared)
        os.close(self.fd)
        self.ranges.close()
