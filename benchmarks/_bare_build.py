"""Builds the C of this folder on demand: it is no part of the product's extension."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
LIBRARIES = {"cipher": ["crypto"]}
_SEEN_BY_PYTHON = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.S)


def load(name: str = "bare") -> Any:
    """Return the module of ``name``.[ch] with ``ffi`` and ``lib``, built anew if they changed."""
    depends = (f"benchmarks/{name}.c", f"benchmarks/{name}.h", "vhost/virtqueue.h")
    newest = max((ROOT / path).stat().st_mtime for path in depends)
    built = sorted(BUILD.glob(f"_{name}*.so"))
    if not built or built[-1].stat().st_mtime < newest:
        built = [Path(_make(name).compile(tmpdir=str(BUILD)))]
    spec = importlib.util.spec_from_file_location(f"_{name}", built[-1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make(name: str) -> FFI:
    header = (ROOT / f"benchmarks/{name}.h").read_text()
    ffi = FFI()
    ffi.cdef("\n".join(_SEEN_BY_PYTHON.findall(header)))
    ffi.set_source(
        f"_{name}",
        f'#include "benchmarks/{name}.h"\n#include "benchmarks/{name}.c"',
        include_dirs=[str(ROOT)],
        libraries=LIBRARIES.get(name, []),
        extra_compile_args=["-std=gnu17", "-O3", "-Wall", "-fno-strict-aliasing"],
    )
    return ffi
