"""File descriptors over Unix sockets (SCM_RIGHTS, unix(7)), close-on-exec and never lost."""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Sequence

from reactor.operations import FileDescriptors

FDS_PER_MESSAGE = 200  # below SCM_MAX_FD, 253

_FD = array.array("i")


def send_with_fds(sock: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0) -> int:
    """Send bytes with duplicates of descriptors; return how many bytes. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], rights, flags | socket.MSG_NOSIGNAL)


def receive_with_fds(
    sock: socket.socket, size: int, flags: int = 0, room: int = FDS_PER_MESSAGE
) -> tuple[bytes, FileDescriptors, int]:
    """Return data, descriptors and flags of one message. Raises OSError.

    Not socket.recv_fds(), which leaves its ``flags`` out (until Python 3.12), so that every
    descriptor would be inherited by the next process that is spawned.
    """
    space = socket.CMSG_SPACE(room * _FD.itemsize)
    data, ancillary, told, _ = sock.recvmsg(size, space, flags | socket.MSG_CMSG_CLOEXEC)
    fds = FileDescriptors()
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # What a truncated message leaves of a descriptor's bytes is no descriptor.
            whole = len(rights) - len(rights) % _FD.itemsize
            fds.extend(array.array(_FD.typecode, rights[:whole]))
    return data, fds, told


def consume(connection: socket.socket, count: int) -> int:
    """Take bytes that are there out of a connection, with their descriptors; return an errno or 0.

    Reading stops after bytes that came with descriptors, which the kernel closes here.
    """
    while count:
        try:
            count -= len(connection.recv(count, socket.MSG_DONTWAIT)) or count
        except OSError as error:
            return error.errno or errno.EIO
    return 0
