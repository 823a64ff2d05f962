"""Pre-copy migration as its source sees it: what the log does not say is left behind.

The test copies memory as QEMU does, pass after pass, while the disk writes to it: first everything,
then what the log names. QEMU itself cannot show this here: its emulated processors lose pages of
their own when a guest moves slowly (docs/migration.md).
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.scsi_stack import INQUIRY, controller, read_10
from tests.support.scsi_stack import close as close_scsi
from tests.support.scsi_stack import connect as connect_scsi
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend_device import WANTED_PROTOCOL, Frontend
from vhost.frontend_memory import PAGE
from vhost.messages import Feature, Log, ProtocolFeature, Request, VringAddr, VringState
from vhost.payloads import U64
from vhost.virtio_scsi import COMMAND, FIRST_REQUEST_QUEUE, RESPONSE, SENSE_SIZE, address

SECTOR = 512
DISK = 4 << 20
SLOTS = 96  # buffers, each with a page of its own around it
PASSES = 4


@asynccontextmanager
async def disk(kind: str, contents: bytes, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(CPUS[:1]) as made:
        if kind == "malloc":
            blocks = DISK // SECTOR
            await made.call("bdev_malloc_create", name="D0", num_blocks=blocks, block_size=SECTOR)
        else:
            path = tmp_path / "disk"
            path.write_bytes(contents)
            await made.call("bdev_uring_create", name="D0", filename=str(path), block_size=SECTOR)
        await made.call("vhost_create_blk_controller", ctrlr="b0", dev_name="D0", packed_ring=True)
        yield made


class Source:
    """The front-end of a guest that is to move, and what it has copied of its memory."""

    def __init__(self, front: Frontend, seed: int) -> None:
        self.front = front
        self.memory = front.memory
        (self.region,) = front.memory.regions
        self.chance = random.Random(seed)
        # Nobody but the disk writes to these pages, and most of each is never written.
        self.start = self.memory.allocate(SLOTS * PAGE, PAGE)
        self.memory.write(self.start, bytes(SLOTS * PAGE))
        self.headers = self.memory.allocate(SLOTS * 32, PAGE)
        self.copied = bytearray(SLOTS * PAGE)
        size = -(-(self.region.guest + self.region.size) // (8 * PAGE))
        self.log_fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC)
        os.ftruncate(self.log_fd, size)
        self.log = mmap.mmap(self.log_fd, size)

    def begin(self) -> None:
        """Have what the device writes logged, as QEMU begins a migration."""
        link = self.front.raw
        link.send(Request.SET_LOG_BASE, Log(len(self.log), 0), [self.log_fd])
        assert U64.from_bytes(link.receive().data, "SET_LOG_BASE").value == 0
        link.tell(Request.SET_FEATURES, U64(self.front.features | Feature.LOG_ALL))
        for queue in self.front.queues:
            addresses = queue.addresses()
            used = queue.used
            link.tell(Request.SET_VRING_ADDR, replace(addresses, flags=VringAddr.F_LOG, log=used))

    def copy_all(self) -> None:
        self.copied[:] = self.memory.read(self.start, len(self.copied))

    def copy_dirty(self, *, clear: bool = True) -> int:
        """Copy the pages that the log names, and clear it; returns how many these were.

        It is not cleared atomically, so nothing may be in flight then.
        """
        count = 0
        for page in range(SLOTS):
            number = (self.start + page * PAGE) // PAGE
            if self.log[number // 8] & 1 << number % 8:
                if clear:
                    self.log[number // 8] &= ~(1 << number % 8)
                begin = page * PAGE
                self.copied[begin : begin + PAGE] = self.memory.read(self.start + begin, PAGE)
                count += 1
        return count

    def submit(self, slots: list[int]) -> None:
        """Have blocks of the disk read into a part of some pages."""
        for slot in slots:
            header, sector = self.headers + 32 * slot, self.chance.randrange(DISK // SECTOR - 4)
            length = SECTOR * self.chance.randrange(1, 4)
            self.memory.write(header, struct.pack("<IIQ", 0, 0, sector))
            where = self.start + slot * PAGE + 16 * self.chance.randrange(64)
            buffers = [(header, 16, False), (where, length, True), (header + 16, 1, True)]
            self.front.queues[0].add(buffers)
        self.front.queues[0].publish()

    def reap(self, count: int) -> None:
        """Wait for the end of so many requests."""
        while count > 0:
            assert self.front.queues[0].wait(10)
            count -= len(self.front.queues[0].reap())

    def close(self) -> None:
        self.log.close()
        os.close(self.log_fd)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", ["malloc", "file"])
async def test_every_page_that_the_disk_wrote_to_is_copied(
    tmp_path: Path, kind: str, packed: bool
) -> None:
    """With dirty_guest() made to do nothing, most of the 96 pages are wrong."""
    contents = random.Random(1).randbytes(DISK)
    async with disk(kind, contents, tmp_path) as target:
        protocol = WANTED_PROTOCOL | ProtocolFeature.LOG_SHMFD
        front = await target.connect("b0", packed=packed, protocol_features=protocol)
        await target.in_thread(lambda: front.write(0, contents))
        source = Source(front, seed=2)

        def move() -> list[int]:
            passes = []
            source.begin()
            source.copy_all()
            for number in range(PASSES):
                slots = source.chance.sample(range(SLOTS), 48)
                source.submit(slots)
                if number % 2:  # every other time while they are under way
                    passes.append(source.copy_dirty(clear=False))
                source.reap(len(slots))
                passes.append(source.copy_dirty())
            source.submit([0, 1, 2])
            front.raw.ask(Request.GET_VRING_BASE, VringState(0, 0))
            passes.append(source.copy_dirty())
            return passes

        passes = await target.in_thread(move)
        assert max(passes) < SLOTS  # no more than there was to be copied
        now = source.memory.read(source.start, SLOTS * PAGE)
        wrong = [
            page
            for page in range(SLOTS)
            if now[page * PAGE : (page + 1) * PAGE]
            != source.copied[page * PAGE : (page + 1) * PAGE]
        ]
        assert wrong == []
        assert now.count(0) < len(now) - SLOTS * SECTOR // 2  # and the disk has written a lot
        source.close()
        await target.close(front)


ANSWER = RESPONSE.size + SENSE_SIZE


@pytest.mark.parametrize(
    "cuts",
    [[ANSWER], [50, ANSWER], [ANSWER + 50]],
    ids=["response apart", "response in two", "data behind the response"],
)
@pytest.mark.parametrize(
    ("cdb", "size"), [(INQUIRY, 96), (read_10(0, 1), SECTOR)], ids=["INQUIRY", "READ"]
)
async def test_what_a_scsi_command_answers_is_logged(
    cdb: bytes, size: int, cuts: list[int]
) -> None:
    """The last 60 bytes of each buffer are in another page."""
    async with controller() as target:
        protocol = WANTED_PROTOCOL | ProtocolFeature.LOG_SHMFD
        front = await connect_scsi(target, protocol_features=protocol)
        source = Source(front, seed=1)
        ring = front.queues[FIRST_REQUEST_QUEUE]
        source.memory.write(source.headers, COMMAND.pack(address(0, 0), 1, 0, 0, 0, cdb))
        source.memory.write(source.start, b"\xee" * SLOTS * PAGE)  # else zeroes change nothing
        edges = [0, *cuts, ANSWER + size]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        starts = [source.start + (2 + 4 * i) * PAGE + 60 - each for i, each in enumerate(sizes)]
        buffers = [(start, each, True) for start, each in zip(starts, sizes, strict=True)]

        def move() -> None:
            source.begin()
            source.copy_all()
            ring.add([(source.headers, COMMAND.size, False), *buffers])
            ring.publish()
            assert ring.wait(10)
            ring.reap()

        await target.in_thread(move)
        dirty = source.copy_dirty()
        assert source.memory.read(starts[0] + 8, 4) == bytes(4)  # GOOD
        assert source.memory.read(source.start, SLOTS * PAGE) == bytes(source.copied)
        assert 0 < dirty <= 2 * len(sizes)
        source.close()
        await close_scsi(target, front)
