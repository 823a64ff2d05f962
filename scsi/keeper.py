"""Persistent reservations on disk: a file for each unit whose initiators ask for it (APTPL).

The file is JSON and replaced as a whole. It belongs to a bdev by its UUID. One that cannot be
understood is an error, and not the same as none: who was shut out must not be let in by it.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import zlib
from pathlib import Path

import msgspec

from reactor.native import lib
from scsi.files import remove_durably, write_durably

VERSION = 1
_TYPES = (1, 3, 5, 6, 7, 8)  # of reservations, SPC-5 section 6.16.3.4
_MAX_SIZE = 1 << 20  # bytes; what 256 registrations take is far less


class Registration(msgspec.Struct, forbid_unknown_fields=True):
    """See struct scsi_registration."""

    initiator: int
    target: int
    key: int
    port: int
    type: int = 0  # of the reservation, where it is the holder's; else 0


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What a file has."""

    version: int
    uuid: str
    registrations: list[Registration]
    crc32: int = 0  # of all of it as it is encoded with 0 here


class DamagedError(OSError):
    """A file cannot be what was written: EBADMSG, and a text that says what is wrong with it."""

    def __init__(self, path: Path, why: str) -> None:
        text = f"{why}: bring the file back, or remove it to begin without reservations"
        super().__init__(errno.EBADMSG, f"reservations are damaged: {text}", os.fspath(path))


class ReservationStore:
    """The files of one directory, which is made when the first one is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()  # writers are worker threads
        self._tickets = itertools.count(1)
        self._written: dict[str, int] = {}  # ticket of what stands in the file, by UUID

    def path(self, uuid: str) -> Path:
        """Return where the reservations of a bdev are."""
        return self.directory / f"{uuid}.json"

    def load(self, uuid: str) -> list[Registration]:
        """Return what was saved last; nothing if there is no file.

        Raises DamagedError for one that is not ours, not of this bdev, or not whole, and OSError.
        """
        path = self.path(uuid)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_SIZE + 1)
        except FileNotFoundError:
            return []
        try:
            kept = msgspec.json.decode(data, type=Kept)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedError(path, f"not a file of reservations ({error})") from None
        why = _fault(kept, uuid)
        if why:
            raise DamagedError(path, why)
        return kept.registrations

    def ticket(self) -> int:
        """Return the turn of a state that is going to be saved: later states win."""
        return next(self._tickets)

    def save(self, uuid: str, registrations: list[Registration], ticket: int) -> None:
        """Have it on disk when this returns; without registrations there is no file. OSError."""
        with self._lock:
            if self._written.get(uuid, 0) > ticket:
                return
            if registrations:
                write_durably(self.path(uuid), _encode(uuid, registrations))
            else:
                remove_durably(self.path(uuid))
            self._written[uuid] = ticket


def _encode(uuid: str, registrations: list[Registration]) -> bytes:
    kept = Kept(VERSION, uuid, registrations)
    kept.crc32 = zlib.crc32(msgspec.json.encode(kept))
    return msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n"


def _fault(kept: Kept, uuid: str) -> str | None:
    """Return what is wrong with a file, or None."""
    if kept.version != VERSION:
        return f"version {kept.version}, but this program knows only {VERSION}"
    for one in kept.registrations:
        small = 0 < one.key < 1 << 64 and 0 <= one.port < 1 << 16
        if not small or not all(0 <= name < 1 << 64 for name in (one.initiator, one.target)):
            return f"registration {one} cannot be"
    crc, kept.crc32 = kept.crc32, 0
    if zlib.crc32(msgspec.json.encode(kept)) != crc:
        return "its checksum is wrong"
    if kept.uuid != uuid:
        return f"of bdev {kept.uuid:.40}, and not of {uuid}"
    if not 0 < len(kept.registrations) <= lib.SCSI_MAX_NEXUSES:
        return f"{len(kept.registrations)} registrations"
    types = [one.type for one in kept.registrations if one.type]
    if len(types) > 1 or not {*types} <= {*_TYPES}:
        return f"reservations of types {types}"
    if len({(one.initiator, one.target) for one in kept.registrations}) < len(kept.registrations):
        return "a nexus with two registrations"
    return None
