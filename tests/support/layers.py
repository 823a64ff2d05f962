"""Stacks of handles without a registry: each layer is opened as a reactor would."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from bdev.shared import Shared
from reactor.native import CData, ffi, lib

BLOCK = 512


class Layers:
    """Opens handles in one reactor; the last one, the top, is closed by whoever has it."""

    def __init__(self) -> None:
        self._reactor: CData = ffi.NULL
        self._handles: list[CData] = []
        self._fds: list[int] = []
        self.rules: list[Any] = []  # struct error_rules *, of each error()
        self._shared: list[Shared] = []
        self.slot = -1  # of the last one: the top

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.close(fd)
        for shared in self._shared:
            shared.close()

    def opener(self, make: Callable[[Layers], CData]) -> Callable[[CData], CData]:
        """Return what LocalDisk opens its handle with."""

        def open_handle(reactor: CData) -> CData:
            self._reactor = reactor
            top = make(self)
            self._handles.remove(top)
            return top

        return open_handle

    def close_handles(self) -> None:
        """Close what the top stood on."""
        for handle in reversed(self._handles):
            assert lib.bdev_close(handle) == 0
        self._handles.clear()

    def _add(self, handle: CData) -> CData:
        assert handle != ffi.NULL, os.strerror(ffi.errno)
        self._handles.append(handle)
        return handle

    def malloc(self, blocks: int) -> CData:
        fd = os.memfd_create("layer")
        self._fds.append(fd)
        os.ftruncate(fd, blocks * BLOCK)
        return self._add(lib.malloc_bdev_open(self._reactor, 1, self._next(), BLOCK, blocks, fd, 0))

    def _next(self) -> int:
        self.slot += 1
        return self.slot

    def passthru(self, base: CData) -> CData:
        return self._add(lib.passthru_bdev_open(1, self._next(), _blocks(base), base))

    def part(self, base: CData, first: int, blocks: int) -> CData:
        return self._add(lib.part_bdev_open(1, self._next(), first, blocks, base))

    def delay(self, base: CData) -> CData:
        latency = ffi.new("struct delay_latency *", {"avg_read": 1000, "p99_write": 50000})
        return self._add(lib.delay_bdev_open(1, self._next(), _blocks(base), base, latency, 1))

    def error(self, base: CData) -> CData:
        rules = Shared("layer", "struct error_rules")
        self._shared.append(rules)
        self.rules.append(rules.struct)
        return self._add(lib.error_bdev_open(1, self._next(), _blocks(base), base, rules.fd, 1))

    def limited(self, handle: CData, **limits: Any) -> CData:
        """Set limits of ``struct bdev_limits``; ``bytes`` is for all operations."""
        limits["bytes"] = [limits["bytes"]] * lib.BDEV_ALL_OPS
        assert lib.bdev_set_limits(handle, ffi.new("struct bdev_limits *", limits)) == 0
        return handle

    def raid(self, strip_blocks: int, bases: Sequence[tuple[CData, int]]) -> CData:
        """``bases`` with how many blocks are used of each; strips of no blocks: a concatenation."""
        handles = ffi.new("struct bdev *[]", [base for base, _ in bases])
        blocks = ffi.new("uint64_t[]", [count for _, count in bases])
        setup = ffi.new("struct raid_setup *", (len(bases), strip_blocks, handles, blocks))
        return self._add(lib.raid_bdev_open(self._reactor, 1, self._next(), setup))


def _blocks(handle: CData) -> int:
    return int(lib.bdev_size(handle)) // BLOCK
