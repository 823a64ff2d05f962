"""The messages of the vhost-user protocol: their numbers, features, and what comes with each.

Names are those of "Vhost-user Protocol" (docs/interop/vhost-user.rst of QEMU) without VHOST_USER_.
The structures stand in vhost.payloads and can be imported from here too.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Self, TypeVar

from vhost.payloads import (
    MAX_FD_QUEUES,
    MAX_PAYLOAD,
    MAX_QUEUE_SIZE,
    MAX_QUEUES,
    MAX_TABLE_REGIONS,
    U64,
    Config,
    Inflight,
    IotlbMessage,
    Log,
    MemoryTable,
    NoPayload,
    Payload,
    ProtocolError,
    Region,
    SingleRegion,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
    check_overlap,
    check_queue_size,
    wire,
)

__all__ = [
    "MAX_FDS",
    "MAX_FD_QUEUES",
    "MAX_PAYLOAD",
    "MAX_QUEUES",
    "MAX_QUEUE_SIZE",
    "MAX_TABLE_REGIONS",
    "MESSAGES",
    "NEED_REPLY",
    "REPLY",
    "U64",
    "VERSION",
    "BackendRequest",
    "Config",
    "Feature",
    "Header",
    "Inflight",
    "IotlbMessage",
    "Log",
    "MemoryTable",
    "MessageType",
    "NoPayload",
    "Payload",
    "ProtocolError",
    "ProtocolFeature",
    "Region",
    "Request",
    "SingleRegion",
    "StateTransfer",
    "VringAddr",
    "VringFd",
    "VringState",
    "check_overlap",
    "decode",
    "decode_request",
    "message_type",
    "request_name",
]

VERSION = 0x1  # "Header": the lower two bits of flags
VERSION_MASK = 0x3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

MAX_FDS = MAX_TABLE_REGIONS  # that any message comes with

P = TypeVar("P", bound=Payload)


class Request(enum.IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """Back-end message types, for the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class Feature(enum.IntFlag):
    """Feature bits that are no device's own: virtio 1.2, section 6, and vhost-user's two."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


class ProtocolFeature(enum.IntFlag):
    """Protocol feature bits."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """What every message begins with; ``request`` is a number that may mean nothing to us."""

    request: int
    flags: int
    size: int

    WIRE: ClassVar = wire("III", 12)

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return self.WIRE.pack(self.request, self.flags, self.size)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the header in ``data``, 12 bytes; raise ProtocolError if it cannot be one."""
        header = cls(*cls.WIRE.unpack(data))
        name = request_name(header.request)
        if header.flags & VERSION_MASK != VERSION:
            raise ProtocolError(name, "flags", hex(header.flags), f"the version is {VERSION}")
        if header.size > MAX_PAYLOAD:
            raise ProtocolError(name, "size", header.size, f"at most {MAX_PAYLOAD} bytes")
        return header


@dataclass(frozen=True, slots=True)
class MessageType:
    """What comes with a message, and with its reply.

    ``fds`` and ``reply_fds`` are (least, most) numbers of descriptors; ``needs`` is the protocol
    feature without which the message may not be sent.
    """

    payload: type[Payload] | None = None
    fds: tuple[int, int] = (0, 0)
    reply: type[Payload] | None = None
    reply_fds: tuple[int, int] = (0, 0)
    needs: ProtocolFeature | None = None


_F = ProtocolFeature
_R = Request

