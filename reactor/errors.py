"""Errors that travel: from C to Python, and from an operation to whoever asked for it."""

from __future__ import annotations

import os
from typing import Any

# JSON-RPC 2.0, section 5.1; negative errno values are used beside them, as SPDK does.
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603


class OperationError(Exception):
    """An operation was refused or failed.

    ``code`` is a negative errno or a JSON-RPC error code; ``message`` says what was wrong, with
    which value, and what to do; ``data`` is anything else that a program could use (msgpack- and
    JSON-able).
    """

    def __init__(self, code: int, message: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def to_wire(self) -> dict[str, Any]:
        """Return the ``error`` member of a reply."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.data:
            wire["data"] = self.data
        return wire

    @classmethod
    def from_wire(cls, wire: Any) -> OperationError:
        """Return the error that a reply describes, whatever a peer put there."""
        if not isinstance(wire, dict):
            return cls(INTERNAL_ERROR, f"malformed error in reply: {wire!r:.100}")
        code, message, data = wire.get("code"), wire.get("message"), wire.get("data")
        return cls(
            code if isinstance(code, int) else INTERNAL_ERROR,
            message if isinstance(message, str) else "unknown error",
            data if isinstance(data, dict) else None,
        )


def check(rc: int, what: str) -> int:
    """Return ``rc`` of a C function; raise OSError(errno, strerror, what) when it is ``-errno``."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc), what)
    return rc


def to_operation_error(error: BaseException) -> OperationError:
    """Return what a caller is told of an exception that an operation raised."""
    if isinstance(error, OperationError):
        return error
    if isinstance(error, OSError) and error.errno:
        text = error.strerror or os.strerror(error.errno)
        detail = f"{text}: {error.filename}" if error.filename else text
        return OperationError(-error.errno, detail)
    return OperationError(INTERNAL_ERROR, f"internal error: {type(error).__name__}: {error}")
