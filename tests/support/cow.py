"""Copy-on-write disks on files, for tests."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.support.bdevs import Bench


def folder(bench: Bench) -> Path:
    """Return a folder that goes with the bench."""
    made = tempfile.TemporaryDirectory(prefix="vr-")
    bench.temporary.append(made)
    return Path(made.name)


async def make_base(bench: Bench, contents: bytes, name: str = "B") -> Path:
    """Create a read-only file disk, and return the folder that it is in."""
    path = folder(bench) / name
    path.write_bytes(contents)
    await bench.rpc(
        "bdev_uring_create", name=name, filename=str(path), block_size=512, readonly=True
    )
    return path.parent


async def make_cow(bench: Bench, contents: bytes, **params: Any) -> Path:
    """Create C on B, with clusters of 4 KiB unless told otherwise; returns the overlay's path."""
    path = await make_base(bench, contents) / "C.overlay"
    await bench.rpc(
        "bdev_cow_create",
        **{"name": "C", "base": "B", "overlay": str(path), "cluster_size": 4096, **params},
    )
    return path
