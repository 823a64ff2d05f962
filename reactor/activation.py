"""Sockets that a service manager has made and hands to us: sd_listen_fds(3), systemd.socket(5).

Such a socket takes connections while we are away, so that nobody is refused during a restart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START

_sockets: dict[str, socket.socket] = {}


def take() -> list[str]:
    """Take what the environment announces, and return the names.

    Nothing is announced to the processes that we start. Raises OSError for a descriptor that is no
    Unix stream socket that listens, and for a name that comes twice.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    for place in range(int(count)):
        name = names[place] if place < len(names) else "unknown"
        _sockets[name] = _adopt(FIRST_FD + place, name)
    return list(_sockets)


def find(name: str) -> socket.socket | None:
    """Return the socket of a name, which stays ours: duplicate it to close it."""
    return _sockets.get(name)


def hand_on() -> None:
    """Announce the sockets to the program that this process is about to execute."""
    if not _sockets:
        return
    # Above all that is in use, at first, since they may stand in each other's places.
    spare = [fcntl.fcntl(sock, fcntl.F_DUPFD, 1 << 9) for sock in _sockets.values()]
    for place, fd in enumerate(spare, FIRST_FD):
        os.dup2(fd, place)
    os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), str(len(spare))
    os.environ["LISTEN_FDNAMES"] = ":".join(_sockets)


def _adopt(fd: int, name: str) -> socket.socket:
    """Return a descriptor of ours as a socket; OSError if it is not what we can use."""
    if name in _sockets:
        text = f"two sockets of the service manager have the FileDescriptorName {name}"
        raise OSError(errno.EEXIST, text)
    what = f"the service manager's socket {name} (descriptor {fd})"
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from None
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (sock.family, sock.type, listens) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        sock.close()
        text = f"{what}: not what ListenStream= with a path and Accept=no makes"
        raise OSError(errno.EINVAL, text)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock
