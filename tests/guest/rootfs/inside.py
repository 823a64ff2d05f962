"""What the tests of NVMe drives do inside their guest: patterns, on files and on vhost-user disks.

python3 -m inside write|digest|discard WHERE OFFSET LENGTH [SEED]

WHERE is a block device of the kernel, or a socket of ours; digest prints the SHA-256 of what is
there, expect that of what write writes.
"""

import hashlib
import os
import random
import stat
import sys

from vhost.frontend import BlkFrontend


def pattern(length: int, seed: int) -> bytes:
    """Return bytes that no other seed gives."""
    return random.Random(seed).randbytes(length)


def on_socket(verb: str, where: str, offset: int, length: int, seed: int) -> None:
    """Go by way of the front-end."""
    with BlkFrontend.connect(where) as disk:
        if verb == "write":
            disk.write(offset, pattern(length, seed))
            disk.flush()
        elif verb == "discard":
            disk.discard([(offset, length)])
        elif verb == "zeroes":
            disk.write_zeroes([(offset, length)])
        else:
            print(hashlib.sha256(disk.read(offset, length)).hexdigest())


def on_device(verb: str, where: str, offset: int, length: int, seed: int) -> None:
    """Go by way of the kernel's driver."""
    fd = os.open(where, os.O_RDWR | os.O_SYNC)
    if verb == "write":
        os.pwrite(fd, pattern(length, seed), offset)
    else:
        print(hashlib.sha256(os.pread(fd, length, offset)).hexdigest())
    os.close(fd)


def main() -> None:
    """Do one thing."""
    verb, where, *numbers = sys.argv[1:]
    offset, length, seed = [int(n) for n in (*numbers, "0")][:3]
    if verb == "expect":
        print(hashlib.sha256(pattern(length, seed)).hexdigest())
        return
    run = on_socket if stat.S_ISSOCK(os.stat(where).st_mode) else on_device
    run(verb, where, offset, length, seed)


if __name__ == "__main__":
    main()
