"""Guest memory for DMA: when it is mapped, and that everything is given back."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bdev.guest_dma import GuestDma
from reactor.errors import OperationError
from tests.support.descriptors import open_fds
from tests.support.nvme_controller import SoftDma

SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * SIZE)
    yield fd
    os.close(fd)


def run(test: Callable[[GuestDma, SoftDma], Any]) -> None:
    async def main() -> None:
        await test(GuestDma(), SoftDma())

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_memory_is_mapped_while_a_controller_uses_it(memory: int) -> None:
    async def test(dma: GuestDma, space: SoftDma) -> None:
        lease = await dma.lease(memory, 0, SIZE)
        assert lease is not None
        assert space.maps == {}
        await dma.use(space)
        await dma.use(space)
        os.pwrite(memory, b"hello", 100)
        assert space.read(lease.iova + 100, 5) == b"hello"
        await dma.drop()
        assert list(space.maps) == [lease.iova]
        await dma.drop()
        assert space.maps == {}
        await dma.release(lease)

    run(test)


def test_memory_of_a_session_that_comes_later_is_mapped_at_once(memory: int) -> None:
    async def test(dma: GuestDma, space: SoftDma) -> None:
        await dma.use(space)
        lease = await dma.lease(memory, SIZE, SIZE)
        assert lease is not None
        os.pwrite(memory, b"hello", SIZE)
        assert space.read(lease.iova, 5) == b"hello"
        await dma.release(lease)
        assert space.maps == {}

    run(test)


def test_one_memory_that_several_sessions_share_is_mapped_once(memory: int) -> None:
    async def test(dma: GuestDma, space: SoftDma) -> None:
        await dma.use(space)
        copy = os.dup(memory)
        first, second = await dma.lease(memory, 0, SIZE), await dma.lease(copy, 0, SIZE)
        os.close(copy)
        assert first is second is not None
        await dma.release(first)
        assert len(space.maps) == 1
        await dma.release(first)
        assert space.maps == {}

    run(test)


def test_a_region_that_begins_within_a_page(memory: int) -> None:
    async def test(dma: GuestDma, space: SoftDma) -> None:
        await dma.use(space)
        lease = await dma.lease(memory, 5000, 10_000)
        assert lease is not None
        os.pwrite(memory, b"x" * 10_000, 5000)
        assert space.read(lease.iova, 10_000) == b"x" * 10_000
        await dma.release(lease)

    run(test)


def test_memory_that_cannot_be_locked_is_bounced(memory: int) -> None:
    async def test(dma: GuestDma, space: SoftDma) -> None:
        space.limit = SIZE // 2
        await dma.use(space)
        assert await dma.lease(memory, 0, SIZE) is None
        assert space.maps == {}

    run(test)


def test_a_controller_is_refused_when_the_memory_of_guests_cannot_be_locked(memory: int) -> None:
    async def test(dma: GuestDma, space: SoftDma) -> None:
        small = await dma.lease(memory, 0, 4096)
        large = await dma.lease(memory, 0, SIZE)
        assert small is not None
        assert large is not None
        space.limit = SIZE // 2
        with pytest.raises(OperationError, match="dma=bounce") as caught:
            await dma.use(space)
        assert caught.value.code == -errno.ENOMEM
        assert space.maps == {}
        await dma.release(small)
        await dma.release(large)

    run(test)
