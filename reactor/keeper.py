"""The keeper: a small process that holds what must outlive the control process.

    python -m reactor.keeper --run-dir DIR --channel FD --timeout SECONDS

It keeps *entries*: bytes and descriptors under a key, which mean nothing to it. The control process
puts them over its channel. When the control process ends, the keeper waits in the run directory for
the next one, and hands over all it has; after ``timeout`` seconds without one it ends, and with its
descriptors all that depends on them (a reactor ends when its channel does).

It also *finishes* a message of a connection that it keeps: it sends the answer, takes the message
out of the socket, and stores what is known of the connection now. So a message is either answered
and taken note of, or still in the socket for the next control process: see vhost/journal.py.

Requests are carried out one after the other, in the order in which they were sent, those of a dead
control process before the next one is heard.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence

import msgspec

from reactor.frames import Frames
from reactor.operations import FileDescriptors
from reactor.rights import consume, send_with_fds

SOCKET = "keeper"  # in the run directory
HAND_OVER_TIMEOUT = 10  # seconds in which a new control process has to read


class Request(msgspec.Struct, omit_defaults=True):
    """What the keeper is asked to do; ``op`` is put, drop, finish or end.

    put: replace entry ``key`` by ``data`` and the descriptors. finish: of the connection that is
    the entry's first descriptor, send ``reply`` with the last ``reply_fds`` of the descriptors,
    take ``consume`` bytes, then put, if there is ``data``.
    """

    op: str
    key: str = ""
    data: bytes | None = None
    consume: int = 0
    reply: bytes = b""
    reply_fds: int = 0


class Answer(msgspec.Struct, omit_defaults=True):
    """What became of a request: ``error`` is an errno; or an entry, when they are handed over."""

    error: int = 0
    key: str = ""
    data: bytes = b""


class Entry:
    """What is kept under one key."""

    def __init__(self, data: bytes, fds: FileDescriptors) -> None:
        self.data = data
        self.fds = fds


class Keeper:
    """The entries, the control process, and the socket at which the next one is awaited."""

    def __init__(self, run_dir: str, channel: socket.socket, timeout: float) -> None:
        self._path = os.path.join(run_dir, SOCKET)
        self._timeout = timeout
        self._entries: dict[str, Entry] = {}
        self._control: Frames | None = Frames(channel)
        self._deadline = 0.0
        self._told_to_end = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listen()

    def terminate(self, *_: object) -> None:
        """End (a signal handler): at once, or when there is no control process any more."""
        self._told_to_end = True
        if self._control is None:
            sys.exit(self.leave())

    def leave(self) -> int:
        """Remove the socket, and return the exit status; no signal changes that any more."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._remove_socket()
        return 0

    def run(self) -> None:
        """Serve until told to end, or until nobody has come in time."""
        while True:
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            if self._control is not None:
                poll.register(self._control.socket, select.POLLIN)
            left = None if self._control else max(0.0, self._deadline - time.monotonic())
            ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000)}
            if self._control is not None and self._control.socket.fileno() in ready:
                if not self._serve(self._control):
                    return
            elif self._listener.fileno() in ready:
                self._meet()
            elif self._control is None and time.monotonic() >= self._deadline:
                return

    def _remove_socket(self) -> None:
        """Remove the socket, at the end, unless it is already another keeper's."""
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def _listen(self) -> None:
        """Bind under another name first, so that it never refuses anybody where it is looked for.

        A keeper that is replaced, or has died, leaves its socket there until then.
        """
        fresh = f"{self._path}.{os.getpid()}"
        mask = os.umask(0o177)
        try:
            self._listener.bind(fresh)
        finally:
            os.umask(mask)
        self._listener.listen()
        self._inode = os.lstat(fresh).st_ino
        os.rename(fresh, self._path)

    def _serve(self, control: Frames) -> bool:
        """Read one frame and do what its message asks; False when told to end."""
        try:
            message = control.receive()
        except EOFError:
            control.close()
            self._control = None
            self._deadline = time.monotonic() + self._timeout
            return not self._told_to_end
        if message is None:
            return True
        data, fds = message
        with fds:
            request = msgspec.msgpack.decode(data, type=Request)
            error = self._do(request, fds)
        # If it has died, what it sent before is carried out nevertheless.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            control.send(msgspec.msgpack.encode(Answer(error)))
        return request.op != "end"

    def _do(self, request: Request, fds: FileDescriptors) -> int:
        """Carry out a request, and return an errno or 0."""
        error = 0
        if request.op == "finish":
            mine = len(fds) - request.reply_fds
            with FileDescriptors(fds[mine:]) as lent:
                del fds[mine:]
                error = self._finish(request, lent)
            if error == errno.EAGAIN:
                return error
        if request.op in ("put", "finish") and request.data is not None:
            former = self._entries.get(request.key)
            self._entries[request.key] = Entry(request.data, FileDescriptors(fds))
            fds.clear()
            if former is not None:
                former.fds.close()
        elif request.op == "drop" and (former := self._entries.pop(request.key, None)):
            former.fds.close()
        return error

    def _finish(self, request: Request, fds: Sequence[int]) -> int:
        """Answer a message and take it out of the socket; EAGAIN: nothing was done.

        An answer is so short that the socket takes all of it or nothing.
        """
        entry = self._entries.get(request.key)
        if entry is None:
            return errno.ENOENT
        with socket.socket(fileno=os.dup(entry.fds[0])) as connection:
            try:
                if request.reply:
                    send_with_fds(connection, request.reply, fds, socket.MSG_DONTWAIT)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    return errno.EAGAIN
                return error.errno or errno.EIO
            return consume(connection, request.consume)

    def _meet(self) -> None:
        """Let the next control process have everything, once the former is known to be dead."""
        sock, _ = self._listener.accept()
        while self._control is not None:
            if not select.select([self._control.socket], [], [], 0)[0]:
                sock.close()  # it lives
                return
            self._serve(self._control)
        limit = struct.pack("ll", HAND_OVER_TIMEOUT, 0)  # a struct timeval
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        control = Frames(sock)
        try:
            for key, entry in self._entries.items():
                control.send(msgspec.msgpack.encode(Answer(0, key, entry.data)), entry.fds)
            control.send(msgspec.msgpack.encode(Answer()))
        except OSError:
            control.close()  # it has died, or does not read: the next one may
        else:
            self._control = control


def main(arguments: Sequence[str]) -> int:
    """Run the keeper; return its exit status."""
    parser = argparse.ArgumentParser(prog="reactor.keeper")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.set_inheritable(options.channel, False)
    with open("/proc/self/comm", "w") as comm:
        comm.write("reactor-keeper")
    keeper = Keeper(options.run_dir, socket.socket(fileno=options.channel), options.timeout)

    signal.signal(signal.SIGTERM, keeper.terminate)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keeper.run()
    return keeper.leave()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
