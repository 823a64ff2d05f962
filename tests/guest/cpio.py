"""Writes a cpio archive in the "newc" format, which the kernel unpacks as its first file system.

The format is in Documentation/driver-api/early-userspace/buffer-format.rst of Linux: for each file
a header of 110 ASCII characters, the name with its NUL, the content; header plus name and content
are each padded to a multiple of four. Everything belongs to root, whoever writes it.
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

_TRAILER = "TRAILER!!!"


class Archive:
    """Files of an initramfs; directories come into being with what is put into them."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._chunks: list[bytes] = []

    def __contains__(self, name: str) -> bool:
        return self._relative(name) in self._names

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file; ValueError if there is something of that name."""
        self._add(name, stat.S_IFREG | mode, content)

    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link; ValueError if there is something of that name."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_directory(self, name: str) -> None:
        """Add a directory, and those above it, unless they are there."""
        relative = self._relative(name)
        if relative not in ("", ".") and relative not in self._names:
            self._add(relative, stat.S_IFDIR | 0o755, b"")

    def to_bytes(self) -> bytes:
        """Return the finished archive."""
        return b"".join([*self._chunks, _record(0, _TRAILER, 0, b"", 1)])

    @staticmethod
    def _relative(name: str) -> str:
        return str(PurePosixPath("/", name).relative_to("/"))

    def _add(self, name: str, mode: int, content: bytes) -> None:
        relative = self._relative(name)
        if relative in self._names:
            raise ValueError(f"{relative} is in the archive already")
        self.add_directory(str(PurePosixPath(relative).parent))
        self._names.add(relative)
        links = 2 if stat.S_ISDIR(mode) else 1
        self._chunks.append(_record(len(self._names), relative, mode, content, links))


def _record(inode: int, name: str, mode: int, content: bytes, links: int) -> bytes:
    encoded = name.encode() + b"\0"
    # inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _pad(header + encoded) + _pad(content)


def _pad(block: bytes) -> bytes:
    return block + bytes(-len(block) % 4)
