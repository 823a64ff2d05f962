"""Builds ``reactor._native``: every C file of the four packages in one cffi extension.

What Python sees of C stands in each header between ``/* cffi: begin */`` and ``/* cffi: end */``;
the same header is included by the C code, so that there is one source of truth. A C file or a
header that is put into a package's folder is found without being named anywhere.

Environment:
    NATIVE_WERROR=1      warnings are errors (CI)
    NATIVE_SANITIZE=...  value for -fsanitize=, e.g. ``address,undefined``
    NATIVE_CFLAGS=...    further compiler flags
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("reactor", "bdev", "scsi", "vhost")
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.M)
_SEEN_BY_PYTHON = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.S)


def headers() -> list[str]:
    """Return the packages' headers relative to the root, each after those it includes."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name in ordered or not (ROOT / name).exists():
            return
        for included in _INCLUDE.findall((ROOT / name).read_text()):
            visit(included)
        ordered.append(name)

    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.h")):
            visit(str(path.relative_to(ROOT)))
    return ordered


def sources() -> list[str]:
    """Return the packages' C files relative to the root."""
    return [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sorted((ROOT / package).glob("[!_]*.c"))
    ]


def declarations() -> str:
    """Return the C declarations that Python sees."""
    blocks = (_SEEN_BY_PYTHON.findall((ROOT / name).read_text()) for name in headers())
    return "\n".join(text for found in blocks for text in found)


def digest() -> int:
    """Return a number that is another one when any header is: see reactor/likeness.py."""
    found = hashlib.sha256()
    for name in sorted(headers()):
        found.update((ROOT / name).read_bytes())
    return int.from_bytes(found.digest()[:7])


def make() -> FFI:
    """Return the cffi builder of the extension."""
    flags = [
        "-std=gnu17",
        "-D_GNU_SOURCE",
        "-O3",
        "-mprfchw",  # prefetches for writing; CPUs without it do nothing
        "-g",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
        "-Wall",
    ]
    flags += ["-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    flags += ["-Werror=incompatible-pointer-types", "-Werror=implicit-function-declaration"]
    if os.environ.get("NATIVE_WERROR"):
        flags.append("-Werror")
    links: list[str] = []
    sanitize = os.environ.get("NATIVE_SANITIZE")
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        links.append(f"-fsanitize={sanitize}")
    else:
        flags.append("-flto=auto")
        links += ["-flto=auto", "-O3"]
    flags += os.environ.get("NATIVE_CFLAGS", "").split()

    ffi = FFI()
    ffi.cdef(declarations() + "\n#define REACTOR_HEADERS ...\n")
    ffi.set_source(
        "reactor._native",
        "\n".join(
            [f"#define REACTOR_HEADERS {digest()}ull"]
            + [f'#include "{name}"' for name in headers()]
        ),
        sources=sources(),
        depends=headers(),
        include_dirs=[str(ROOT)],
        libraries=["uring", "crypto"],
        extra_compile_args=flags,
        extra_link_args=links,
    )
    return ffi


ffibuilder = make()
