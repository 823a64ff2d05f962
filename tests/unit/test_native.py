"""The seam between C and Python."""

from __future__ import annotations

import re

from reactor._native_build import declarations, headers
from reactor.native import ffi
from tests.support import native_stub


def test_stub_says_what_the_extension_has() -> None:
    assert native_stub.STUB.read_text() == native_stub.text()


def test_every_declared_structure_agrees_with_the_compiler() -> None:
    """cffi compares a structure with its declaration only when it is first used."""
    opaque = set(re.findall(r"^struct (\w+);", declarations(), re.M))
    defined = [name for name in ffi.list_types()[1] if name not in opaque]
    assert "reactor_counters" in defined
    for name in defined:
        assert ffi.sizeof(f"struct {name}") > 0


def test_headers_come_after_those_that_they_include() -> None:
    order = headers()
    assert order.index("reactor/reactor.h") < order.index("bdev/bdev.h")
    assert order.index("vhost/virtqueue.h") < order.index("vhost/blk.h")
    assert "struct reactor_counters" in declarations()
