"""``vhost-reactor scsi``: send a command to a vhost-user-scsi device and show what it answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import click

from reactor.failure import Failure
from scsi.decode import describe_inquiry, describe_luns, describe_sense, status_name
from vhost.frontend_link import FrontendError
from vhost.frontend_scsi import Answer, ScsiFrontend
from vhost.virtio_scsi import CDB_SIZE, response_name

_MAX_TRANSFER = 16 << 20

# Commands with a name: the CDB, and how much the device may answer.
NAMED = {
    "inquiry": (bytes.fromhex("12 00 00 00 ff 00"), 255),
    "luns": (bytes.fromhex("a0 00 02 00 00 00 00 00 10 00 00 00"), 4096),
    "capacity": (bytes.fromhex("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00"), 32),
    "ready": (bytes(6), 0),
    "sense": (bytes.fromhex("03 00 00 00 fc 00"), 252),
    "modes": (bytes.fromhex("1a 08 3f 00 ff 00"), 255),
    "opcodes": (bytes.fromhex("a3 0c 00 00 00 00 00 00 20 00 00 00"), 8192),
    "keys": (bytes.fromhex("5e 00 00 00 00 00 00 10 00 00"), 4096),
}


def parse_cdb(words: tuple[str, ...]) -> tuple[bytes, int]:
    """Return the CDB that a name or hexadecimal bytes stand for, and its usual room for data."""
    if len(words) == 1 and words[0] in NAMED:
        return NAMED[words[0]]
    try:
        cdb = bytes.fromhex(" ".join(words))
    except ValueError:
        names = ", ".join(sorted(NAMED))
        text = f"{' '.join(words)[:60]!r} is neither hexadecimal bytes nor one of {names}"
        raise click.UsageError(text) from None
    if not 1 <= len(cdb) <= CDB_SIZE:
        raise click.UsageError(f"a CDB of {len(cdb)} bytes: it must have 1 to {CDB_SIZE}")
    return cdb, 0


def dump(data: bytes) -> str:
    """Return bytes in hexadecimal and as text, 16 a line."""
    lines = []
    for at in range(0, len(data), 16):
        part = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:6x}  {part.hex(' '):<47}  {text}")
    return "\n".join(lines)


def explain(cdb: bytes, answer: Answer) -> list[str]:
    """Return what is known of an answer, line by line."""
    lines = [f"response {response_name(answer.response)}, status {status_name(answer.status)}"]
    if answer.sense:
        lines.append(describe_sense(answer.sense))
    if answer.residual:
        lines.append(f"residual {answer.residual} bytes")
    if cdb[0] == 0x12 and not cdb[1] & 1 and answer.data:
        lines.append(describe_inquiry(answer.data))
    if cdb[0] == 0xA0 and answer.data:
        lines.append(describe_luns(answer.data))
    return lines


@click.command("scsi")
@click.argument("socket", type=click.Path(path_type=Path))
@click.argument("cdb", nargs=-1, required=True)
@click.option("--target", type=click.IntRange(0, 255), default=0, show_default=True)
@click.option("--lun", type=click.IntRange(0, 16383), default=0, show_default=True)
@click.option("-i", "--in", "room", type=click.IntRange(0, _MAX_TRANSFER), help="Bytes to receive.")
@click.option("-o", "--out", type=click.File("rb"), help="File whose bytes are sent.")
@click.option("--raw", is_flag=True, help="Write received bytes as they are, and nothing else.")
@click.option("-t", "--timeout", type=float, default=10.0, show_default=True, help="Seconds.")
def scsi_command(
    socket: Path,
    cdb: tuple[str, ...],
    target: int,
    lun: int,
    room: int | None,
    out: BinaryIO | None,
    raw: bool,
    timeout: float,
) -> None:
    """Send a CDB to the vhost-user-scsi device on SOCKET and show what it answers.

    CDB is hexadecimal bytes, or a name: inquiry, luns, capacity, ready, sense, modes, opcodes,
    keys. Unit attentions that a new initiator finds are taken first. Exit status 1: the command
    ended with another status than GOOD.
    """
    command, usual = parse_cdb(cdb)
    data = out.read(_MAX_TRANSFER + 1) if out is not None else b""
    if len(data) > _MAX_TRANSFER:
        raise click.UsageError(f"more than {_MAX_TRANSFER} bytes to send")
    try:
        with ScsiFrontend.connect(socket, timeout=timeout) as host:
            host.command(target, lun, NAMED["sense"][0], into=252)
            answer = host.command(target, lun, command, data, usual if room is None else room)
    except FrontendError as error:
        raise Failure(str(error)) from None
    if raw:
        sys.stdout.buffer.write(answer.data)
    else:
        click.echo("\n".join(explain(command, answer)))
        if answer.data:
            click.echo(dump(answer.data))
    sys.exit(0 if answer.response == 0 and answer.status == 0 else 1)
