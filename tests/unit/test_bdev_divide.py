"""Requests that are more than a device takes at once: their parts, and how they end.

Below the device with limits is one that withholds what reaches it: there the parts can be seen.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdev.io import Op, Request
from bdev.statistics import in_flight
from reactor.native import CData, ffi, lib
from tests.support.bdevs import LocalDisk
from tests.support.layers import Layers

BLOCK = 512
BLOCKS = 512
SIZE = BLOCK * BLOCKS
POOL = 128  # parts under way at a time
DATA = (Op.READ, Op.WRITE, Op.COMPARE)


@dataclass
class Limits:
    """``struct bdev_limits``."""

    sizes: dict[Op, int] = field(default_factory=dict)  # bytes by operation
    boundary: int = 0
    segments: int = 0
    unmap_unit: int = 0

    def native(self) -> CData:
        sizes = [self.sizes.get(op, 0) for op in Op]
        return ffi.new(
            "struct bdev_limits *", (sizes, self.boundary, self.segments, self.unmap_unit)
        )

    def parts(self, op: Op, offset: int, length: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
        """Return offsets and lengths of the parts of a request with buffers of lengths ``cuts``."""
        first, end = offset, offset + length
        if op is Op.UNMAP and self.unmap_unit:
            first = -(-offset // self.unmap_unit) * self.unmap_unit
            end = end // self.unmap_unit * self.unmap_unit
        found = []
        while first < end:
            most = min(end - first, self.sizes.get(op) or SIZE)
            if op in DATA:
                if self.boundary:
                    most = min(most, self.boundary - first % self.boundary)
                most = self._in_few_buffers(first - offset, most, cuts)
            found.append((first, most))
            first += most
        return found

    def _in_few_buffers(self, skip: int, length: int, cuts: Sequence[int]) -> int:
        ends = list(itertools.accumulate(cuts))
        inside = [end for end in ends if end > skip]
        if self.segments and len(inside) >= self.segments:
            length = min(length, inside[self.segments - 1] - skip)
        return length // BLOCK * BLOCK or BLOCK  # one that is in more of them goes by itself


class Stack:
    """A device with limits on one that withholds ``op`` on memory."""

    def __init__(self, limits: Limits, op: Op | None = None) -> None:
        self.layers = Layers()
        self.below = self.memory = ffi.NULL
        self.disk = LocalDisk(self.layers.opener(self._make))
        self.disk.slot = self.layers.slot
        assert lib.bdev_set_limits(self.disk.handle, limits.native()) == 0
        watch = ffi.new("struct bdev_watch_setup *", (100, 0, False))
        assert lib.bdev_set_watch(self.below, watch) == 0
        if op is not None:
            self.hold(op)

    def _make(self, layers: Layers) -> CData:
        self.memory = layers.malloc(BLOCKS)
        self.below = layers.error(self.memory)
        return layers.passthru(self.below)

    def hold(self, op: Op, kind: int = lib.ERROR_PENDING, left: int = lib.ERROR_NO_END) -> None:
        rule = self.layers.rules[0].rule[op]
        rule.left, rule.type = left, kind

    def held(self) -> list[tuple[int, int]]:
        """Return offsets and lengths of what is withheld, oldest first."""
        self.disk.poll()
        found = ffi.new("struct bdev_slow_request[]", 256)
        count = lib.bdev_slow_requests(self.below, found, 256)
        return [(one.offset, one.length) for one in found[0:count] if not one.ended]

    def let_go(self) -> None:
        """Have carried out what is withheld at this moment."""
        lib.error_bdev_resume(self.below)
        self.disk.poll()

    def start(self, op: Op, offset: int, length: int, buffers: Sequence[Any] = ()) -> Request:
        return self.disk.io.start(op, offset, length, buffers)

    def contents(self) -> bytes:
        for op in (Op.READ, Op.WRITE):
            self.hold(op, lib.ERROR_NONE)
        return self.disk.io.read(0, SIZE)

    def close(self) -> None:
        self.disk.close(self.layers.close_handles)
        self.layers.__exit__()


@contextmanager
def stack(limits: Limits, op: Op | None = None) -> Iterator[Stack]:
    made = Stack(limits, op)
    yield made
    made.close()


def outcome(request: Request) -> int:
    try:
        request.finish()
    except OSError as error:
        return error.errno or -1
    return 0


def numbered(blocks: int) -> bytes:
    return b"".join(n.to_bytes(4, "little") * (BLOCK // 4) for n in range(blocks))


# --- which parts --------------------------------------------------------------------------------


@st.composite
def any_limits(draw: st.DrawFn) -> Limits:
    unit = draw(st.sampled_from([0, 512, 1024, 8192]))
    most_unmapped = draw(st.sampled_from([0, 1, 5])) * (unit or BLOCK)
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 100]), min_size=10, max_size=10))
    limits = {op: sizes[op] * BLOCK for op in Op}
    return Limits(
        sizes={**limits, Op.UNMAP: most_unmapped},
        boundary=draw(st.sampled_from([0, 512, 2048, 65536])),
        segments=draw(st.sampled_from([0, 1, 2, 7])),
        unmap_unit=unit,
    )


@settings(max_examples=120, deadline=None)
@given(
    limits=any_limits(),
    op=st.sampled_from([Op.READ, Op.WRITE, Op.UNMAP, Op.WRITE_ZEROES]),
    first=st.integers(0, BLOCKS - 1),
    blocks=st.integers(1, BLOCKS),
    cuts=st.lists(st.integers(0, 20000), max_size=30),
)
def test_parts_are_within_the_limits_and_all_there(
    limits: Limits, op: Op, first: int, blocks: int, cuts: list[int]
) -> None:
    offset, length = first * BLOCK, min(blocks, BLOCKS - first) * BLOCK
    places = sorted({0, length, *(cut % length for cut in cuts)})
    memory = memoryview(bytearray(random.Random(length).randbytes(length)))
    buffers = [memory[a:b] for a, b in itertools.pairwise(places)]
    wanted = limits.parts(op, offset, length, [len(buffer) for buffer in buffers])
    before = numbered(BLOCKS)
    with stack(limits) as bench:
        bench.disk.io.write(0, before)
        bench.hold(op)
        request = bench.start(op, offset, length, buffers if op in DATA else ())
        seen: list[tuple[int, int]] = []
        while held := bench.held():
            assert len(held) <= POOL
            assert not request.done
            seen += held
            bench.let_go()
        request.finish()
        assert seen == wanted
        model = bytearray(before)
        if op is Op.WRITE:
            model[offset : offset + length] = memory
        elif op is not Op.READ:
            for at, size in wanted:
                model[at : at + size] = bytes(size)
        else:
            assert memory == before[offset : offset + length]
        assert bench.contents() == model
        assert in_flight(bench.disk.stats) == 0


def test_a_request_within_the_limits_is_the_devices_own() -> None:
    with stack(Limits({Op.WRITE: 2048}, boundary=2048), Op.WRITE) as bench:
        requests = [bench.start(Op.WRITE, at, 0, [bytes(2048)]) for at in (0, 2048)]
        assert bench.held() == [(0, 2048), (2048, 2048)]
        bench.let_go()
        assert [outcome(request) for request in requests] == [0, 0]


def test_a_slow_request_in_parts_says_so_and_times_out_as_one() -> None:
    with stack(Limits({Op.WRITE: BLOCK}), Op.WRITE) as bench:
        watch = ffi.new("struct bdev_watch_setup *", (100, 1_000_000, True))
        assert lib.bdev_set_watch(bench.disk.handle, watch) == 0
        request = bench.start(Op.WRITE, 0, 0, [b"x" * SIZE])
        bench.held()
        found = ffi.new("struct bdev_slow_request[]", 2)
        assert lib.bdev_slow_requests(bench.disk.handle, found, 2) == 1
        assert (found[0].offset, found[0].length) == (0, SIZE)
        assert ffi.string(lib.bdev_stage_name(found[0].stage)) == b"divided"
        assert outcome(request) == errno.ECANCELED
        assert bench.contents() == bytes(SIZE)


def test_a_request_counts_once() -> None:
    with stack(Limits({Op.WRITE: 1024})) as bench:
        bench.disk.io.write(0, bytes(10240))
        assert (bench.disk.stats.ops[Op.WRITE], bench.disk.stats.bytes[Op.WRITE]) == (1, 10240)


def test_a_block_in_more_buffers_than_the_device_takes_goes_through_one() -> None:
    data = numbered(8)
    with stack(Limits(segments=3)) as bench:
        bench.disk.io.write(BLOCK, *(data[i : i + 1] for i in range(BLOCK)), data[BLOCK:])
        back = [bytearray(1) for _ in range(BLOCK)]
        bench.disk.io.read_into(BLOCK, *back, *(rest := [bytearray(100), bytearray(3484)]))
        assert b"".join(back + rest) == data


@pytest.mark.parametrize("wrong", [0, 1535, 1536, 5000])
def test_a_comparison_tells_the_first_difference_of_all_parts(wrong: int) -> None:
    data = bytearray(numbered(12))
    with stack(Limits()) as bench:
        bench.disk.io.write(BLOCK, data)
        assert lib.bdev_set_limits(bench.memory, Limits({Op.COMPARE: 1536}).native()) == 0
        io = type(bench.disk.io)(bench.disk.selector, bench.memory)
        io.compare(BLOCK, data)
        for place in (wrong, 5900):
            data[place] ^= 1
        request = io.start(Op.COMPARE, BLOCK, 0, [data])
        assert outcome(request) == errno.EILSEQ
        assert request.miscompare == wrong


@pytest.mark.parametrize(("source", "offset"), [(0, 100), (100, 0), (0, 256)])
def test_a_copy_in_parts_is_as_one_that_is_whole(source: int, offset: int) -> None:
    model = bytearray(numbered(BLOCKS))
    length = 200 * BLOCK
    with stack(Limits()) as bench:
        bench.disk.io.write(0, model)
        assert lib.bdev_set_limits(bench.memory, Limits({Op.COPY: 3 * BLOCK}).native()) == 0
        io = type(bench.disk.io)(bench.disk.selector, bench.memory)
        io.copy(source * BLOCK, offset * BLOCK, length)
        model[offset * BLOCK : offset * BLOCK + length] = model[source * BLOCK :][:length]
        assert io.read(0, SIZE) == model


@pytest.mark.parametrize(
    "limits",
    [
        Limits({Op.READ: 100}),
        Limits(boundary=1536),
        Limits(boundary=256),
        Limits(segments=1025),
        Limits(unmap_unit=1536),
        Limits({Op.UNMAP: 1536}, unmap_unit=1024),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: Limits) -> None:
    with stack(Limits()) as bench:
        assert lib.bdev_set_limits(bench.below, limits.native()) == -errno.EINVAL
        bench.disk.io.write(0, bytes(8192))


# --- how they end --------------------------------------------------------------------------------


def test_after_an_error_no_more_parts_are_made() -> None:
    with stack(Limits({Op.WRITE: BLOCK})) as bench:
        bench.hold(Op.WRITE, lib.ERROR_FAILURE, 1)
        assert outcome(bench.start(Op.WRITE, 0, 0, [b"x" * 8192])) == errno.EIO
        assert bench.contents() == bytes(SIZE)


def test_an_error_of_one_part_is_told_when_the_others_have_ended() -> None:
    with stack(Limits({Op.WRITE: BLOCK})) as bench:
        bench.hold(Op.WRITE, lib.ERROR_PENDING, 2)
        request = bench.start(Op.WRITE, 0, 0, [b"x" * 2048])  # the other two go through
        assert bench.held() == [(0, BLOCK), (BLOCK, BLOCK)]
        lib.bdev_remove(bench.memory)  # what is let go finds nothing there
        assert not request.done
        bench.let_go()
        assert outcome(request) == errno.ENODEV
        assert bench.disk.stats.errors == 1


def test_requests_take_turns_when_there_are_no_more_parts_to_be_had() -> None:
    with stack(Limits({Op.WRITE: BLOCK}), Op.WRITE) as bench:
        large = [
            bench.start(Op.WRITE, half * SIZE // 2, 0, [numbered(BLOCKS // 2)]) for half in (0, 1)
        ]
        small = bench.start(Op.WRITE, 0, 0, [bytes(BLOCK)])
        bench.held()
        bench.let_go()
        offsets = [offset for offset, _ in bench.held()]
        shares = [sum(offset < SIZE // 2 for offset in offsets), len(offsets)]
        assert 2 * shares[0] in range(POOL - 8, POOL + 8)
        while bench.held():
            bench.let_go()
        assert [outcome(request) for request in (*large, small)] == [0, 0, 0]


def test_an_abort_ends_parts_and_makes_no_more() -> None:
    with stack(Limits({Op.WRITE: BLOCK}), Op.WRITE) as bench:
        request = bench.start(Op.WRITE, 0, 0, [b"x" * SIZE])
        assert len(bench.held()) == POOL
        assert request.abort()
        assert outcome(request) == errno.ECANCELED
        assert bench.held() == []
        assert bench.contents() == bytes(SIZE)


def test_one_that_waits_for_parts_is_aborted_and_the_others_go_on() -> None:
    with stack(Limits({Op.WRITE: BLOCK}), Op.WRITE) as bench:
        first = bench.start(Op.WRITE, 0, 0, [b"x" * (POOL * BLOCK)])
        second = bench.start(Op.WRITE, POOL * BLOCK, 0, [b"y" * 1024])
        assert second.abort()
        assert outcome(second) == errno.ECANCELED
        bench.let_go()
        assert outcome(first) == 0
        assert bench.contents() == b"x" * (POOL * BLOCK) + bytes(SIZE - POOL * BLOCK)


def test_a_reset_waits_for_the_whole_of_what_came_before() -> None:
    with stack(Limits({Op.WRITE: BLOCK}), Op.WRITE) as bench:
        write = bench.start(Op.WRITE, 0, 0, [b"x" * SIZE])
        reset = bench.start(Op.RESET, 0, 0)
        for _ in range(BLOCKS // POOL):
            assert len(bench.held()) == POOL
            assert not reset.done
            bench.let_go()
        assert (outcome(write), outcome(reset)) == (0, 0)


def test_after_a_removal_no_more_parts_are_made() -> None:
    with stack(Limits({Op.WRITE: BLOCK}), Op.WRITE) as bench:
        request = bench.start(Op.WRITE, 0, 0, [b"x" * SIZE])
        assert len(bench.held()) == POOL
        lib.bdev_remove(bench.disk.handle)
        bench.let_go()
        assert bench.held() == []
        assert outcome(request) == errno.ENODEV
