"""What virtio-scsi looks like to both sides: virtio 1.2, section 5.6."""

from __future__ import annotations

import enum
import struct
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

CDB_SIZE = 32
SENSE_SIZE = 96
CONTROL_QUEUE, EVENT_QUEUE, FIRST_REQUEST_QUEUE = 0, 1, 2
EVENTS_MISSED = 1 << 31

COMMAND = struct.Struct(f"<8sQBBB{CDB_SIZE}s")  # lun, id, task_attr, prio, crn, cdb
RESPONSE = struct.Struct("<IIHBB")  # sense_len, residual, status_qualifier, status, response
TASK_MANAGEMENT = struct.Struct("<II8sQ")  # type, subtype, lun, id
NOTIFICATION = struct.Struct("<I8sI")  # type, lun, event_requested
EVENT = struct.Struct("<I8sI")  # event, lun, reason


class ScsiFeature(enum.IntFlag):
    """Feature bits of virtio-scsi, section 5.6.3."""

    INOUT = 1 << 0
    HOTPLUG = 1 << 1
    CHANGE = 1 << 2


class Response(enum.IntEnum):
    """Response codes of commands and of task management, sections 5.6.6.1 and 5.6.6.2."""

    OK = 0
    OVERRUN = 1
    ABORTED = 2
    BAD_TARGET = 3
    RESET = 4
    BUSY = 5
    TRANSPORT_FAILURE = 6
    TARGET_FAILURE = 7
    NEXUS_FAILURE = 8
    FAILURE = 9
    FUNCTION_SUCCEEDED = 10
    FUNCTION_REJECTED = 11
    INCORRECT_LUN = 12


def response_name(response: int) -> str:
    """Return the name of a response code."""
    try:
        return Response(response).name
    except ValueError:
        return f"{response:#04x}"


class Function(enum.IntEnum):
    """Task management functions, section 5.6.6.2."""

    ABORT_TASK = 0
    ABORT_TASK_SET = 1
    CLEAR_ACA = 2
    CLEAR_TASK_SET = 3
    I_T_NEXUS_RESET = 4
    LOGICAL_UNIT_RESET = 5
    QUERY_TASK = 6
    QUERY_TASK_SET = 7


class Event(enum.IntEnum):
    """Events, section 5.6.6.3."""

    NO_EVENT = 0
    TRANSPORT_RESET = 1
    ASYNC_NOTIFY = 2
    PARAM_CHANGE = 3


def address(target: int, lun: int) -> bytes:
    """Return how a request names a logical unit."""
    return bytes([1, target, 0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0])


@dataclass(frozen=True, slots=True)
class ScsiConfig:
    """The configuration space, section 5.6.4."""

    num_queues: int
    seg_max: int
    max_sectors: int
    cmd_per_lun: int
    event_info_size: int
    sense_size: int
    cdb_size: int
    max_channel: int
    max_target: int
    max_lun: int

    WIRE: ClassVar = struct.Struct("<IIIIIIIHHI")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return what the 36 bytes say."""
        return cls(*cls.WIRE.unpack_from(data))

    @property
    def is_scsi(self) -> bool:
        """Whether these bytes are such a space: virtio-blk has the size of blocks in this place."""
        return (self.sense_size, self.cdb_size) == (SENSE_SIZE, CDB_SIZE)

    def to_bytes(self) -> bytes:
        """Return the wire form, 36 bytes."""
        return self.WIRE.pack(*astuple(self))
