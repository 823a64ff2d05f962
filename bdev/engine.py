"""How file disks reach the kernel: io_uring where it is allowed, else Linux AIO, else threads."""

import enum
import errno
import logging
import os

from bdev.backing import Backing
from bdev.kind import EINVAL
from reactor.errors import OperationError
from reactor.native import lib

log = logging.getLogger(__name__)


class Engine(enum.Enum):
    """One way; its value is its name to users."""

    IO_URING = "io_uring"
    AIO = "aio"
    THREADS = "threads"

    @property
    def native(self) -> int:
        """As in bdev/kernel_io.h."""
        return int(getattr(lib, f"KERNEL_IO_{'URING' if self is Engine.IO_URING else self.name}"))


# What kept io_uring from a process, by errno.
_URING_REFUSED = {
    errno.ENOSYS: "the kernel has none, or a seccomp profile hides it",
    errno.EPERM: "see sysctl kernel.io_uring_disabled, or a seccomp profile forbids it",
    errno.ENOMEM: "the limit of locked memory (ulimit -l) is too low for this kernel",
}
_AIO_REFUSED = {
    errno.ENOSYS: "the kernel has none, or a seccomp profile hides it",
    errno.EPERM: "a seccomp profile forbids it",
    errno.EAGAIN: "there are too many contexts: see sysctl fs.aio-max-nr",
}

_said: set[str] = set()  # once a process is enough


def refusal(engine: Engine, backing: Backing) -> str:
    """Return why a file cannot be reached in one way, with the likely cause; "" if it can."""
    if engine is Engine.IO_URING:
        rc, causes = lib.uring_probe(), _URING_REFUSED
    elif engine is Engine.AIO:
        if not backing.direct:
            return "without O_DIRECT, which this file does not have, it would block"
        rc, causes = lib.aio_probe(), _AIO_REFUSED
    else:
        return ""
    return causes.get(-rc, os.strerror(-rc)) if rc < 0 else ""


def choose_engine(backing: Backing, wanted: Engine | None = None) -> Engine:
    """Return ``wanted``, or the first that works; OperationError(-22) if ``wanted`` does not.

    That it is not the first of all is logged, once.
    """
    if wanted is not None:
        why = refusal(wanted, backing)
        if why:
            raise OperationError(EINVAL, f"engine {wanted.value}: {why}")
        return wanted
    refused = ""
    for engine in Engine:
        why = refusal(engine, backing)
        if not why:
            break
        refused = refused or why
    if refused and refused not in _said:
        _said.add(refused)
        log.warning("file disks go without io_uring (%s), by %s", refused, engine.value)
    return engine
