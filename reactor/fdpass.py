"""File descriptors for events: ZeroMQ cannot carry them, so they travel on a Unix socket beside it.

Each message on the channel is a header (the tag, which is the id of an event; how many descriptors
that event has; the index of the first one in this message) with up to 200 descriptors as
SCM_RIGHTS. Event and descriptors take different ways and arrive in any order: whoever handles the
event waits in :meth:`FdChannel.take`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import socket
import struct
from collections.abc import Callable, Sequence

from reactor.operations import FileDescriptors
from reactor.rights import FDS_PER_MESSAGE, receive_with_fds, send_with_fds

MAX_FDS = 4096  # of one event: 1024 queues with two eventfds each, and room
CLAIM_TIMEOUT = 10.0  # seconds that descriptors wait for their event, and it for them

READY = 0  # a tag that no event has: says, without descriptors, that a reactor is ready
RENEW = 1 << 63  # in tags with which a new control process asks a reactor to begin anew

_HEADER = struct.Struct("=QII")
_BATCH = 16  # messages read before the loop's other callbacks get their turn

log = logging.getLogger(__name__)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new channel, close-on-exec."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, theirs


@dataclasses.dataclass(slots=True)
class _Parcel:
    """The descriptors of one tag: as far as they have arrived, and whether somebody waits."""

    complete: asyncio.Future[None]
    timer: asyncio.TimerHandle
    fds: FileDescriptors = dataclasses.field(default_factory=FileDescriptors)
    claimed: bool = False


class FdChannel:
    """One end of a channel; owns the socket, and the descriptors that nobody has claimed yet.

    ``on_closed`` is called once, when the other end is gone; ``on_renew`` with a tag that asks for
    it and the descriptors that came with it, when nothing that came before is waited for any more.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop | None = None,
        on_closed: Callable[[], None] | None = None,
    ) -> None:
        self.on_closed = on_closed
        self.on_renew: Callable[[int, FileDescriptors], None] | None = None
        self._socket = sock
        self._loop = loop or asyncio.get_running_loop()
        self._parcels: dict[int, _Parcel] = {}
        self._connected = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def send(self, tag: int, fds: Sequence[int]) -> None:
        """Send duplicates of ``fds`` under ``tag``; without any, the tag alone is a signal.

        Raises OSError: EAGAIN when the other end does not read, EPIPE when it is gone, EBADF for a
        bad descriptor, E2BIG for more than MAX_FDS. What was sent before an error is dropped over
        there.
        """
        if len(fds) > MAX_FDS:
            raise OSError(errno.E2BIG, f"{len(fds)} file descriptors; the limit is {MAX_FDS}")
        for first in range(0, max(len(fds), 1), FDS_PER_MESSAGE):
            header = _HEADER.pack(tag, len(fds), first)
            chunk = fds[first : first + FDS_PER_MESSAGE]
            send_with_fds(self._socket, header, chunk)

    async def take(
        self,
        tag: int,
        count: int,
        timeout: float = CLAIM_TIMEOUT,
    ) -> FileDescriptors:
        """Return the ``count`` descriptors that were sent under ``tag``, once all are here.

        Raises TimeoutError when they do not come; OSError: EINVAL when another number was sent,
        EBUSY when they are waited for already, ECONNRESET when the other end is gone, EMFILE when
        the kernel could not hand over all.
        """
        parcel = self._parcels.get(tag)
        if parcel is None:
            if not self._connected:
                raise _gone()
            parcel = self._expect(tag)
        elif parcel.claimed:
            raise OSError(errno.EBUSY, f"file descriptors of event {tag} are claimed already")
        parcel.claimed = True
        parcel.timer.cancel()
        parcel.timer = self._loop.call_later(timeout, self._expire, tag)
        try:
            await parcel.complete
            if len(parcel.fds) != count:
                raise OSError(
                    errno.EINVAL, f"event {tag}: {len(parcel.fds)} file descriptors, not {count}"
                )
        except BaseException:
            parcel.fds.close()
            raise
        finally:
            parcel.timer.cancel()
            self._parcels.pop(tag, None)
        return parcel.fds

    def close(self) -> None:
        """Close the socket and unclaimed descriptors; ``on_closed`` is not called."""
        self._disconnect()
        self._socket.close()

    def _expect(self, tag: int) -> _Parcel:
        timer = self._loop.call_later(CLAIM_TIMEOUT, self._expire, tag)
        parcel = self._parcels[tag] = _Parcel(self._loop.create_future(), timer)
        return parcel

    def _expire(self, tag: int) -> None:
        error = TimeoutError(errno.ETIMEDOUT, f"file descriptors of event {tag} did not come")
        self._drop(tag, error)

    def _drop(self, tag: int, error: OSError) -> None:
        """Close what has arrived under ``tag``, and tell whoever waits for it."""
        parcel = self._parcels.pop(tag)
        parcel.timer.cancel()
        if not parcel.claimed:
            log.warning("%d file descriptors of event %d were never claimed", len(parcel.fds), tag)
            parcel.complete.cancel()
            parcel.fds.close()
        elif not parcel.complete.done():
            parcel.complete.set_exception(error)

    def _readable(self) -> None:
        for _ in range(_BATCH):
            try:
                data, fds, flags = receive_with_fds(self._socket, _HEADER.size)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self._disconnect()
                if self.on_closed is not None:
                    self.on_closed()
                return
            self._arrived(data, fds, flags)

    def _arrived(self, data: bytes, fds: FileDescriptors, flags: int) -> None:
        if len(data) != _HEADER.size:
            log.error("a message of %d bytes on the channel for descriptors", len(data))
            fds.close()
            return
        tag, total, first = _HEADER.unpack(data)
        if tag & RENEW and self.on_renew is not None:
            self._drop_all()
            self.on_renew(tag, fds)
            return
        parcel = self._parcels.get(tag) or self._expect(tag)
        if parcel.complete.done():
            log.error("%d file descriptors too many for event %d", len(fds), tag)
            fds.close()
            return
        in_order = first == len(parcel.fds)
        parcel.fds.extend(fds)
        if flags & socket.MSG_CTRUNC or not in_order:
            parcel.complete.set_exception(
                OSError(
                    errno.EMFILE,
                    f"event {tag}: lost some of {total} descriptors; raise the limit (ulimit -n)",
                )
            )
            parcel.complete.exception()  # seen: it may be that nobody ever claims them
        elif len(parcel.fds) >= total:
            parcel.complete.set_result(None)

    def _disconnect(self) -> None:
        if not self._connected:
            return
        self._connected = False
        self._loop.remove_reader(self._socket)
        self._drop_all()

    def _drop_all(self) -> None:
        for tag in list(self._parcels):
            self._drop(tag, _gone())


def _gone() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the other end of the channel is gone")
