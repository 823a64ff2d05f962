"""What an event looks like on the wire, and how large it may be (docs/events.md).

One msgpack map per message: ``{"id", "op", "args", "fds"}`` asks, ``{"id", "result"}`` or
``{"id", "error"}`` answers. Whatever arrives here was written by somebody else: decoding either
returns a checked message or raises :class:`MalformedError`, which carries the id so that its sender
can be told.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Annotated, Any

import msgpack  # type: ignore[import-untyped]
import msgspec

from reactor.errors import INVALID_REQUEST, PARSE_ERROR, OperationError

MAX_MESSAGE = 1 << 20  # bytes of one event, either way
MAX_ELEMENTS = 1 << 16  # of one array or map: a header that promises more is refused unread
MAX_ID = 64  # characters of an id that is a string

EventId = int | str
Request = tuple[EventId | None, str, dict[str, Any], int]

_REQUEST_MEMBERS = frozenset(("id", "op", "args", "fds"))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SUN_PATH = 108  # unix(7): sizeof sockaddr_un.sun_path, with the final NUL


class MalformedError(OperationError):
    """A message that breaks the rules; ``event_id`` is None when none could be read from it."""

    def __init__(self, code: int, message: str, event_id: EventId | None) -> None:
        super().__init__(code, message)
        self.event_id = event_id


class CallTimeoutError(OperationError, TimeoutError):
    """Nobody answered in time; the operation may or may not have run."""

    def __init__(self, target: str, op: str, timeout: float) -> None:
        super().__init__(-errno.ETIMEDOUT, f"{target} did not answer {op} within {timeout:g} s")


class PeerLostError(OperationError, ConnectionResetError):
    """The process that was to answer is gone; the operation may or may not have run."""

    def __init__(self, target: str, op: str) -> None:
        super().__init__(-errno.ECONNRESET, f"{target} went away before it answered {op}")


def socket_path(run_dir: str | os.PathLike[str], name: str) -> str:
    """Return the path of the socket of process ``name``; OSError if there can be none."""
    if not _NAME.fullmatch(name):
        raise OSError(
            errno.EINVAL,
            "process name is not of letters, digits, '_', '.' and '-', at most 64",
            name,
        )
    path = os.path.join(os.path.abspath(run_dir), name)
    if len(os.fsencode(path)) >= _SUN_PATH:
        raise OSError(
            errno.ENAMETOOLONG,
            f"socket path is longer than {_SUN_PATH - 1} bytes: use a shorter run directory",
            path,
        )
    return path


def encode(message: dict[str, Any]) -> bytes:
    """Return ``message`` in msgpack.

    Raises OperationError: -EINVAL for what msgpack cannot express, -EMSGSIZE for what is too large.
    """
    try:
        payload: bytes = msgpack.packb(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise OperationError(-errno.EINVAL, f"cannot be sent as msgpack: {error}") from None
    if len(payload) > MAX_MESSAGE:
        raise OperationError(
            -errno.EMSGSIZE, f"event has {len(payload)} bytes; the limit is {MAX_MESSAGE}"
        )
    return payload


def encode_request(
    event_id: EventId | None, op: str, args: dict[str, Any] | None, fds: int = 0
) -> bytes:
    """Return a request; ``id`` stands first so that it can be read even if the rest cannot."""
    message: dict[str, Any] = {} if event_id is None else {"id": event_id}
    message["op"] = op
    if args:
        message["args"] = args
    if fds:
        message["fds"] = fds
    return encode(message)


def _unpack(data: bytes | msgspec.Raw) -> Any:
    return msgpack.unpackb(data, max_array_len=MAX_ELEMENTS, max_map_len=MAX_ELEMENTS)


def decode(payload: bytes) -> dict[str, Any]:
    """Return the map that ``payload`` holds; raise MalformedError."""
    if len(payload) > MAX_MESSAGE:
        raise MalformedError(
            -errno.EMSGSIZE,
            f"event has {len(payload)} bytes; the limit is {MAX_MESSAGE}",
            salvage_id(payload),
        )
    try:
        message = _unpack(payload)
    except Exception as error:  # msgpack's own, Unicode's, and whatever an extension type raises
        text = str(error) or type(error).__name__
        raise MalformedError(
            PARSE_ERROR, f"not msgpack: {text:.200}", salvage_id(payload)
        ) from None
    if type(message) is not dict:
        raise MalformedError(INVALID_REQUEST, f"expected a map, got {type(message).__name__}", None)
    return message


class _Request(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A request as nearly all are, without descriptors; ``args`` as they came."""

    op: str
    id: int | Annotated[str, msgspec.Meta(max_length=MAX_ID)] | None = None
    args: msgspec.Raw = msgspec.Raw()


_decode_request = msgspec.msgpack.Decoder(_Request).decode


def decode_request(payload: bytes) -> Request:
    """Return ``(id, op, args, fds)`` of a request; raise MalformedError."""
    if len(payload) <= MAX_MESSAGE:
        try:
            request = _decode_request(payload)
            args = _unpack(request.args) if request.args else {}
        except Exception:  # which the other way says more of
            return _decode_any_request(payload)
        if type(args) is dict:
            return request.id, request.op, args, 0
    return _decode_any_request(payload)


def _decode_any_request(payload: bytes) -> Request:
    """Return any request, and say of one that is none what is wrong with it."""
    message = decode(payload)
    event_id = message.get("id")
    if event_id is not None and not _is_id(event_id):
        raise _invalid(f"id: expected an integer or at most {MAX_ID} characters", event_id, None)
    if not message.keys() <= _REQUEST_MEMBERS:
        unknown = min(str(key) for key in message.keys() - _REQUEST_MEMBERS)
        raise _invalid("expected id, op, args and fds", unknown, event_id)
    op = message.get("op")
    if type(op) is not str:
        raise _invalid("op: expected a string", op, event_id)
    args = message.get("args")
    if args is None:
        args = {}
    elif type(args) is not dict:
        raise _invalid("args: expected a map", args, event_id)
    fds = message.get("fds", 0)
    if fds != 0 and (type(fds) is not int or fds < 0 or type(event_id) is not int or event_id < 0):
        raise _invalid(
            "fds: expected a count, beside an id that is an unsigned integer", fds, event_id
        )
    return event_id, op, args, fds


def _is_id(value: object) -> bool:
    return type(value) is int or (type(value) is str and len(value) <= MAX_ID)


def _invalid(what: str, value: object, event_id: EventId | None) -> MalformedError:
    # Not the repr of a container: its depth is the sender's choice, the stack's is not.
    shown = repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
    return MalformedError(INVALID_REQUEST, f"{what}, got {shown:.100}", event_id)


def salvage_id(payload: bytes) -> EventId | None:
    """Return the id of a message that cannot be decoded as a whole, if it can be found."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(payload), 1))
    unpacker.feed(payload)
    try:
        for _ in range(unpacker.read_map_header()):
            if unpacker.unpack() == "id":
                event_id: Any = unpacker.unpack()
                return event_id if _is_id(event_id) else None
            unpacker.skip()
    except Exception:  # the message is known to be broken; where does not matter
        return None
    return None
