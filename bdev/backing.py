"""The file behind a file disk, as the control process opens it: locked, probed, measured."""

import asyncio
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdev.kind import EINVAL
from bdev.parameters import BLOCK_SIZES
from reactor.errors import OperationError
from reactor.native import ffi, lib

_BLKSSZGET = 0x1268  # linux/fs.h: _IO(0x12, 104), the logical block size
# Seconds that the kernel may take to let go of what a process that was killed had open: it has to
# wait for what is under way in an io_uring, and does so after the process is gone.
LETTING_GO = 10.0
HOLDING = 1.0  # seconds that a holder gets who lives
_LOOK = 0.005  # seconds between looks
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)


@dataclass(frozen=True)
class Backing:
    """An open file and what is known of it. Whoever holds it closes ``fd``."""

    fd: int
    size: int  # bytes
    block_size: int
    readonly: bool
    direct: bool  # O_DIRECT
    memory_alignment: int
    offset_alignment: int
    unmap: bool
    block_device: bool


async def open_backing(path: str, block_size: int | None, readonly: bool, fd: int = -1) -> Backing:
    """Open and lock a regular file or a block device, or take over ``fd``, which is that.

    It is opened read-only where it cannot be written. A lock that a process has left behind which
    is dead is waited for, ``LETTING_GO`` seconds, one of a process that lives ``HOLDING``.
    OperationError: -16 if somebody else serves it (or has it mounted), -22 if it is neither kind of
    file or does not go with ``block_size``; or what open() says.
    """
    if fd < 0:
        fd = _open(path, readonly)
    try:
        os.set_blocking(fd, True)
        mode = os.fstat(fd).st_mode
        block_device = stat.S_ISBLK(mode)
        if not block_device and not stat.S_ISREG(mode):
            raise OperationError(EINVAL, f"{path}: neither a regular file nor a block device")
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        await _lock(fd, path, exclusive=writable)
        logical = _logical_block_size(fd) if block_device else 1
        memory, offset = _enable_direct(fd, block_size)
        chosen = _choose_block_size(path, block_size, max(logical, offset), logical)
        return Backing(
            fd=fd,
            size=os.lseek(fd, 0, os.SEEK_END),
            block_size=chosen,
            readonly=not writable,
            direct=offset > 1,
            memory_alignment=memory,
            offset_alignment=offset,
            unmap=writable
            and (_device_unmaps(fd) if block_device else not lib.file_probe_punch(fd)),
            block_device=block_device,
        )
    except BaseException:
        os.close(fd)
        raise


def _open(path: str, readonly: bool) -> int:
    """Open without O_DIRECT, which is tried once the file is known to be one."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not keep us waiting
    try:
        # O_EXCL makes the kernel refuse a block device that is mounted; elsewhere it means nothing.
        exclusive = os.O_EXCL if stat.S_ISBLK(os.stat(path).st_mode) else 0
        if not readonly:
            try:
                return os.open(path, flags | os.O_RDWR | exclusive)
            except OSError as error:
                if error.errno not in _CANNOT_WRITE:
                    raise
        return os.open(path, flags | os.O_RDONLY)
    except OSError as error:
        code = error.errno or errno.EIO
        if code == errno.EBUSY:
            raise OperationError(
                -code, f"{path}: in use by the system, a mount or a volume; release it first"
            ) from None
        raise OperationError(-code, f"{os.strerror(code)}: {path}") from None


async def _lock(fd: int, path: str, *, exclusive: bool) -> None:
    """One writer or several readers, in whatever process: the lock goes with the open file.

    A holder that lives may be letting go, too: io_uring closes its files a while after a process
    has ended, and other programs do not unlock theirs before.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            if loop.time() - began > (HOLDING if _is_held(fd) else LETTING_GO):
                raise OperationError(
                    -errno.EBUSY, f"{path}: locked, it is served already by this or another process"
                ) from None
        else:
            return
        await asyncio.sleep(_LOOK)


def _is_held(fd: int) -> bool:
    """Whether a process that is alive holds the lock: proc_locks(5).

    Holders that are dead are not shown, or still are; those of other containers never are.
    """
    inode = os.fstat(fd).st_ino
    with open("/proc/locks") as locks:
        fields = [line.split() for line in locks]
    return any(
        place.endswith(f":{inode}") and Path("/proc", pid).exists()
        for _, kind, _, _, pid, place, *_ in fields
        if kind == "FLOCK"
    )


def _logical_block_size(fd: int) -> int:
    size: int = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
    return size


def _enable_direct(fd: int, block_size: int | None) -> tuple[int, int]:
    """Switch O_DIRECT on if it works for these blocks.

    Returns the alignment that it demands of memory and of offsets; 1, 1 where it is off.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    alignment: Any = ffi.new("struct direct_alignment *")
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:  # the file system has none
        return 1, 1
    usable = lib.file_probe_direct(fd, alignment) == 0
    if usable and alignment.offset <= (block_size or max(BLOCK_SIZES)):
        return max(alignment.memory, 1), alignment.offset
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return 1, 1


def _choose_block_size(path: str, wanted: int | None, natural: int, logical: int) -> int:
    """Return the block size that was asked for, or the smallest that suits the file."""
    if wanted is None:
        return next(size for size in (*BLOCK_SIZES, natural) if size >= natural)
    if wanted < logical:
        raise OperationError(
            EINVAL, f"block_size {wanted}: {path} has blocks of {logical} bytes; use that"
        )
    return wanted


def _device_unmaps(fd: int) -> bool:
    """Whether a block device can drop ranges and have them read as zeroes."""
    device = os.fstat(fd).st_rdev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve() / "queue"
    if not queue.is_dir():  # a partition
        queue = queue.parent.parent / "queue"
    try:
        limits = [(queue / f"{name}_max_bytes").read_text() for name in ("discard", "write_zeroes")]
    except OSError:
        return False
    return all(int(limit) > 0 for limit in limits)
