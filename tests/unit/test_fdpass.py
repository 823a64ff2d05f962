from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from reactor import fdpass
from reactor.fdpass import FdChannel, channel_pair
from reactor.rights import FDS_PER_MESSAGE
from tests.support.descriptors import open_fds
from tests.support.waiting import until


@contextlib.asynccontextmanager
async def channel() -> AsyncIterator[tuple[FdChannel, FdChannel]]:
    ours, theirs = (FdChannel(end) for end in channel_pair())
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


@contextlib.contextmanager
def files(count: int) -> Iterator[list[int]]:
    made = [os.memfd_create(f"file-{n}") for n in range(count)]
    for n, fd in enumerate(made):
        os.write(fd, b"%d" % n)
    try:
        yield made
    finally:
        for fd in made:
            os.close(fd)


async def test_descriptors_arrive_in_order_and_close_on_exec() -> None:
    with files(3) as fds:
        async with channel() as (ours, theirs):
            ours.send(7, fds)
            with await theirs.take(7, 3) as got:
                assert [os.pread(fd, 10, 0) for fd in got] == [b"0", b"1", b"2"]
                assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in got)


async def test_take_may_come_before_the_descriptors() -> None:
    with files(1) as fds:
        async with channel() as (ours, theirs):
            taking = asyncio.ensure_future(theirs.take(1, 1))
            await asyncio.sleep(0)
            ours.send(1, fds)
            (await taking).close()


async def test_more_descriptors_than_one_message_holds() -> None:
    count = 2 * FDS_PER_MESSAGE + 1
    with files(1) as (fd,):
        async with channel() as (ours, theirs):
            ours.send(1, [fd] * count)
            with await theirs.take(1, count) as got:
                assert len(set(got)) == count


async def test_tags_do_not_mix() -> None:
    with files(2) as (first, second):
        async with channel() as (ours, theirs):
            ours.send(1, [first])
            ours.send(2, [second])
            with await theirs.take(2, 1) as two, await theirs.take(1, 1) as one:
                assert (os.pread(one[0], 9, 0), os.pread(two[0], 9, 0)) == (b"0", b"1")


async def test_a_tag_without_descriptors_is_a_signal() -> None:
    async with channel() as (ours, theirs):
        ours.send(0, [])
        assert await theirs.take(0, 0) == []


async def test_another_number_than_promised_is_an_error_and_leaks_nothing() -> None:
    async with channel() as (ours, theirs):
        with files(2) as fds:
            ours.send(1, fds)
        before = open_fds()
        with pytest.raises(OSError, match="2 file descriptors, not 3") as caught:
            await theirs.take(1, 3)
        assert caught.value.errno == errno.EINVAL
        assert open_fds() == before


async def test_take_times_out() -> None:
    async with channel() as (_, theirs):
        with pytest.raises(TimeoutError, match="event 5 did not come"):
            await theirs.take(5, 1, timeout=0.01)


async def test_unclaimed_descriptors_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdpass, "CLAIM_TIMEOUT", 0.5)  # long enough to see them open before
    async with channel() as (ours, theirs):
        before = open_fds()
        with files(2) as fds:
            ours.send(1, fds)
        ours.send(2, [])
        await theirs.take(2, 0)  # so the first message has arrived as well
        assert len(open_fds()) == len(before) + 2
        await until(lambda: open_fds() == before)


async def test_close_closes_unclaimed_descriptors() -> None:
    before = open_fds()
    async with channel() as (ours, theirs):
        with files(2) as fds:
            ours.send(1, fds)
        ours.send(2, [])
        await theirs.take(2, 0)
    assert open_fds() == before


async def test_a_cancelled_take_leaks_nothing() -> None:
    count = FDS_PER_MESSAGE
    async with channel() as (ours, theirs):
        before = open_fds()
        taking = asyncio.ensure_future(theirs.take(1, count + 1))
        with files(1) as (fd,):
            ours_socket = ours._socket  # half of a parcel, which send() would not make
            header = fdpass._HEADER.pack(1, count + 1, 0)
            socket.send_fds(ours_socket, [header], [fd] * count)
            ours.send(2, [])
            await theirs.take(2, 0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert open_fds() == before


async def test_take_fails_when_the_other_end_goes() -> None:
    async with channel() as (ours, theirs):
        closed = asyncio.Event()
        theirs.on_closed = closed.set
        taking = asyncio.ensure_future(theirs.take(1, 1))
        await asyncio.sleep(0)
        ours.close()
        with pytest.raises(ConnectionResetError):
            await taking
        await closed.wait()
        with pytest.raises(ConnectionResetError):
            await theirs.take(2, 1)


async def test_the_second_to_claim_a_tag_is_refused() -> None:
    async with channel() as (ours, theirs):
        taking = asyncio.ensure_future(theirs.take(1, 0))
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="claimed already"):
            await theirs.take(1, 0)
        ours.send(1, [])
        await taking


async def test_truncation_by_the_limit_of_open_files_is_an_error() -> None:
    async with channel() as (ours, theirs):
        with files(1) as (fd,):
            before = open_fds()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = (n for n in range(soft) if n not in before)
            limit = next(itertools.islice(free, 3, None))
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                ours.send(1, [fd] * 20)
                with pytest.raises(OSError, match="lost some of 20") as caught:
                    await theirs.take(1, 20)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert caught.value.errno == errno.EMFILE
            assert open_fds() == before


async def test_sending_never_blocks() -> None:
    async with channel() as (ours, _):
        with pytest.raises(BlockingIOError):  # noqa: PT012
            for tag in range(100_000):
                ours.send(tag, [])


async def test_sending_to_nobody_is_an_error() -> None:
    async with channel() as (ours, theirs):
        theirs.close()
        with pytest.raises(OSError) as caught:
            ours.send(1, [])
        assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)


async def test_too_many_descriptors_are_refused() -> None:
    async with channel() as (ours, _):
        with pytest.raises(OSError, match="the limit is") as caught:
            ours.send(1, [0] * (fdpass.MAX_FDS + 1))
        assert caught.value.errno == errno.E2BIG