# Messages that our back-end serves or our front-end sends. REM_MEM_REG should have no descriptor,
# but front-ends send one: the specification allows to take it and to close it.
MESSAGES: Mapping[int, MessageType] = MappingProxyType(
    {
        _R.GET_FEATURES: MessageType(reply=U64),
        _R.SET_FEATURES: MessageType(U64),
        _R.SET_OWNER: MessageType(),
        _R.RESET_OWNER: MessageType(),
        _R.SET_MEM_TABLE: MessageType(MemoryTable, (0, MAX_TABLE_REGIONS)),
        _R.SET_LOG_BASE: MessageType(Log, (1, 1), reply=U64, needs=_F.LOG_SHMFD),
        _R.SET_LOG_FD: MessageType(fds=(1, 1)),
        _R.SET_VRING_NUM: MessageType(VringState),
        _R.SET_VRING_ADDR: MessageType(VringAddr),
        _R.SET_VRING_BASE: MessageType(VringState),
        _R.GET_VRING_BASE: MessageType(VringState, reply=VringState),
        _R.SET_VRING_KICK: MessageType(VringFd, (0, 1)),
        _R.SET_VRING_CALL: MessageType(VringFd, (0, 1)),
        _R.SET_VRING_ERR: MessageType(VringFd, (0, 1)),
        _R.GET_PROTOCOL_FEATURES: MessageType(reply=U64),
        _R.SET_PROTOCOL_FEATURES: MessageType(U64),
        _R.GET_QUEUE_NUM: MessageType(reply=U64, needs=_F.MQ),
        _R.SET_VRING_ENABLE: MessageType(VringState),
        _R.SET_BACKEND_REQ_FD: MessageType(fds=(1, 1), needs=_F.BACKEND_REQ),
        _R.IOTLB_MSG: MessageType(IotlbMessage),
        _R.GET_CONFIG: MessageType(Config, reply=Config, needs=_F.CONFIG),
        _R.SET_CONFIG: MessageType(Config, needs=_F.CONFIG),
        _R.POSTCOPY_ADVISE: MessageType(reply=NoPayload, reply_fds=(1, 1), needs=_F.PAGEFAULT),
        _R.POSTCOPY_LISTEN: MessageType(needs=_F.PAGEFAULT),
        _R.POSTCOPY_END: MessageType(reply=U64, needs=_F.PAGEFAULT),
        _R.GET_INFLIGHT_FD: MessageType(
            Inflight, reply=Inflight, reply_fds=(1, 1), needs=_F.INFLIGHT_SHMFD
        ),
        _R.SET_INFLIGHT_FD: MessageType(Inflight, (1, 1), needs=_F.INFLIGHT_SHMFD),
        _R.RESET_DEVICE: MessageType(needs=_F.RESET_DEVICE),
        _R.SET_DEVICE_STATE_FD: MessageType(
            StateTransfer, (1, 1), reply=U64, reply_fds=(0, 1), needs=_F.DEVICE_STATE
        ),
        _R.CHECK_DEVICE_STATE: MessageType(reply=U64, needs=_F.DEVICE_STATE),
        _R.VRING_KICK: MessageType(VringState, needs=_F.INBAND_NOTIFICATIONS),
        _R.SET_STATUS: MessageType(U64, needs=_F.STATUS),
        _R.GET_STATUS: MessageType(reply=U64, needs=_F.STATUS),
        _R.GET_MAX_MEM_SLOTS: MessageType(reply=U64, needs=_F.CONFIGURE_MEM_SLOTS),
        _R.ADD_MEM_REG: MessageType(SingleRegion, (1, 1), needs=_F.CONFIGURE_MEM_SLOTS),
        _R.REM_MEM_REG: MessageType(SingleRegion, (0, 1), needs=_F.CONFIGURE_MEM_SLOTS),
    }
)


def request_name(request: int) -> str:
    """Return the name that the specification gives to a request, without its VHOST_USER_."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


def message_type(request: int) -> MessageType:
    """Return what is known of a request; raise ProtocolError if it is none of ours."""
    known = MESSAGES.get(request)
    if known is None:
        raise ProtocolError(request_name(request), "request", request, "not one that is offered")
    return known


def decode(payload: type[P], data: bytes, message: str) -> P:
    """Return a payload that is right by itself; raise ProtocolError."""
    decoded = payload.from_bytes(data, message)
    decoded.check(message)
    return decoded


def decode_request(request: int, data: bytes, fds: int) -> Payload | None:
    """Return the payload of a front-end's message that came with ``fds`` descriptors.

    Raises ProtocolError for a request that is unknown, has another size, a value that it never
    may have, or descriptors too many or few.
    """
    known, name = message_type(request), request_name(request)
    check_fds(fds, known.fds, name)
    if known.payload is None:
        if data:
            raise ProtocolError(name, "size", len(data), "the message has no payload")
        return None
    decoded = decode(known.payload, data, name)
    match decoded:
        case VringState():
            _check_num(request, decoded.num, name)
        case VringFd():
            expected = 0 if decoded.no_fd else 1
            check_fds(fds, (expected, expected), name)
        case MemoryTable():
            check_fds(fds, (len(decoded.regions), len(decoded.regions)), name)
        case Config() if request == Request.SET_CONFIG and not decoded.data:
            raise ProtocolError(name, "size", len(data), f"the {decoded.size} bytes are missing")
    return decoded


def _check_num(request: int, num: int, name: str) -> None:
    """Check the number of a vring state, which means something else in each message."""
    if request == Request.SET_VRING_NUM:
        check_queue_size(num, name, "num")
    elif request == Request.SET_VRING_ENABLE and num > 1:
        raise ProtocolError(name, "num", num, "0 or 1")
    elif request == Request.VRING_KICK and num:
        raise ProtocolError(name, "num", num, "0: it is reserved")


def check_fds(count: int, allowed: tuple[int, int], message: str) -> None:
    """Raise ProtocolError unless a message with ``allowed`` (least, most) may have ``count``."""
    least, most = allowed
    if not least <= count <= most:
        text = f"{least}" if least == most else f"{least} to {most}"
        raise ProtocolError(message, "number of descriptors", count, f"{text} expected")
