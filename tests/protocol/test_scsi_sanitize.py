"""SANITIZE: SBC-4 sections 4.11 and 5.27. The work is done by the whole target."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.scsi_stack import INQUIRY, READY, close, code, connect, read_10, write_10
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend_scsi import Answer, ScsiFrontend
from vhost.virtio_scsi import Function

BLOCKS = 40960  # 20 MiB: more than is done at a time
IN_PROGRESS, FAILED, INVALID_FIELD = (2, 0x041B), (3, 0x3103), (5, 0x2400)
ERASE, EXIT = 2, 0x1F
IMMED, AUSE = 0x80, 0x20
UUID = "0b1f1c54-5d0c-4b4f-9d0a-8f1d6c1f7a11"


@asynccontextmanager
async def disk(state_dir: Path | None = None) -> AsyncIterator[Stack]:
    """Serve a disk whose writes can be withheld or made to fail."""
    async with stack(CPUS[:2], state_dir) as target:
        await target.call("bdev_malloc_create", name="M0", num_blocks=BLOCKS, block_size=512)
        await target.call("bdev_error_create", base_name="M0", uuid=UUID)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        lun = {"ctrlr": "s0", "scsi_target_num": 0, "bdev_name": "EE_M0"}
        await target.call("vhost_scsi_controller_add_target", **lun)
        yield target


async def inject(target: Stack, io_type: str, error_type: str = "failure") -> None:
    fault = {"name": "EE_M0", "io_type": io_type, "error_type": error_type, "num": 1000}
    await target.call("bdev_error_inject_error", **fault)


def overwrite(pattern: bytes, flags: int = 0, *, passes: int = 1) -> tuple[bytes, bytes]:
    data = struct.pack(">BxH", passes, len(pattern)) + pattern
    return struct.pack(">BB5xHx", 0x48, 1 | flags & ~0x8000, len(data)), data


def erase(flags: int = 0) -> bytes:
    return bytes([0x48, ERASE | flags]) + bytes(8)


def read(front: ScsiFrontend, lba: int, blocks: int = 1) -> Answer:
    return front.command(0, 0, read_10(lba, blocks), into=512 * blocks)


async def ended(target: Stack, front: ScsiFrontend) -> Answer:
    """Return the first answer to TEST UNIT READY that is another one."""
    while True:
        answer = await target.in_thread(lambda: front.command(0, 0, READY))
        if answer.status == 0 or code(answer) != IN_PROGRESS:
            return answer
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(range(256)) * 2, bytes(range(256)) * 2),
        (b"abc", (b"abc" * 171)[:512]),
        (None, bytes(512)),
    ],
    ids=["block", "pattern", "erase"],
)
async def test_all_of_the_medium_is_written_over(data: bytes | None, expected: bytes) -> None:
    async with disk() as target:
        front = await connect(target)

        def work() -> None:
            for lba in (0, 32767, 32768, BLOCKS - 8):
                assert front.command(0, 0, write_10(lba, 8), b"x" * 4096).status == 0
            done = front.command(0, 0, *(overwrite(data) if data else (erase(),)))
            assert (done.status, done.residual) == (0, 0)
            for lba in (0, 32767, 32768, BLOCKS - 8):
                assert read(front, lba, 8).data == expected * 8

        await target.in_thread(work)
        await close(target, front)


async def test_erased_medium_is_deallocated() -> None:
    async with disk() as target:
        front = await connect(target)

        def states() -> set[int]:
            """Return what is said of all blocks; an answer may speak of a part of the medium."""
            found, lba = set(), 0
            while lba < BLOCKS:
                cdb = struct.pack(">BBQIxx", 0x9E, 0x12, lba, 24)
                data = front.command(0, 0, cdb, into=24).data
                _, blocks, state = struct.unpack_from(">QIB", data, 8)
                found.add(state)
                lba += blocks
            return found

        def work() -> None:
            for lba in range(0, BLOCKS, 1024):
                assert front.command(0, 0, write_10(lba, 1024), b"x" * 524288).status == 0
            assert states() == {0}
            assert front.command(0, 0, erase()).status == 0
            assert states() == {1}

        await target.in_thread(work)
        await close(target, front)


async def test_last_of_several_passes_is_what_is_read() -> None:
    async with disk() as target:
        front = await connect(target)
        inverted = overwrite(b"\x0f", passes=2)
        done = await target.in_thread(
            lambda: front.command(0, 0, inverted[0], b"\x82" + inverted[1][1:])
        )
        assert done.status == 0
        answer = await target.in_thread(lambda: read(front, 1000))
        assert answer.data == b"\xf0" * 512
        await close(target, front)


async def test_commands_are_refused_meanwhile_and_nothing_stops_it() -> None:
    async with disk() as target:
        front = await connect(target)
        await inject(target, "flush", "pending")  # after each part

        def meanwhile() -> None:
            assert front.command(0, 0, *overwrite(b"z", IMMED)).status == 0
            for cdb, out, room in (
                (READY, b"", 0),
                (read_10(0, 1), b"", 512),
                (write_10(0, 1), bytes(512), 0),
                (b"\x25" + bytes(9), b"", 8),
                (erase(), b"", 0),
            ):
                assert code(front.command(0, 0, cdb, out, room)) == IN_PROGRESS
            assert front.command(0, 0, INQUIRY, into=96).status == 0
            sense = front.command(0, 0, bytes([3, 0, 0, 0, 18, 0]), into=18).data
            assert (sense[2], sense[12:14], sense[15]) == (2, b"\x04\x1b", 0x80)
            for function in (Function.ABORT_TASK_SET, Function.LOGICAL_UNIT_RESET):
                assert front.manage(function, 0, 0) == 0
            assert code(front.command(0, 0, READY)) == (6, 0x2903)
            assert code(front.command(0, 0, READY)) == IN_PROGRESS

        await target.in_thread(meanwhile)
        await target.call("bdev_error_inject_error", name="EE_M0", io_type="clear")
        progress = set()
        while True:
            await target.call("bdev_error_resume_pending", name="EE_M0")
            answer = await target.in_thread(lambda: front.command(0, 0, READY))
            if answer.status == 0:
                break
            assert code(answer) == IN_PROGRESS
            progress.add(int.from_bytes(answer.sense[16:18], "big"))
        assert progress <= {0, (16 << 16) // 20, 0xFFFF}  # 16 of 20 MiB
        assert (await target.in_thread(lambda: read(front, 5))).data == b"z" * 512
        await close(target, front)


async def test_death_of_the_reactor_that_does_it_changes_nothing() -> None:
    async with disk() as target:
        front = await connect(target)
        await inject(target, "flush", "pending")
        start = overwrite(b"q", IMMED)
        assert (await target.in_thread(lambda: front.command(0, 0, *start))).status == 0
        await asyncio.sleep(0)
        for reactor in target.cluster.reactors:
            if reactor.pid is not None:
                os.kill(reactor.pid, signal.SIGKILL)
                break
        await target.call("bdev_error_inject_error", name="EE_M0", io_type="clear")

        async def go_on() -> None:
            while True:
                await target.call("bdev_error_resume_pending", name="EE_M0")
                await asyncio.sleep(0.01)

        going = asyncio.create_task(go_on())
        assert (await ended(target, front)).status == 0
        going.cancel()
        for lba in (0, BLOCKS - 1):
            answer = await target.in_thread(lambda lba=lba: read(front, lba))
            assert answer.data == b"q" * 512
        await close(target, front)


@pytest.mark.parametrize("flags", [0, AUSE])
async def test_failure_closes_the_unit_until_it_is_left(flags: int) -> None:
    async with disk() as target:
        front = await connect(target)
        await inject(target, "write")
        answer = await target.in_thread(lambda: front.command(0, 0, *overwrite(b"z", flags)))
        assert code(answer) == FAILED
        await target.call("bdev_error_inject_error", name="EE_M0", io_type="clear")

        def work() -> None:
            assert code(front.command(0, 0, READY)) == FAILED
            assert code(read(front, 0)) == FAILED
            left = front.command(0, 0, bytes([0x48, EXIT]) + bytes(8))
            if flags:
                assert left.status == 0
            else:
                assert code(left) == INVALID_FIELD
                assert front.command(0, 0, *overwrite(b"y")).status == 0
                assert read(front, 0).data == b"y" * 512
            assert front.command(0, 0, READY).status == 0

        await target.in_thread(work)
        await close(target, front)


async def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    async with disk() as target:
        front = await connect(target)

        def work() -> None:
            cdb, data = overwrite(b"z")
            for bad, out, expected in (
                (cdb[:8] + b"\4\0", data[:4], INVALID_FIELD),
                (cdb[:7] + b"\x02\x05\0", data.ljust(517, b"z"), INVALID_FIELD),
                (cdb, b"\0" + data[1:], (5, 0x2600)),
                (cdb, b"\x21" + data[1:], (5, 0x2600)),
                (cdb, b"\1\1" + data[2:], (5, 0x2600)),
                (cdb, b"\1\0\0\2z", (5, 0x2600)),
                (cdb[:1] + b"\x41" + cdb[2:], data, INVALID_FIELD),
                (cdb[:1] + b"\3" + cdb[2:], data, INVALID_FIELD),
                (cdb[:1] + b"\2" + cdb[2:], data, INVALID_FIELD),
                (cdb[:1] + b"\x1f" + cdb[2:], data, INVALID_FIELD),
            ):
                assert code(front.command(0, 0, bad, out)) == expected
            assert read(front, 0).data == bytes(512)

        await target.in_thread(work)
        await close(target, front)


def file_of(state_dir: Path) -> Path:
    return state_dir / "sanitize" / f"{UUID}.json"


async def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    """A disk in memory is new after a restart: what was done is seen not to be done again."""
    path = file_of(tmp_path)
    async with disk(tmp_path) as target:
        front = await connect(target)
        await inject(target, "flush", "pending")
        start = overwrite(b"r", IMMED)
        assert (await target.in_thread(lambda: front.command(0, 0, *start))).status == 0
        known = json.loads(path.read_text())  # before it was answered
        assert not known["failed"]
        await target.call("bdev_error_inject_error", name="EE_M0", io_type="clear")
        await target.call("bdev_error_resume_pending", name="EE_M0")
        assert (await ended(target, front)).status == 0
        assert not path.exists()
        await close(target, front)
    known["done"] = 16 << 20
    path.write_text(json.dumps(known))
    async with disk(tmp_path) as target:
        front = await connect(target)
        assert (await ended(target, front)).status == 0
        for lba, expected in ((0, bytes(512)), (32767, bytes(512)), (32768, b"r" * 512)):
            answer = await target.in_thread(lambda lba=lba: read(front, lba))
            assert answer.data == expected
        assert not path.exists()
        await close(target, front)


async def test_a_failure_is_known_after_a_restart_until_it_is_left(tmp_path: Path) -> None:
    async with disk(tmp_path) as target:
        front = await connect(target)
        await inject(target, "write")
        answer = await target.in_thread(lambda: front.command(0, 0, *overwrite(b"z", AUSE)))
        assert code(answer) == FAILED
        await close(target, front)
    async with disk(tmp_path) as target:
        front = await connect(target)

        def leave() -> None:
            assert code(read(front, 0)) == FAILED
            assert front.command(0, 0, bytes([0x48, EXIT]) + bytes(8)).status == 0
            assert read(front, 0).status == 0

        await target.in_thread(leave)
        await target.until(lambda: not file_of(tmp_path).exists())
        await close(target, front)


@pytest.mark.parametrize(
    "contents", [b"", b"{", b'{"version": 2}'], ids=["empty", "no JSON", "other fields"]
)
async def test_a_medium_is_not_served_as_if_nothing_had_been(
    tmp_path: Path, contents: bytes
) -> None:
    path = file_of(tmp_path)
    path.parent.mkdir()
    path.write_bytes(contents)
    with pytest.raises(OSError, match="what is known of a SANITIZE is damaged") as refused:
        async with disk(tmp_path):
            pass
    assert str(path) in str(refused.value)
    assert path.read_bytes() == contents
