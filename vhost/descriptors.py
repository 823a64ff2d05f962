"""Is a descriptor that a front-end sent what it has to be? And files for in-flight logs."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import struct

from vhost.messages import Inflight, ProtocolError, Region
from vhost.record import InflightArea, LogPart

LOG_ALIGNMENT = 64  # of a queue's log in its file, as every back-end with in-flight logs has it
_VERSION_OFFSET = 8  # of the version in a queue's log of either format, 16 bits; 0: unused yet
_MEMFD_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def check_eventfd(fd: int, message: str) -> None:
    """Raise ProtocolError unless ``fd`` is an eventfd; make it non-blocking.

    A reactor reads kicks and writes calls: neither may ever wait, whatever the front-end does with
    the counter. The flag belongs to the open file, so the front-end sees it too; those that we know
    of set it themselves.
    """
    kind = os.readlink(f"/proc/self/fd/{fd}")
    if kind != "anon_inode:[eventfd]":
        raise ProtocolError(message, "descriptor", kind, "an eventfd")
    os.set_blocking(fd, False)


def check_stream(fd: int, message: str) -> None:
    """Raise ProtocolError unless ``fd`` is a Unix stream socket."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with socket.socket(fileno=os.dup(fd)) as sock:
            kind = f"a socket of family {sock.family!r}, type {sock.type!r}"
            if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
                return
    else:
        kind = os.readlink(f"/proc/self/fd/{fd}")
    raise ProtocolError(message, "descriptor", kind, "a Unix stream socket")


def check_pipe(fd: int, message: str) -> None:
    """Raise ProtocolError unless ``fd`` is an end of a pipe, which can be used without waiting."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        kind = os.readlink(f"/proc/self/fd/{fd}")
        raise ProtocolError(message, "descriptor", kind, "an end of a pipe")


def check_memory(fd: int, region: Region, message: str) -> None:
    """Raise ProtocolError unless ``region`` can be mapped from ``fd``."""
    for axis in ("guest", "size", "user", "offset"):
        value = getattr(region, axis)
        if value % mmap.PAGESIZE:
            raise ProtocolError(message, axis, hex(value), f"a multiple of {mmap.PAGESIZE}")
    check_file(fd, region.offset, region.size, message)


def check_file(fd: int, offset: int, size: int, message: str) -> None:
    """Raise ProtocolError unless ``fd`` is writable memory that has this range."""
    info = os.fstat(fd)
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISCHR(info.st_mode)):
        kind = os.readlink(f"/proc/self/fd/{fd}")
        raise ProtocolError(message, "descriptor", kind, "memory: a file, a memfd or a device")
    if stat.S_ISREG(info.st_mode) and info.st_size < offset + size:
        need = f"{offset:#x} + {size:#x} bytes, which the region has"
        raise ProtocolError(message, "size of the file", hex(info.st_size), f"at least {need}")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ProtocolError(message, "descriptor", "not open for both", "reading and writing")


def log_stride(queue_size: int, *, packed: bool) -> int:
    """Return the bytes from one queue's log to the next in an area for queues of this size.

    Every back-end lays areas out like this, so that one can go on where another has left off. Sizes
    are those of QueueRegionSplit and QueueRegionPacked ("Inflight I/O tracking").
    """
    size = 32 + 32 * queue_size if packed else 16 + 16 * queue_size
    return -(-size // LOG_ALIGNMENT) * LOG_ALIGNMENT


def make_inflight(queues: int, queue_size: int, *, packed: bool) -> InflightArea:
    """Return a new area of zeroes, which costs memory only where it is used; raises OSError.

    It is sealed: nobody who gets the descriptor can take pages away that a reactor has mapped.
    """
    stride = log_stride(queue_size, packed=packed)
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, queues * stride)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _MEMFD_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return InflightArea(fd, 0, queues, queue_size, stride, shared=False)


def open_inflight(description: Inflight, fd: int, message: str, *, packed: bool) -> InflightArea:
    """Return the area that a front-end brings in ``fd``; raise ProtocolError."""
    stride = log_stride(description.queue_size, packed=packed)
    need = stride * description.num_queues
    if description.mmap_size < need:
        raise ProtocolError(message, "mmap size", description.mmap_size, f"at least {need} bytes")
    if description.mmap_offset % LOG_ALIGNMENT:
        value = hex(description.mmap_offset)
        raise ProtocolError(message, "mmap offset", value, f"a multiple of {LOG_ALIGNMENT}")
    check_file(fd, description.mmap_offset, description.mmap_size, message)
    queues, size = description.num_queues, description.queue_size
    return InflightArea(fd, description.mmap_offset, queues, size, stride, shared=True)


def log_of(area: InflightArea, index: int) -> LogPart:
    """Return queue ``index``'s part of an area that has one."""
    return LogPart(area.fd, area.offset + index * area.stride, area.stride)


def log_is_used(part: LogPart) -> bool:
    """Tell whether some process has served a queue with this log; raises OSError."""
    raw = os.pread(part.fd, 2, part.offset + _VERSION_OFFSET)
    return len(raw) == 2 and struct.unpack("=H", raw)[0] != 0


def forget_log(part: LogPart) -> None:
    """Make a log say that nobody has used it; raises OSError."""
    os.pwrite(part.fd, bytes(2), part.offset + _VERSION_OFFSET)
