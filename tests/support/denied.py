"""A file disk in a process that may not make some system calls, as in a container.

    python -m tests.support.denied FILE NAME...

prints the engine that was chosen and what was read back; what is logged goes to standard error.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import platform
import struct
import sys
from collections.abc import Sequence

from tests.support.bdevs import Bench

NUMBERS = {
    "x86_64": {"io_uring_setup": 425, "io_setup": 206, "membarrier": 324},
    "aarch64": {"io_uring_setup": 425, "io_setup": 0, "membarrier": 283},
}
EPERM = 1

# linux/filter.h, linux/seccomp.h, linux/prctl.h
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def instruction(code: int, value: int, on_true: int = 0, on_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, on_true, on_false, value)


def deny(names: Sequence[str]) -> None:
    """Have these system calls fail with EPERM from now on."""
    numbers = NUMBERS[platform.machine()]
    program = instruction(LOAD, 0)  # the number of the system call
    for name in names:
        program += instruction(JUMP_EQUAL, numbers[name], 0, 1) + instruction(RETURN, ERRNO | EPERM)
    program += instruction(RETURN, ALLOW)
    libc = ctypes.CDLL(None, use_errno=True)
    native = Program(len(program) // 8, program)
    for arguments in ((NO_NEW_PRIVS, 1, 0, 0, 0), (SET_SECCOMP, FILTER, ctypes.byref(native))):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


async def main(path: str) -> None:
    async with Bench() as bench:
        for name in ("F", "G"):
            params = {"filename": path, "readonly": name == "G", "block_size": 512}
            await bench.rpc("bdev_uring_create", name=name, **params)
            io = await bench.open(name)
            if name == "F":
                io.write(512, b"w" * 512, b"v" * 1024)
                io.write_zeroes(1024, 512)
                io.flush()
            (entry,) = await bench.rpc("bdev_get_bdevs", name=name)
            engine = entry["driver_specific"]["uring"]["engine"]
            print(json.dumps([engine, io.read(512, 1536).decode()]))
            await bench.close(name)
            await bench.rpc("bdev_uring_delete", name=name)


if __name__ == "__main__":
    deny(sys.argv[2:])
    asyncio.run(main(sys.argv[1]))
