"""Lock files: what a process holds as long as it lives, and the kernel lets go when it dies.

A lock is flock(2) on a file that carries the holder's pid and a word about it. The file is removed
on release; that a waiter may then hold a lock on a file that has gone is caught by looking again at
the name after locking.
"""

import contextlib
import fcntl
import os
import stat
from types import TracebackType
from typing import Self

_MESSAGE_MAX = 256


class InUse(Exception):  # noqa: N818 - it states a fact about a resource
    """Somebody else holds what was asked for; the message says who."""


class LockFile:
    """An exclusive lock, taken by the constructor and held until :meth:`close`.

    ``what`` names the resource in errors ("CPU 3"), ``owner`` is told to those who come too late.
    ``shared_between_users`` makes the file one that any user can lock, for what a machine has once.
    Raises InUse when another holds it, and OSError when the file cannot be made or opened.
    """

    def __init__(
        self, path: str, what: str, owner: str = "", *, shared_between_users: bool = False
    ) -> None:
        self.path = path
        mode = 0o666 if shared_between_users else 0o600
        while True:
            fd = _open(path, mode)
            try:
                locked = _lock(fd, path, what)
                if locked:
                    self._fd = fd
                    self._sign(owner)
                    return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    @classmethod
    def inherit(cls, fd: int, path: str, owner: str = "") -> Self:
        """Return the lock that ``fd``, a duplicate of its holder's descriptor, holds already."""
        lock = cls.__new__(cls)
        lock.path, lock._fd = path, fd
        lock._sign(owner)
        return lock

    def fileno(self) -> int:
        """Return the descriptor; whoever has a duplicate holds the lock, too."""
        return self._fd

    def _sign(self, owner: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()} {owner}\n".encode()[:_MESSAGE_MAX], 0)

    def close(self) -> None:
        """Remove the file and release the lock; harmless when done twice."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        # In a sticky directory another user's old file may be ours to lock but not to remove.
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _open(path: str, mode: int) -> int:
    """Open the file, making it if it is not there."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            # Without O_CREAT first: fs.protected_regular refuses it on others' files in /var/tmp.
            fd = os.open(path, flags)
        except FileNotFoundError:
            try:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:
                continue
            os.fchmod(fd, mode)  # whatever the umask took away
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise InUse(f"{path}: exists and is not a lock file; remove it")


def _lock(fd: int, path: str, what: str) -> bool:
    """Lock; False if the file was removed meanwhile by the one who held it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, _, owner = os.pread(fd, _MESSAGE_MAX, 0).decode(errors="replace").partition(" ")
        owner = owner.strip()
        holder = f"pid {pid.strip() or 'unknown'}" + (f" ({owner})" if owner else "")
        raise InUse(f"{what} is in use by {holder}; lock file {path}") from None
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))
