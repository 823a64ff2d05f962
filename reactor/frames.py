"""Messages of any size with any number of descriptors, in frames over a SOCK_SEQPACKET socket.

Each frame is one packet: a byte that says whether more of the same message follows, up to 32 KiB of
it, and up to 200 descriptors. What keeper and control process say to each other: reactor/keeper.py.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from reactor.operations import FileDescriptors
from reactor.rights import FDS_PER_MESSAGE, receive_with_fds, send_with_fds

_BYTES = 32 << 10  # well below net.core.wmem_default, which bounds a packet
_LAST, _MORE = b"\0", b"\1"

Frame = tuple[bytes, Sequence[int]]


def frames_of(data: bytes, fds: Sequence[int]) -> Iterator[Frame]:
    """Yield the frames of a message."""
    chunks = -(-len(data) // _BYTES)
    parcels = -(-len(fds) // FDS_PER_MESSAGE)
    count = max(chunks, parcels, 1)
    for n in range(count):
        chunk = data[n * _BYTES : (n + 1) * _BYTES]
        parcel = fds[n * FDS_PER_MESSAGE : (n + 1) * FDS_PER_MESSAGE]
        yield (_LAST if n == count - 1 else _MORE) + chunk, parcel


class Frames:
    """One end of a connection; owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._data = bytearray()
        self._fds = FileDescriptors()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a whole message; of a blocking socket. Raises OSError."""
        for frame in frames_of(data, fds):
            send_with_fds(self.socket, *frame)

    def receive(self) -> tuple[bytes, FileDescriptors] | None:
        """Read one frame; return the message that it ends, if it ends one.

        Raises EOFError at the end of the connection, BlockingIOError when there is nothing, OSError
        when not all descriptors could be taken (EMFILE).
        """
        try:
            frame, fds, flags = receive_with_fds(self.socket, 1 + _BYTES)
        except ConnectionResetError:
            # Said once, of a peer that has not read everything; what it sent is still to come.
            frame, fds, flags = receive_with_fds(self.socket, 1 + _BYTES)
        if not frame:
            raise EOFError
        self._fds.extend(fds)
        self._data += memoryview(frame)[1:]
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise OSError(24, "not all descriptors of a message came; raise the limit (ulimit -n)")
        if frame[:1] == _MORE:
            return None
        message = bytes(self._data), self._fds
        self._data, self._fds = bytearray(), FileDescriptors()
        return message

    def close(self) -> None:
        """Close the socket, and what has come of a message that is not complete."""
        self._fds.close()
        self.socket.close()
