"""What is known of a SANITIZE on disk, so that it goes on after a restart (SBC-4 section 4.11).

A file for each unit that is being sanitized, or could not be; it belongs to a bdev by its UUID.
One that cannot be understood is an error, and not the same as none: a medium of which the owner was
told that it is sanitized, or that failed to be, must not be served as if nothing had been.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec

from reactor.native import CData, ffi, lib
from scsi.files import remove_durably, write_durably

VERSION = 1
_MAX_SIZE = 1 << 16  # bytes; a pattern takes 8 KiB at most


class Sanitizing(msgspec.Struct, forbid_unknown_fields=True):
    """What a file has: struct scsi_sanitize, and how far it is."""

    version: int
    uuid: str
    erase: bool
    invert: bool
    unrestricted: bool
    passes: int
    pattern: bytes  # base64 in the file
    failed: bool = False
    done: int = 0  # bytes, of all passes

    @classmethod
    def of(cls, uuid: str, asked: CData) -> Sanitizing:
        """Return what a ``struct scsi_sanitize`` says."""
        pattern = ffi.buffer(asked.pattern, asked.length)[:]
        return cls(
            VERSION, uuid, asked.erase, asked.invert, asked.unrestricted, asked.passes, pattern
        )

    def native(self) -> CData:
        """Return it as a ``struct scsi_sanitize``."""
        made: CData = ffi.new("struct scsi_sanitize *")
        made.erase, made.invert, made.unrestricted = self.erase, self.invert, self.unrestricted
        made.passes, made.length = self.passes, len(self.pattern)
        ffi.memmove(made.pattern, self.pattern, len(self.pattern))
        return made


class SanitizeStore:
    """The files of one directory, which is made when the first one is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, uuid: str) -> Path:
        """Return where what is known of a bdev is."""
        return self.directory / f"{uuid}.json"

    def load(self, uuid: str) -> Sanitizing | None:
        """Return what was saved last. OSError: it cannot be read, or is not what was saved."""
        path = self.path(uuid)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_SIZE)
        except FileNotFoundError:
            return None
        try:
            found = msgspec.json.decode(data, type=Sanitizing)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(path, f"it is no such file ({error})") from None
        why = _fault(found, uuid)
        if why:
            raise _damaged(path, why)
        return found

    def save(self, what: Sanitizing) -> None:
        """Have it on disk when this returns. OSError."""
        write_durably(self.path(what.uuid), msgspec.json.encode(what) + b"\n")

    def remove(self, uuid: str) -> None:
        """Have nothing on disk when this returns. OSError."""
        if self.path(uuid).exists():
            remove_durably(self.path(uuid))


def _damaged(path: Path, why: str) -> OSError:
    text = f"{why}: bring it back, or remove it if the medium may be used as it is"
    return OSError(
        errno.EBADMSG, f"what is known of a SANITIZE is damaged: {text}", os.fspath(path)
    )


def _fault(found: Sanitizing, uuid: str) -> str | None:
    """Return what is wrong with a file, or None."""
    if found.version != VERSION:
        return f"version {found.version}, but this program knows only {VERSION}"
    if found.uuid != uuid:
        return f"of bdev {found.uuid:.40}, and not of {uuid}"
    if not 1 <= found.passes <= 31 or found.done < 0:
        return f"{found.passes} passes, {found.done} bytes done"
    if bool(found.pattern) == found.erase or len(found.pattern) > lib.SCSI_SANITIZE_PATTERN:
        return f"a pattern of {len(found.pattern)} bytes"
    return None
