"""Guest memory of every kind that front-ends have: what is read and written there is the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.stack import stack
from tests.support.waiting import PATIENCE
from vhost.frontend import BlkFrontend
from vhost.frontend_memory import FrontendMemory
from vhost.messages import Region, Request, SingleRegion
from vhost.virtio_blk import BlkRequest

Backing = Callable[[int], tuple[int, int]]

PAGE = 4096
SIZE = 4 << 20


def memfd(size: int, *, offset: int = 0, flags: int = 0) -> tuple[int, int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | flags)
    os.ftruncate(fd, offset + size)
    return fd, offset


def hugetlb(size: int) -> tuple[int, int]:
    """Return huge pages, which begin after the first one of their file."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name == "HugePages_Free" and int(value) < 2 * SIZE >> 21:
            pytest.skip("the system has no huge pages: echo 8 >/proc/sys/vm/nr_hugepages")
    return memfd(size, offset=2 << 20, flags=os.MFD_HUGETLB)


def in_file(folder: Path, *, unlink: bool) -> Backing:
    def make(size: int) -> tuple[int, int]:
        path = folder / "memory"
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(fd, 3 * PAGE + size)
        if unlink:
            path.unlink()
        return fd, 3 * PAGE

    return make


@pytest.mark.parametrize(
    "kind", ["memfd", "memfd at an odd page", "file", "file without a name", "huge pages"]
)
async def test_memory_is_reached_at_its_offset_in_its_file(kind: str, tmp_path: Path) -> None:
    backing: Backing = {
        "memfd": memfd,
        "memfd at an odd page": lambda size: memfd(size, offset=5 * PAGE),
        "file": in_file(tmp_path, unlink=False),
        "file without a name": in_file(tmp_path, unlink=True),
        "huge pages": hugetlb,
    }[kind]
    memory = FrontendMemory(SIZE, backing=backing)
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call("vhost_create_blk_controller", ctrlr="b", dev_name="m")

        def work() -> None:
            with BlkFrontend(target.socket("b")) as disk:
                disk.set_up(1, 128, memory)
                data = os.urandom(64 << 10)
                disk.write(4096, data)
                assert disk.read(4096, len(data)) == data

        await target.in_thread(work)
        await target.until(lambda: not target.sessions())


async def test_a_character_device_can_be_memory() -> None:
    """/dev/zero is mapped by each process anew: a device that reads from it writes zeroes."""
    async with stack() as target:
        await target.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        await target.call("vhost_create_blk_controller", ctrlr="b", dev_name="m")

        def work() -> None:
            zero = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
            where = Region(1 << 40, 1 << 20, 1 << 46, 7 * PAGE)
            with BlkFrontend.connect(target.socket("b")) as disk:
                disk.write(0, b"x" * 1024)
                disk.raw.tell(Request.ADD_MEM_REG, SingleRegion(where), [zero])
                os.close(zero)
                head = disk.memory.allocate(64)
                disk.memory.write(head, BlkRequest.OUT.to_bytes(16, "little") + b"\xff")
                ring = disk.queues[0]
                buffers = [
                    (head, 16, False),
                    (where.guest + PAGE, 512, False),
                    (head + 16, 1, True),
                ]
                ring.add(buffers)
                ring.publish()
                assert ring.wait(PATIENCE)
                ring.reap()
                assert disk.memory.read(head + 16, 1) == b"\0"
                assert disk.read(0, 1024) == bytes(512) + b"x" * 512

        await target.in_thread(work)
        await target.until(lambda: not target.sessions())
