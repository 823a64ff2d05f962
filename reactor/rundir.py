"""The run directory: where the processes of a cluster find each other, closed to all others."""

import contextlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from reactor.lockfile import InUse, LockFile

NAME = "vhost-reactor"


def default_run_dir() -> Path:
    """Return where a cluster of this user runs unless told otherwise.

    Root's is the same in a login session and in a service, so that one finds the other.
    """
    if os.geteuid() == 0:
        return Path("/run", NAME)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, NAME)
    return Path("/tmp", f"{NAME}-{os.geteuid()}")


def default_state_dir() -> Path:
    """Return where a cluster of this user keeps what must survive a restart, unless told."""
    if given := os.environ.get("STATE_DIRECTORY"):  # systemd.exec(5)
        return Path(given.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib", NAME)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base, NAME)


class RunDir:
    """A run directory that is ours alone until :meth:`close`.

    It is made if it is not there, and removed at the end if it was made and is empty. Raises InUse
    if another cluster runs there or others could enter it, OSError if it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            os.mkdir(self.path, 0o700)
            self._made = True
        except FileExistsError:
            self._made = False
        try:
            _check_private(self.path)
            self._lock = LockFile(os.fspath(self.path / "lock"), f"run directory {self.path}")
        except BaseException:
            self._remove()
            raise

    def close(self) -> None:
        """Let others have it, without the sockets of processes that could not remove theirs."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                        os.unlink(entry.path)
        self._lock.close()
        self._remove()

    def _remove(self) -> None:
        if self._made:
            with contextlib.suppress(OSError):  # not empty, or gone
                os.rmdir(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_private(path: Path) -> None:
    """Refuse a directory that others own or may enter: its mode is not ours to change."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise InUse(f"run directory {path} is not a directory; choose another")
    if found.st_uid != os.geteuid():
        raise InUse(f"run directory {path} belongs to user {found.st_uid}; choose another")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise InUse(f"run directory {path} is open to others (mode {mode:o}); make it 700")
