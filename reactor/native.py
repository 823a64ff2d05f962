"""The C part of all packages: ``ffi`` and ``lib`` of the one extension."""

from reactor._native import ffi, lib

CData = ffi.CData

__all__ = ["CData", "ffi", "lib"]
