"""What is durable when a SCSI command is answered: on a file of which the syncs are seen.

The disk is a file of a FUSE file system, served by the test: what the kernel is asked to write, to
read and to sync is recorded, and a sync can be held back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.scsi_stack import close, connect, read_10, write_10
from tests.support.slowfile import SlowFile, slow_file
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend_scsi import Answer, ScsiFrontend

BLOCKS = 2048
DATA = b"n" * 4096
FUA = 0x08
WRITE, SYNC = ("write", False), ("fsync", True)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SlowFile]:
    try:
        with slow_file(tmp_path / "mnt", BLOCKS * 512) as made:
            yield made
    except PermissionError:
        pytest.skip("this user may not mount a file system")


@asynccontextmanager
async def lun(file: SlowFile) -> AsyncIterator[tuple[Stack, ScsiFrontend]]:
    """Serve the file as a LUN; writes are cached at first."""
    async with stack(CPUS[:1]) as target:
        path = str(file.path)
        await target.call("bdev_uring_create", name="F0", filename=path, block_size=512)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        place = {"ctrlr": "s0", "scsi_target_num": 0, "bdev_name": "F0"}
        await target.call("vhost_scsi_controller_add_target", **place)
        try:
            front = await connect(target)
            file.operations.clear()
            yield target, front
            await close(target, front)
        finally:
            file.let_go()  # whatever has failed: nothing ends before


async def run(
    target: Stack, front: ScsiFrontend, cdb: bytes, out: bytes = b"", into: int = 0
) -> Answer:
    answer = await target.in_thread(lambda: front.command(0, 0, cdb, out, into))
    assert answer.status == 0
    return answer


def asked(file: SlowFile) -> list[tuple[str, bool]]:
    return [(each.name, each.datasync) for each in file.operations]


def with_fua(cdb: bytes) -> bytes:
    return cdb[:1] + bytes([cdb[1] | FUA]) + cdb[2:]


async def test_a_write_is_synced_with_fua_and_not_without(file: SlowFile) -> None:
    async with lun(file) as (target, front):
        await run(target, front, write_10(0, 8), DATA)
        assert asked(file) == [WRITE]
        await run(target, front, with_fua(write_10(8, 8)), DATA)
        assert asked(file) == [WRITE, WRITE, SYNC]


async def test_a_write_is_synced_when_the_cache_is_off(file: SlowFile) -> None:
    async with lun(file) as (target, front):
        page = bytes([8, 18]) + bytes(18)  # WCE is 0
        await run(target, front, bytes([0x15, 0x10, 0, 0, 24, 0]), bytes(4) + page)
        assert asked(file) == [SYNC]  # of what was cached until then
        await run(target, front, write_10(0, 8), DATA)
        assert asked(file) == [SYNC, WRITE, SYNC]


@pytest.mark.parametrize("synced", ["write", "synchronize"])
async def test_the_answer_waits_for_the_sync(file: SlowFile, synced: str) -> None:
    cdb, out = (with_fua(write_10(0, 8)), DATA) if synced == "write" else (b"\x35" + bytes(9), b"")
    async with lun(file) as (target, front):
        file.holding = "fsync"
        sent = await target.in_thread(lambda: front.submit(0, 0, cdb, out))
        await target.until(lambda: bool(file.held))
        front.poll()
        assert sent.written < 0
        file.let_go()
        answer = await target.in_thread(lambda: front.answer(sent, 10))
        assert answer.status == 0


async def test_a_read_with_fua_syncs_first(file: SlowFile) -> None:
    async with lun(file) as (target, front):
        await run(target, front, write_10(0, 8), DATA)
        file.operations.clear()
        answer = await run(target, front, with_fua(read_10(0, 8)), into=4096)
        assert answer.data == DATA
        assert asked(file)[0] == SYNC
        assert "fsync" not in [name for name, _ in asked(file)[1:]]


async def test_what_was_written_and_verified_has_been_synced(file: SlowFile) -> None:
    async with lun(file) as (target, front):
        cdb = b"\x2e" + write_10(0, 8)[1:]
        await run(target, front, cdb, DATA)
        assert asked(file)[:2] == [WRITE, SYNC]
