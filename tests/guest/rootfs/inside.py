"""What the tests of NVMe drives do inside their guest: patterns, on files and on vhost-user disks.

    python3 -m inside write|digest|discard|zeroes|verify WHERE OFFSET LENGTH [SEED]

WHERE is a block device of the kernel, a socket of a vhost-blk controller, or scsi: and that of a
vhost-scsi controller whose target 0 it is. digest prints the SHA-256 of what is there; verify
compares it with what write writes.

    python3 -m inside serve REQUESTS ANSWERS

does the same, and runs vhost-reactor, in children of a process that has loaded everything: to start
Python takes an emulated processor longer than all it is asked for. Both are FIFOs. A request is a
JSON list, of "inside" or "vhost-reactor" and the arguments; the answer begins with the exit status.
"""

import hashlib
import json
import os
import random
import stat
import sys
import traceback

import bdev.check  # noqa: F401 - what vhost-reactor would import first
import reactor.rpc_client  # noqa: F401
import vhost.cli
from vhost.frontend import BlkFrontend
from vhost.frontend_scsi import ScsiFrontend

BLOCK = 512
PART = 256 << 10  # bytes of a SCSI command


def pattern(length: int, seed: int) -> bytes:
    """Return bytes that no other seed gives."""
    return random.Random(seed).randbytes(length)


def digest(data: bytes) -> None:
    """Print what tells data apart."""
    print(hashlib.sha256(data).hexdigest())


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
            digest(disk.read(offset, length))


class ScsiDisk:
    """Target 0 of a vhost-scsi controller (opcodes of SBC-4, blocks of 512 bytes)."""

    def __init__(self, host: ScsiFrontend) -> None:
        self.host = host
        self.do("00 00 00 00 00 00", check=False)  # the first command is told of the reset

    def do(self, cdb: str, out: bytes = b"", into: int = 0, *, check: bool = True) -> bytes:
        """Carry out a command that must succeed."""
        answer = self.host.command(0, 0, bytes.fromhex(cdb), out, into)
        if check and (answer.response or answer.status):
            raise OSError(f"{cdb}: status {answer.status:#x}, sense {answer.sense.hex()}")
        return answer.data

    def parts(self, opcode: str, offset: int, length: int) -> list[tuple[str, int, int]]:
        """Return CDBs of 16 bytes, with the bytes of the whole that each one is about."""
        found = []
        for at in range(0, length, PART):
            size = min(PART, length - at)
            where = f"{(offset + at) // BLOCK:016x}{size // BLOCK:08x}"
            found.append((f"{opcode}{where}0000", at, size))
        return found

    def run(self, verb: str, offset: int, length: int, seed: int) -> None:
        """Do one thing."""
        data = pattern(length, seed)
        if verb == "write":
            for cdb, at, size in self.parts("8a00", offset, length):
                self.do(cdb, data[at : at + size])
            self.do("91 00" + "00" * 14)
        elif verb == "verify":
            for cdb, at, size in self.parts("8f02", offset, length):  # BYTCHK 01b
                self.do(cdb, data[at : at + size])
            print("as written")
        elif verb == "discard":
            ranges = f"{offset // BLOCK:016x}{length // BLOCK:08x}00000000"
            self.do("42 00 00 00 00 00 00 00 18 00", bytes.fromhex("00160010" + "0" * 8 + ranges))
        elif verb == "zeroes":
            where = f"{offset // BLOCK:016x}{length // BLOCK:08x}"
            self.do(f"9300{where}0000", bytes(BLOCK))
        else:
            parts = self.parts("8800", offset, length)
            digest(b"".join(self.do(cdb, into=size) for cdb, _, size in parts))


def on_scsi(verb: str, where: str, offset: int, length: int, seed: int) -> None:
    """Go by way of a vhost-scsi controller."""
    with ScsiFrontend.connect(where.removeprefix("scsi:")) as host:
        ScsiDisk(host).run(verb, offset, length, seed)


def on_device(verb: str, where: str, offset: int, length: int, seed: int) -> None:
    """Go by way of the kernel's driver."""
    fd = os.open(where, os.O_RDWR | os.O_SYNC)
    if verb == "write":
        os.pwrite(fd, pattern(length, seed), offset)
    else:
        digest(os.pread(fd, length, offset))
    os.close(fd)


def run(arguments: list[str]) -> None:
    """Do one thing."""
    verb, where, *numbers = arguments
    offset, length, seed = [int(n) for n in (*numbers, "0")][:3]
    if where.startswith("scsi:"):
        on_scsi(verb, where, offset, length, seed)
    elif stat.S_ISSOCK(os.stat(where).st_mode):
        on_socket(verb, where, offset, length, seed)
    else:
        on_device(verb, where, offset, length, seed)


def in_child(request: list[str], output: int) -> None:
    """Carry a request out in this process, which ends."""
    status = 0
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        if request[0] == "inside":
            run(request[1:])
        else:
            sys.argv = request
            vhost.cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(requests: str, answers: str) -> None:
    """Carry out one request after the other."""
    while True:
        with open(requests) as incoming:
            request = json.loads(incoming.read())
        output = os.memfd_create("output")
        child = os.fork()
        if child == 0:
            in_child(request, output)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.lseek(output, 0, os.SEEK_SET)
        with open(answers, "wb") as outgoing, open(output, "rb") as text:
            outgoing.write(b"%d\n" % status + text.read())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    run(sys.argv[1:])
