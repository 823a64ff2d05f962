"""A process that has started, with all that a reactor imports, but is not a reactor yet.

Starting Python takes longer than anything else when a reactor is replaced. So every reactor begins
as a standby: it imports, then sleeps until it is told which reactor it is. A cluster keeps one in
reserve, which takes the place of whichever reactor dies first.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

import msgspec

from reactor.child import Child
from reactor.fdpass import FdChannel, channel_pair
from reactor.rights import receive_with_fds, send_with_fds

_MAX_MESSAGE = 4096  # bytes of an assignment, or of a likeness; they are about 50


class Assignment(msgspec.Struct, forbid_unknown_fields=True):
    """Which reactor a standby is to be."""

    name: str
    cpu: int
    log_level: str


class Standby:
    """The control process's end of a standby: its process, and the channel to it.

    ``likeness`` is what it has sent when it could be told what it is: see reactor/likeness.py.
    """

    def __init__(self, options: Sequence[str], presence: int = -1) -> None:
        """Start one with these options of ``reactor.process``; OSError if that fails."""
        self.likeness = ""
        self._preparing = asyncio.Lock()
        self._socket, theirs = channel_pair()
        try:
            with theirs:
                channel = theirs.fileno()
                arguments = ["--channel", str(channel), "--presence", str(presence), *options]
                inherited = (channel,) if presence < 0 else (channel, presence)
                self.child = Child("reactor.process", arguments, inherited)
        except BaseException:
            self._socket.close()
            raise

    async def prepared(self) -> None:
        """Return when it can be told what it is; ConnectionError if it dies before."""
        async with self._preparing:
            if not self.likeness:
                self._socket.setblocking(False)
                data = await asyncio.get_running_loop().sock_recv(self._socket, _MAX_MESSAGE)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "the standby has died")
                self.likeness = data.decode()

    async def assign(self, assignment: Assignment, stats: int) -> FdChannel:
        """Make a reactor of it, which maps the statistics behind ``stats``; return its channel.

        Waits until it can be told. Raises ConnectionError if it has died; there is nothing left of
        it then.
        """
        try:
            await self.prepared()
            send_with_fds(self._socket, msgspec.msgpack.encode(assignment), [stats])
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
    data, fds, _ = receive_with_fds(channel, _MAX_MESSAGE)
    if not data:
        return None
    assignment = msgspec.msgpack.decode(data, type=Assignment)
    if len(fds) != 1:
        raise OSError(
            errno.EINVAL, f"assigned with {len(fds)} descriptors; statistics is the only one"
        )
    return assignment, fds.take(0)
