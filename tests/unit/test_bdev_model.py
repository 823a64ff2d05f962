"""Every kind of disk against a model: whatever is done to it, it is a row of bytes."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdev.io import Op
from bdev.ranges import RangeTable
from bdev.statistics import in_flight
from reactor.native import CData, lib
from tests.support.bdevs import LocalDisk, file_disk, malloc_disk, pages
from tests.support.layers import Layers

BLOCK = 512
BLOCKS = 1024
SIZE = BLOCK * BLOCKS


@contextmanager
def malloc_kind(tmp: Path) -> Iterator[LocalDisk]:
    fd = os.memfd_create("model")
    os.ftruncate(fd, SIZE)
    disk = malloc_disk(fd, BLOCKS)
    yield disk
    disk.close()
    os.close(fd)


def file_kind(direct: bool):
    @contextmanager
    def make(tmp: Path) -> Iterator[LocalDisk]:
        path = tmp / "disk"
        path.touch()
        os.truncate(path, SIZE)
        disk = file_disk(path, direct=direct)
        yield disk
        disk.close()

    return make


def stacked_kind(open_stack: Callable[[Layers], CData]):
    @contextmanager
    def make(tmp: Path) -> Iterator[LocalDisk]:
        with Layers() as layers:
            disk = LocalDisk(layers.opener(open_stack))
            disk.slot = layers.slot
            yield disk
            disk.close(layers.close_handles)

    return make


def concat(layers: Layers) -> CData:
    """Three disks of odd sizes."""
    return layers.raid(0, [(layers.malloc(blocks), blocks) for blocks in (7, 601, BLOCKS - 608)])


def stripe(layers: Layers) -> CData:
    """Four disks in strips of four blocks."""
    return layers.raid(4, [(layers.malloc(BLOCKS // 4), BLOCKS // 4) for _ in range(4)])


def three_layers(layers: Layers) -> CData:
    """A stripe set of parts of passed-through disks."""
    half = BLOCKS // 2
    first = layers.part(layers.passthru(layers.malloc(half + 33)), 33, half)
    second = layers.part(layers.delay(layers.malloc(half + 5)), 5, half)
    return layers.raid(8, [(first, half), (second, half)])


def divided(layers: Layers) -> CData:
    """Memory in small parts, by way of a layer in other ones."""
    memory = layers.limited(layers.malloc(BLOCKS), bytes=3 * BLOCK, boundary=4 * BLOCK, segments=2)
    return layers.limited(layers.passthru(memory), bytes=40 * BLOCK, boundary=0, segments=3)


KINDS = {
    "malloc": malloc_kind,
    "direct": file_kind(True),
    "buffered": file_kind(False),
    "passthru": stacked_kind(lambda layers: layers.passthru(layers.malloc(BLOCKS))),
    "error": stacked_kind(lambda layers: layers.error(layers.malloc(BLOCKS))),
    "delay": stacked_kind(lambda layers: layers.delay(layers.malloc(BLOCKS))),
    "part": stacked_kind(lambda layers: layers.part(layers.malloc(BLOCKS + 9), 9, BLOCKS)),
    "divided": stacked_kind(divided),
    "concat": stacked_kind(concat),
    "stripe": stacked_kind(stripe),
    "three layers": stacked_kind(three_layers),
}


@dataclass(frozen=True)
class Step:
    op: Op
    first: int  # block
    other: int  # block that a copy takes from
    wrong: float | None  # where a comparison finds something else
    blocks: int
    fill: int  # what is written
    cuts: tuple[float, ...]  # where the buffer is cut into several, as parts of its length
    shift: int  # of the buffer's address from a page
    flags: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    first = draw(st.integers(0, BLOCKS - 1))
    most = BLOCKS - first
    return Step(
        op=draw(st.sampled_from(Op)),
        first=first,
        other=draw(st.integers(0, BLOCKS - 1)),
        wrong=draw(st.none() | st.floats(0, 1, exclude_max=True)),
        blocks=draw(st.one_of(st.integers(0, min(most, 16)), st.integers(0, most))),
        fill=draw(st.integers(1, 255)),
        cuts=tuple(sorted(draw(st.lists(st.floats(0, 1), max_size=4)))),
        shift=draw(st.sampled_from([0, 0, 1, 512, 100])),
        flags=draw(st.sampled_from([0, lib.BDEV_IO_FUA, lib.BDEV_IO_UNMAP])),
    )


def cut(memory: memoryview, cuts: tuple[float, ...]) -> list[memoryview]:
    places = [0, *(int(part * len(memory)) for part in cuts), len(memory)]
    return [memory[a:b] for a, b in itertools.pairwise(places)]


def copy(disk: LocalDisk, model: bytearray, step: Step) -> None:
    length = min(step.blocks, BLOCKS - step.other) * BLOCK
    source, offset = step.other * BLOCK, step.first * BLOCK
    disk.io.copy(source, offset, length)
    model[offset : offset + length] = model[source : source + length]


def compare(
    disk: LocalDisk, model: bytearray, step: Step, memory: memoryview, buffers: list[memoryview]
) -> None:
    """Compare with what is there, or with one byte of it changed; then write it inverted."""
    offset, length = step.first * BLOCK, len(memory)
    memory[:] = model[offset : offset + length]
    wrong = None if step.wrong is None or not length else int(step.wrong * length)
    if wrong is not None:
        memory[wrong] ^= 1
    new = bytes(byte ^ 0xFF for byte in memory)
    both = [*buffers, new] if step.op is Op.COMPARE_AND_WRITE else buffers
    request = disk.io.start(step.op, offset, buffers=both)
    if step.op is Op.COMPARE_AND_WRITE and length > lib.BDEV_ATOMIC_BYTES:
        with pytest.raises(OSError, match="Invalid argument"):
            request.finish()
    elif wrong is not None:
        with pytest.raises(OSError, match=os.strerror(errno.EILSEQ)):
            request.finish()
        assert request.miscompare == wrong
    else:
        request.finish()
        if step.op is Op.COMPARE_AND_WRITE:
            model[offset : offset + length] = new


def apply(disk: LocalDisk, model: bytearray, step: Step) -> None:
    offset, length = step.first * BLOCK, step.blocks * BLOCK
    span = slice(offset, offset + length)
    memory = memoryview(pages(length + 8192))[step.shift : step.shift + length]
    buffers = cut(memory, step.cuts)
    if step.op is Op.WRITE:
        memory[:] = bytes((step.fill + i // 64) & 0xFF for i in range(length))
        model[span] = memory
    elif step.op in (Op.UNMAP, Op.WRITE_ZEROES):
        model[span] = bytes(length)  # what is unmapped reads as zeroes too, of all these kinds
    elif step.op is Op.COPY:
        copy(disk, model, step)
        return
    elif step.op in (Op.COMPARE, Op.COMPARE_AND_WRITE):
        compare(disk, model, step, memory, buffers)
        return
    moves = step.op in (Op.READ, Op.WRITE)
    disk.io.start(step.op, offset, length, buffers if moves else (), step.flags).finish()
    if step.op is Op.READ:
        assert memory == model[span]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(script=st.lists(steps(), max_size=12))
def test_a_disk_is_a_row_of_bytes(kind: str, script: list[Step]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        KINDS[kind](Path(folder)) as disk,
        closing(RangeTable("model")) as ranges,
    ):
        assert lib.bdev_set_ranges(disk.handle, ranges.fd, 0) == 0
        model = bytearray(SIZE)
        for step in script:
            apply(disk, model, step)
        whole = pages(SIZE)
        disk.io.read_into(0, whole)
        assert whole[:] == model
        assert in_flight(disk.stats) == 0
        assert ranges.used == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(script=st.lists(steps(), min_size=2, max_size=24))
def test_requests_in_flight_together_do_not_mix(kind: str, script: list[Step]) -> None:
    """Each goes to a range of its own, all at once: the order of their completion is nobody's."""
    share = BLOCKS // len(script)
    with tempfile.TemporaryDirectory() as folder, KINDS[kind](Path(folder)) as disk:
        model = bytearray(SIZE)
        requests = []
        for i, step in enumerate(script):
            length = min(step.blocks, share) * BLOCK
            span = slice(i * share * BLOCK, i * share * BLOCK + length)
            memory = memoryview(pages(length + 8192))[step.shift : step.shift + length]
            memory[:] = bytes([step.fill]) * length
            model[span] = memory
            buffers = cut(memory, step.cuts)
            requests.append(disk.io.start(Op.WRITE, span.start, buffers=buffers))
        for request in requests:
            request.finish()
        assert disk.io.read(0, SIZE) == model
