"""Whether two programs' reactors are told things in the same way: a digest of what tells so.

At an upgrade the control process of the new program meets reactors of the former one. It can have
them serve for a while, and replace one after the other, if it may talk to them as to its own
(docs/recovery.md). It may if what they understand and share with others is written in the same
words: the Python modules that a reactor consists of, and the C headers. C sources may differ.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from reactor.native import lib

_PACKAGES = ("reactor", "bdev", "scsi", "vhost")


def likeness() -> str:
    """Return the digest of the program that this process, a reactor, has imported."""
    sources: dict[str, Path] = {}
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)  # has the name of __main__, too
        if spec is not None and spec.has_location and spec.name.partition(".")[0] in _PACKAGES:
            sources[spec.name] = Path(spec.origin)
    digest = hashlib.sha256(f"{lib.REACTOR_HEADERS}".encode())
    for name, path in sorted(sources.items()):
        if path.suffix == ".py":
            digest.update(b"\n%s\n%s" % (name.encode(), path.read_bytes()))
    return digest.hexdigest()
