"""Writes ``reactor/_native.pyi`` from the built extension: ``python -m tests.support.native_stub``.

mypy then catches calls of C functions that do not exist or have other parameters.
"""

from __future__ import annotations

from pathlib import Path

from reactor.native import CData, ffi, lib

STUB = Path(__file__).resolve().parents[2] / "reactor" / "_native.pyi"

HEAD = """\
# Written by tests/support/native_stub.py from the built extension; a test compares the two.
from typing import Any

from cffi import FFI

ffi: FFI

class _Lib:
"""


def _type_name(ctype: CData) -> str:
    if ctype.kind == "void":
        return "None"
    if ctype.kind == "enum":
        return "int"
    if ctype.kind == "primitive":
        return {"_Bool": "bool", "float": "float", "double": "float"}.get(ctype.cname, "int")
    return "Any"


def text() -> str:
    """Return what the stub must contain."""
    lines = []
    for name in sorted(dir(lib)):
        value = getattr(lib, name)
        if isinstance(value, int):
            lines.append(f"    {name}: int")
            continue
        signature = ffi.typeof(value)
        if signature.kind == "pointer":  # functions with variable arguments are pointers to them
            signature = signature.item
        arguments = "".join(
            f", a{i}: {_type_name(argument)}" for i, argument in enumerate(signature.args)
        )
        arguments += ", /" if signature.args else ""
        lines.append(f"    def {name}(self{arguments}) -> {_type_name(signature.result)}: ...")
    return HEAD + "\n".join(lines) + "\n\nlib: _Lib\n"


if __name__ == "__main__":
    STUB.write_text(text())
