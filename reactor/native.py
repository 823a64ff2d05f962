"""The C part of all packages: ``ffi`` and ``lib`` of the one extension."""

from typing import Any, TypeAlias

from reactor._native import ffi, lib

# A pointer or structure of C. cffi's stubs know no fields, so to a type checker it is anything.
CData: TypeAlias = Any

__all__ = ["CData", "ffi", "lib"]
