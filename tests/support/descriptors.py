"""What the test process has open."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def open_fds() -> dict[int, str]:
    """Return what each descriptor refers to, but for the one that looks, and for garbage."""
    gc.collect()
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
    return found


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """AssertionError if the block leaves descriptors behind, of other than installed files.

    Libraries keep those: fonts that a plot was drawn with, for one.
    """
    before = open_fds()
    yield
    left = {
        fd: what
        for fd, what in open_fds().items()
        if before.get(fd) != what and "/site-packages/" not in what
    }
    assert not left, f"left open: {left}"
