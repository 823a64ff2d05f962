"""A process that has started, with all that a reactor imports, but is not a reactor yet.

Starting Python takes longer than anything else when a reactor is replaced. So every reactor begins
as a standby: it imports, then sleeps until it is told which reactor it is. A cluster keeps one in
reserve, which takes the place of whichever reactor dies first.
"""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Sequence

import msgspec

from reactor.child import Child
from reactor.fdpass import FdChannel, channel_pair

_MAX_MESSAGE = 4096  # bytes of an assignment; they are about 50


class Assignment(msgspec.Struct, forbid_unknown_fields=True):
    """Which reactor a standby is to be."""

    name: str
    cpu: int
    log_level: str


class Standby:
    """The control process's end of a standby: its process, and the channel to it."""

    def __init__(self, options: Sequence[str]) -> None:
        """Start one with these options of ``reactor.process``; OSError if that fails."""
        self._socket, theirs = channel_pair()
        try:
            with theirs:
                channel = theirs.fileno()
                arguments = ["--channel", str(channel), *options]
                self.child = Child("reactor.process", arguments, (channel,))
        except BaseException:
            self._socket.close()
            raise

    def assign(self, assignment: Assignment, stats: int) -> FdChannel:
        """Make a reactor of it, which maps the statistics behind ``stats``; return its channel.

        Raises ConnectionError if the process has died; there is nothing left of it then.
        """
        try:
            socket.send_fds(self._socket, [msgspec.msgpack.encode(assignment)], [stats])
            return FdChannel(self._socket)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the channel of a process that was never assigned; it ends by that."""
        self._socket.close()


def await_assignment(channel: socket.socket) -> tuple[Assignment, int] | None:
    """Sleep until this process is told what it is: return that and the descriptor of statistics.

    None when the control process is gone. Raises OSError or msgspec.DecodeError for nonsense.
    """
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    # Not socket.recv_fds(): see reactor/fdpass.py.
    data, ancillary, _, _ = channel.recvmsg(_MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    fds = array.array("i", b"".join(rights for _, _, rights in ancillary))
    assignment = msgspec.msgpack.decode(data, type=Assignment)
    if len(fds) != 1:
        raise OSError(
            errno.EINVAL, f"assigned with {len(fds)} descriptors; statistics is the only one"
        )
    return assignment, fds[0]
