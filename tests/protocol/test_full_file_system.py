"""A file system that is full: guests are told so, nothing is corrupted, and others go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bdev.mirror_super import DATA_OFFSET
from tests.support.scsi_stack import close as close_scsi
from tests.support.scsi_stack import code, connect, write_10
from tests.support.stack import Stack, stack
from tests.support.tmpfs import small_tmpfs
from vhost.frontend import BlkFrontend, RequestError

ROOM = 4 << 20
SIZE = 8 << 20
STEP = 64 << 10
IOERR = 1  # virtio 1.2, 5.2.6: VIRTIO_BLK_S_IOERR


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path, ROOM) as folder:
        yield folder


async def make_file(
    target: Stack, folder: Path, name: str = "d", size: int = SIZE, *, readonly: bool = False
) -> None:
    """Make a disk that has room for the blocks that are written, for a while."""
    path = folder / name
    path.touch()
    os.truncate(path, size)
    where = {"filename": str(path), "block_size": 512, "readonly": readonly}
    await target.call("bdev_uring_create", name=name, **where)


async def make_cow(target: Stack, folder: Path) -> None:
    await make_file(target, folder, "base", readonly=True)
    await target.call("bdev_cow_create", name="d", base="base", overlay=str(folder / "overlay"))


async def make_mirror(target: Stack, folder: Path) -> None:
    for name in ("one", "two"):
        await make_file(target, folder, name, SIZE + DATA_OFFSET)
    await target.call("bdev_raid_create", name="d", raid_level="raid1", base_bdevs=["one", "two"])


def fill(front: BlkFrontend) -> dict[int, bytes]:
    """Write to all of a disk; returns what was answered as written, by offset."""
    kept, failures = {}, []
    for offset in range(0, SIZE, STEP):
        data = bytes([1 + offset // STEP]) * STEP
        try:
            front.write(offset, data)
            kept[offset] = data
        except RequestError as error:
            failures.append(error.status)
    assert kept
    assert set(failures) == {IOERR}
    return kept


def check(front: BlkFrontend, kept: dict[int, bytes]) -> None:
    for offset, data in kept.items():
        assert front.read(offset, STEP) == data, f"at {offset}"


@pytest.mark.parametrize("make", [make_file, make_cow, make_mirror])
async def test_a_guest_is_told_and_what_it_wrote_stays(make: Any, small: Path) -> None:
    """Its writes fail while there is no room, and no others; then it goes on."""
    async with stack() as target:
        filler = small / "filler"
        filler.write_bytes(bytes(ROOM // 4))
        await make(target, small)
        await target.call("bdev_malloc_create", name="other", block_size=512, num_blocks=8192)
        for name, bdev in (("full", "d"), ("free", "other")):
            await target.call("vhost_create_blk_controller", ctrlr=name, dev_name=bdev)
        front, other = await target.connect("full"), await target.connect("free")
        kept = await target.in_thread(lambda: fill(front))
        await target.in_thread(lambda: check(front, kept))
        await target.in_thread(lambda: other.write(0, b"o" * 4096))
        assert await target.in_thread(lambda: other.read(0, 4096)) == b"o" * 4096
        filler.unlink()
        missing = next(offset for offset in range(0, SIZE, STEP) if offset not in kept)
        await target.in_thread(lambda: front.write(missing, b"n" * STEP))
        await target.in_thread(lambda: check(front, kept | {missing: b"n" * STEP}))
        await target.close(front, other)


async def test_a_scsi_guest_is_told_why(small: Path) -> None:
    """SBC-4, 4.7.3.6: no space for a thinly provisioned block."""
    async with stack() as target:
        await make_file(target, small)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        lun = {"ctrlr": "s0", "scsi_target_num": 0, "bdev_name": "d"}
        await target.call("vhost_scsi_controller_add_target", **lun)
        front = await connect(target)
        (small / "filler").write_bytes(bytes(ROOM - STEP))
        answer = await target.in_thread(
            lambda: front.command(0, 0, write_10(0, 256), bytes([1]) * (256 << 9))
        )
        assert code(answer) == (7, 0x2707)  # DATA PROTECT, SPACE ALLOCATION FAILED
        (small / "filler").unlink()
        answer = await target.in_thread(
            lambda: front.command(0, 0, write_10(0, 256), bytes([1]) * (256 << 9))
        )
        assert answer.status == 0
        await close_scsi(target, front)
