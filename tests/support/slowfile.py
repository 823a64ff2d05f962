"""A file as slow as a test wants it: a FUSE file system of one file, served by this process.

What is written can be held back as by a disk that hangs: the kernel has the request, its caller may
die, and it takes effect when it is let go. Structures are those of linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, OPEN = 1, 2, 3, 4, 14
READ, WRITE, RELEASE, FSYNC, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 15, 16, 18, 20, 25, 26, 36, 42
NAMES = {READ: "read", WRITE: "write", FSYNC: "fsync"}
_SILENT = (FORGET, BATCH_FORGET, INTERRUPT)  # which have no answer

_HEADER = struct.Struct("=IIQQIIIHH")  # fuse_in_header: len, opcode, unique, nodeid, ...
_IO = struct.Struct("=QQIIQII")  # fuse_read_in, fuse_write_in: fh, offset, size, flags, ...
_ANSWER = struct.Struct("=IiQ")  # fuse_out_header: len, error, unique
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")

_BIG_WRITES, _ASYNC_DIO, _MAX_PAGES = 1 << 5, 1 << 15, 1 << 22
_DIRECT_IO, _PARALLEL_DIRECT_WRITES = 1 << 0, 1 << 6  # of FOPEN_
_ROOT, _FILE = 1, 2
_ROOM = 1 << 21
_DATASYNC = 1  # of fuse_fsync_in.fsync_flags

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Operation:
    """What the kernel has asked for."""

    name: str  # "read", "write" or "fsync"
    offset: int = 0
    data: bytes = b""
    size: int = 0
    datasync: bool = False
    unique: int = field(default=0, repr=False)
    held: bool = False


class SlowFile:
    """The file ``path`` of ``size`` bytes; ``operations`` are those of it, in order of arrival.

    While ``holding`` names an operation, those that come are held until ``let_go``: a write has its
    effect then. With ``parallel`` it is like a disk: whoever asks goes on, and may die,
    while the kernel waits, which sends one write after the other; but it forgets to sync then.
    """

    def __init__(self, directory: Path, size: int, *, parallel: bool = False) -> None:
        self.path = directory / "disk"
        self.data = bytearray(size)
        self.operations: list[Operation] = []
        self.holding = ""
        self._lock = threading.Lock()
        self._directory = directory
        self._parallel = parallel
        self._open_flags = _DIRECT_IO | _PARALLEL_DIRECT_WRITES if parallel else 0
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0"
        rc = _libc.mount(b"slowfile", os.fsencode(directory), b"fuse", 0, options.encode())
        if rc < 0:
            error = ctypes.get_errno()
            os.close(self._device)
            raise OSError(error, os.strerror(error), "mount")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let everything go, and unmount."""
        self.let_go()
        _libc.umount2(os.fsencode(self._directory), 2)  # MNT_DETACH
        self._ended.set()
        self._thread.join()
        os.close(self._device)

    @property
    def held(self) -> list[Operation]:
        """The operations that wait."""
        return [one for one in self.operations if one.held]

    def let_go(self) -> None:
        """Carry out what was held, and hold nothing any more."""
        with self._lock:
            self.holding = ""
            for operation in self.held:
                operation.held = False
                self._carry_out(operation)

    def _serve(self) -> None:
        while not self._ended.is_set():
            if not select.select([self._device], [], [], 0.05)[0]:
                continue
            try:
                request = os.read(self._device, _ROOM)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                continue
            self._dispatch(request)

    def _dispatch(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        body = request[_HEADER.size :]
        if opcode in NAMES:
            self._take(opcode, unique, body)
        elif opcode == INIT:
            flags = struct.unpack_from("=I", body, 12)[0]
            flags &= _BIG_WRITES | _MAX_PAGES | (_ASYNC_DIO if self._parallel else 0)
            answer = _INIT_OUT.pack(7, 38, 1 << 17, flags, 16, 12, 1 << 20, 1, 256, 0, 0)
            self._answer(unique, answer)
        elif opcode == LOOKUP and body.rstrip(b"\0") == self.path.name.encode():
            self._answer(unique, _ENTRY.pack(_FILE, 0, 1, 1, 0, 0) + self._attributes(_FILE))
        elif opcode == LOOKUP:
            self._answer(unique, error=errno.ENOENT)
        elif opcode in (GETATTR, SETATTR):
            self._answer(unique, struct.pack("=QII", 1, 0, 0) + self._attributes(node))
        elif opcode == OPEN:
            self._answer(unique, struct.pack("=QII", 1, self._open_flags, 0))
        elif opcode in (RELEASE, FLUSH):
            self._answer(unique)
        elif opcode not in _SILENT:
            self._answer(unique, error=errno.ENOSYS)

    def _take(self, opcode: int, unique: int, body: bytes) -> None:
        operation = Operation(NAMES[opcode], unique=unique)
        if opcode == FSYNC:
            operation.datasync = bool(struct.unpack_from("=QI", body)[1] & _DATASYNC)
        else:
            _, operation.offset, operation.size, *_ = _IO.unpack_from(body)
            operation.data = body[_IO.size : _IO.size + operation.size] if opcode == WRITE else b""
        with self._lock:
            operation.held = self.holding == operation.name
            self.operations.append(operation)
            if not operation.held:
                self._carry_out(operation)

    def _carry_out(self, operation: Operation) -> None:
        end = operation.offset + operation.size
        if operation.name == "write":
            self.data[operation.offset : end] = operation.data
            self._answer(operation.unique, struct.pack("=II", operation.size, 0))
        elif operation.name == "read":
            self._answer(operation.unique, bytes(self.data[operation.offset : end]))
        else:
            self._answer(operation.unique)

    def _attributes(self, node: int) -> bytes:
        size = len(self.data) if node == _FILE else 0
        mode = stat.S_IFREG | 0o600 if node == _FILE else stat.S_IFDIR | 0o700
        return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _answer(self, unique: int, body: bytes = b"", *, error: int = 0) -> None:
        head = _ANSWER.pack(_ANSWER.size + len(body), -error, unique)
        with suppress(FileNotFoundError):  # whoever asked has been interrupted, and is gone
            os.write(self._device, head + body)


@contextmanager
def slow_file(directory: Path, size: int, *, parallel: bool = False) -> Iterator[SlowFile]:
    """Mount one; OSError where this user may not."""
    directory.mkdir()
    file = SlowFile(directory, size, parallel=parallel)
    try:
        yield file
    finally:
        file.close()
