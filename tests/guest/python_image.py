"""Python, this project and all that they load, for a guest's root file system.

What a process of the project has imported here is what the image gets: compiled, since an emulated
processor is slow to compile, and at the places where the interpreter and the loader look for it.
"""

from __future__ import annotations

import functools
import json
import py_compile
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.guest.cpio import Archive

ROOT = Path(__file__).resolve().parents[2]
HOME = "python"  # of the interpreter, in the guest
PROJECT = "project"
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY = re.compile(r"(/\S+) \(0x")
# Imports everything, runs nothing; codecs and such are imported by name at run time.
_LIST = """
import importlib, json, pkgutil, sys, encodings, asyncio
names = ["encodings.idna", "encodings.ascii", "encodings.latin_1", "stringprep"]
names += ["runpy", "pprint", "difflib", "concurrent.futures.thread"]
for package in ("asyncio", "reactor", "bdev", "scsi", "vhost", "zmq.backend", "msgpack"):
    found = importlib.import_module(package)
    names += [m.name for m in pkgutil.iter_modules(found.__path__, package + ".")]
for name in names:
    if "windows" not in name and not name.endswith("__main__") and "_native_build" not in name:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
print(json.dumps({n: m.__file__ for n, m in sys.modules.items() if getattr(m, "__file__", None)}))
"""


@functools.cache
def _modules() -> dict[str, str]:
    """Return the file of each module that the project imports."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def _destination(name: str, file: Path) -> str:
    """Return where a module's file goes, without a suffix for those that are compiled."""
    path = name.replace(".", "/")
    if file.name.startswith("__init__"):
        path += "/__init__"
    if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / ".venv"):
        return f"{PROJECT}/{path}"
    if "site-packages" in file.parts:
        return f"{HOME}/lib/{_VERSION}/site-packages/{path}"
    if file.suffix == ".so":
        return f"{HOME}/lib/{_VERSION}/lib-dynload/{path}"
    return f"{HOME}/lib/{_VERSION}/{path}"


def add_python(archive: Archive) -> None:
    """Add the interpreter as /python/bin/python3, and the project as /project."""
    interpreter = Path(sys.executable).resolve()
    archive.add_file(f"{HOME}/bin/python3", interpreter.read_bytes(), 0o755)
    archive.add_file(f"{PROJECT}/pyproject.toml", (ROOT / "pyproject.toml").read_bytes())
    libraries = _libraries(interpreter)
    for name, text in sorted(_modules().items()):
        file = Path(text)
        if name == "__main__" or not file.exists():
            continue
        place = _destination(name, file)
        if file.suffix == ".so":
            archive.add_file(f"{place}{''.join(file.suffixes)}", _stripped(file), 0o755)
            libraries |= _libraries(file)
        elif name == "os":  # the landmark by which the interpreter knows its home
            archive.add_file(f"{place}.py", file.read_bytes())
        else:
            archive.add_file(f"{place}.pyc", _compiled(file))
    for library in sorted(libraries):
        _add_library(archive, library)


@functools.cache
def _compiled(file: Path) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "module.pyc"
        py_compile.compile(
            str(file),
            str(target),
            dfile=str(file.name),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        return target.read_bytes()


@functools.cache
def _stripped(file: Path) -> bytes:
    """Return a library without its symbols for debugging, which may be most of it."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "stripped"
        command = ["strip", "--strip-debug", "-o", str(target), str(file)]
        subprocess.run(command, capture_output=True, check=True)
        return target.read_bytes()


def _libraries(program: Path) -> set[str]:
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return set(_LIBRARY.findall(listing))


def _add_library(archive: Archive, library: str) -> None:
    path = Path(library)
    if "site-packages" in path.parts:  # found relative to the module that needs it
        inner = path.parts[path.parts.index("site-packages") + 1 :]
        place = f"{HOME}/lib/{_VERSION}/site-packages/{'/'.join(inner)}"
    elif path.name.startswith("libpython"):
        place = f"lib/x86_64-linux-gnu/{path.name}"
    else:
        place = library
    if place not in archive:
        archive.add_file(place, _stripped(path.resolve()), 0o755)
