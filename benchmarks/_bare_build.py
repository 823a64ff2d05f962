"""Builds the yardsticks of bare.c on demand: they are no part of the product's extension."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
_DEPENDS = ("benchmarks/bare.c", "benchmarks/bare.h", "vhost/virtqueue.h")
_SEEN_BY_PYTHON = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.S)


def load() -> Any:
    """Return the module with ``ffi`` and ``lib``, built anew if its sources have changed."""
    newest = max((ROOT / name).stat().st_mtime for name in _DEPENDS)
    built = sorted(BUILD.glob("_bare*.so"))
    if not built or built[-1].stat().st_mtime < newest:
        built = [Path(_make().compile(tmpdir=str(BUILD)))]
    spec = importlib.util.spec_from_file_location("_bare", built[-1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make() -> FFI:
    header = (ROOT / "benchmarks/bare.h").read_text()
    ffi = FFI()
    ffi.cdef("\n".join(_SEEN_BY_PYTHON.findall(header)))
    ffi.set_source(
        "_bare",
        '#include "benchmarks/bare.h"\n#include "benchmarks/bare.c"',
        include_dirs=[str(ROOT)],
        extra_compile_args=["-std=gnu17", "-O3", "-Wall", "-fno-strict-aliasing"],
    )
    return ffi
