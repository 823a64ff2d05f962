"""Disks on sockets: real front-ends, real reactor processes, and what goes wrong between them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bdev.kind import Op
from reactor.errors import OperationError
from tests.support.descriptors import open_fds
from tests.support.stack import CPUS, Stack, stack
from tests.support.waiting import PATIENCE
from vhost.frontend import WANTED_FEATURES, BlkFrontend, FrontendError, RequestError
from vhost.frontend_scsi import ScsiFrontend
from vhost.messages import VERSION, Feature, Header
from vhost.virtio_blk import WRITEBACK, BlkFeature

MIB = 1 << 20


@asynccontextmanager
async def disk(cpus: list[int] = CPUS[:1], **params: object) -> AsyncIterator[Stack]:
    """Serve a malloc disk of 16 MiB as controller "b0"."""
    async with stack(cpus) as made:
        await made.call("bdev_malloc_create", name="M0", num_blocks=32768, block_size=512)
        await made.call("vhost_create_blk_controller", ctrlr="b0", dev_name="M0", **params)
        yield made


def pattern(seed: int, size: int) -> bytes:
    return bytes((seed + place // 7) % 251 for place in range(size))


async def test_what_is_written_is_read_back() -> None:
    async with disk() as target:

        def work() -> None:
            with BlkFrontend.connect(target.socket("b0"), regions=3) as front:
                assert front.size == 16 * MIB
                front.write(MIB, pattern(1, 256 << 10))
                front.flush()
                assert front.read(MIB, 256 << 10) == pattern(1, 256 << 10)
                assert front.get_id().rstrip("\0") == "M0"
                front.write_zeroes([(MIB, 4096)])
                assert front.read(MIB, 8192) == bytes(4096) + pattern(1, 8192)[4096:]
                front.discard([(0, 4096), (8192, 4096)])

        await target.in_thread(work)


async def test_a_driver_of_the_other_kind_of_device_says_so() -> None:
    async with disk() as target:
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        with pytest.raises(FrontendError, match="b0: the device is virtio-blk, not virtio-scsi"):
            await target.in_thread(lambda: ScsiFrontend.connect(target.socket("b0")))
        with pytest.raises(FrontendError, match="s0: the device is virtio-scsi, not virtio-blk"):
            await target.in_thread(lambda: BlkFrontend.connect(target.socket("s0")))


def flushes(target: Stack) -> int:
    slot = target.registry.find("M0").slot
    return int(target.cluster.reactors[0].stats.slot(slot, "struct bdev_stats").ops[Op.FLUSH])


async def test_the_driver_chooses_the_cache_mode() -> None:
    """A write zeroes shows it, since nothing outside can see the flag of a write."""
    async with disk() as target:
        front = await target.connect("b0")
        assert front.config.writeback == 1
        await target.in_thread(lambda: front.write_zeroes([(0, 4096)]))
        assert flushes(target) == 0
        for refused in (b"\2", b"\0\0"):
            with pytest.raises(FrontendError, match="refuses SET_CONFIG"):
                await target.in_thread(lambda data=refused: front.write_config(32, data))
        await target.in_thread(lambda: front.write_config(32, b"\0"))
        await target.in_thread(front.refresh_config)
        assert front.config.writeback == 0
        await target.in_thread(lambda: front.write_zeroes([(0, 4096), (8192, 4096)]))
        assert flushes(target) == 1
        await target.in_thread(lambda: front.write(MIB, pattern(5, 4096)))
        assert await target.in_thread(lambda: front.read(MIB, 4096)) == pattern(5, 4096)
        await target.in_thread(lambda: front.write_config(32, b"\1"))
        await target.in_thread(lambda: front.write_zeroes([(0, 4096)]))
        assert flushes(target) == 1
        await target.close(front)


async def test_a_driver_that_cannot_flush_needs_not_to() -> None:
    features = WANTED_FEATURES & ~int(BlkFeature.FLUSH | BlkFeature.CONFIG_WCE)
    async with disk() as target:
        front = await target.connect("b0", features=features)
        await target.in_thread(lambda: front.write_zeroes([(0, 4096)]))
        assert flushes(target) == 1
        await target.close(front)


async def test_in_order_is_offered_where_it_is_asked_for() -> None:
    async with disk(in_order=True) as target:
        assert target.vhost.config()[0]["params"]["in_order"] is True
        features = WANTED_FEATURES | Feature.IN_ORDER
        front = await target.connect("b0", features=features)
        assert front.features & Feature.IN_ORDER
        await target.in_thread(lambda: front.write(0, pattern(1, 65536)))
        assert await target.in_thread(lambda: front.read(0, 65536)) == pattern(1, 65536)
        await target.close(front)


async def test_a_resize_reaches_every_front_end(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    async with stack() as target:
        await target.call("bdev_uring_create", name="U", filename=str(path), block_size=512)
        await target.call("vhost_create_blk_controller", ctrlr="b0", dev_name="U")
        fronts = [await target.connect("b0") for _ in range(2)]
        os.truncate(path, 2 * MIB)
        await target.call("bdev_uring_rescan", name="U")
        for place, front in enumerate(fronts):
            assert front.size == MIB
            await target.in_thread(front.wait_config_change)
            assert front.size == 2 * MIB
            data = pattern(place, 4096)
            await target.in_thread(lambda f=front, d=data: f.write(2 * MIB - 4096, d))
            assert await target.in_thread(lambda f=front: f.read(2 * MIB - 4096, 4096)) == data
        await target.close(*fronts)


async def test_queues_of_one_disk_are_spread_over_reactors() -> None:
    async with disk(CPUS[:2]) as target:
        front = await target.connect("b0", queues=4)
        try:
            (controller,) = await target.call("vhost_get_controllers")
            (session,) = controller["sessions"]
            places = [queue["cpu"] for queue in session["queues"]]
            assert sorted(places) == sorted((CPUS[:2] * 4)[:4])
            for queue in range(4):
                data = pattern(queue, 4096)
                await target.in_thread(lambda q=queue, d=data: front.write(q * 4096, d, queue=q))
                got = await target.in_thread(
                    lambda q=queue: front.read(q * 4096, 4096, queue=3 - q)
                )
                assert got == data
        finally:
            await target.close(front)


async def test_a_session_is_described_and_goes_away() -> None:
    async with disk() as target:
        front = await target.connect("b0", queues=2)
        (controller,) = await target.call("vhost_get_controllers", name="b0")
        (session,) = controller["sessions"]
        assert session["started"] is True
        assert session["max_queues"] == 2
        assert session["inflight_task_cnt"] == 0
        assert session["peer_pid"] == os.getpid()
        with pytest.raises(OperationError, match="Device or resource busy"):
            await target.call("vhost_delete_controller", ctrlr="b0")
        await target.close(front)
        await target.until(lambda: not target.sessions())
        assert await target.call("vhost_delete_controller", ctrlr="b0") is True
        assert "b0" not in os.listdir(target.folder)


async def test_a_front_end_comes_back_again_and_again() -> None:
    async with disk() as target:

        def work(seed: int) -> None:
            with BlkFrontend.connect(target.socket("b0")) as front:
                front.write(0, pattern(seed, 4096))
                assert front.read(0, 4096) == pattern(seed, 4096)

        await target.in_thread(lambda: work(0))
        await target.until(lambda: not target.sessions())
        before = open_fds()
        for seed in range(20):
            await target.in_thread(lambda seed=seed: work(seed))
        await target.until(lambda: not target.sessions())
        assert open_fds() == before


async def test_two_front_ends_share_a_socket() -> None:
    async with disk() as target:
        one, two = await target.connect("b0"), await target.connect("b0")
        try:
            await target.in_thread(lambda: one.write(0, pattern(3, 4096)))
            assert await target.in_thread(lambda: two.read(0, 4096)) == pattern(3, 4096)
        finally:
            await target.close(one, two)


async def test_front_ends_of_one_socket_are_sessions_of_their_own() -> None:
    async with disk(packed_ring=True) as target:
        one = await target.connect("b0", packed=True, queues=2)
        two = await target.connect("b0", queue_size=16, regions=3)
        try:
            await target.in_thread(lambda: one.write_config(WRITEBACK, b"\0"))
            await target.in_thread(two.refresh_config)
            assert two.config.writeback == 1
            first, second = target.sessions()
            assert (len(first["queues"]), len(second["queues"])) == (2, 1)
            assert (first["memory_regions"], second["memory_regions"]) == (1, 3)
            assert "RING_PACKED" in first["feature_names"]
            assert "RING_PACKED" not in second["feature_names"]
            await target.close(one)
            assert len(await target.in_thread(lambda: two.read(0, 4096))) == 4096
            assert [session["id"] for session in target.sessions()] == [second["id"]]
        finally:
            await target.close(two)


async def test_a_reactor_that_is_killed_costs_no_data_and_no_error() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        reactor = target.cluster.reactors[0]
        try:
            for seed in range(5):
                data = pattern(seed, 64 << 10)
                await target.in_thread(lambda d=data: front.write(0, d))
                assert reactor.pid is not None
                os.kill(reactor.pid, signal.SIGKILL)
                assert await target.in_thread(lambda: front.read(0, 64 << 10)) == data
        finally:
            await target.close(front)


async def test_requests_in_flight_survive_a_reactor_that_is_killed() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        reactor = target.cluster.reactors[0]
        done = [0]

        def write_and_read(stop: list[bool]) -> None:
            while not stop:
                at, data = done[0] % 64 * 4096, pattern(done[0], 4096)
                front.write(at, data)
                assert front.read(at, 4096) == data
                done[0] += 1

        stop: list[bool] = []
        writer = asyncio.create_task(asyncio.to_thread(write_and_read, stop))
        try:
            for _ in range(4):  # one less than what counts as a crash loop
                before, pid = done[0], reactor.pid
                await target.until(lambda before=before: done[0] > before)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await target.until(lambda pid=pid: reactor.pid not in (None, pid) and reactor.alive)
            before = done[0]
            await target.until(lambda: done[0] > before)
        finally:
            stop.append(True)
            await writer  # it uses the front-end's memory
            await target.close(front)


async def test_a_bdev_that_is_deleted_fails_requests_and_nothing_else() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        try:
            config = front.config
            await target.call("bdev_malloc_delete", name="M0")
            with pytest.raises(RequestError, match="IOERR"):
                await target.in_thread(lambda: front.read(0, 4096))
            (controller,) = await target.call("vhost_get_controllers")
            assert controller["backend_specific"]["block"]["bdev"] is None
            assert target.vhost.config() == []
        finally:
            await target.close(front)
        again = await target.connect("b0")
        try:
            assert again.config == config
            with pytest.raises(RequestError, match="IOERR"):
                await target.in_thread(lambda: again.write(0, bytes(512)))
        finally:
            await target.close(again)


async def test_a_read_only_disk_refuses_whatever_changes_it() -> None:
    async with disk(readonly=True) as target:

        def work() -> None:
            with BlkFrontend.connect(target.socket("b0")) as front:
                assert front.read_only
                assert front.read(0, 512) == bytes(512)
                for change in (
                    lambda: front.write(0, bytes(512)),
                    lambda: front.discard([(0, 4096)]),
                    lambda: front.write_zeroes([(0, 4096)]),
                ):
                    with pytest.raises(RequestError):
                        change()

        await target.in_thread(work)


async def test_a_malformed_message_costs_only_its_own_connection() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        try:
            for garbage in (b"\0" * 12, b"\xff" * 64, Header(99, VERSION, 0).to_bytes()):
                with socket.socket(socket.AF_UNIX) as rude:
                    rude.setblocking(False)
                    loop = asyncio.get_running_loop()
                    await loop.sock_connect(rude, target.socket("b0"))
                    await loop.sock_sendall(rude, garbage)
                    # What was not read of the garbage turns the end into a reset.
                    with suppress(ConnectionResetError):
                        async with asyncio.timeout(PATIENCE):
                            assert await loop.sock_recv(rude, 1) == b""
            await target.in_thread(lambda: front.write(0, pattern(9, 512)))
            assert await target.in_thread(lambda: front.read(0, 512)) == pattern(9, 512)
        finally:
            await target.close(front)


async def test_a_queue_with_a_broken_ring_is_stopped_and_reported() -> None:
    async with disk() as target:
        front = await target.connect("b0")
        other = await target.connect("b0")
        try:
            await target.in_thread(lambda: front.read(0, 512))
            corrupt_avail(front)
            await target.until(
                lambda: any(
                    queue["broken"] for session in target.sessions() for queue in session["queues"]
                )
            )
            await target.in_thread(lambda: other.read(0, 512))
        finally:
            await target.close(front, other)


def corrupt_avail(front: BlkFrontend) -> None:
    """Make the avail ring claim more entries than it has, and kick."""
    (queue,) = front.queues
    front.memory.write(queue.avail + 2, struct.pack("<H", queue.used_idx + 2 * queue.size))
    os.eventfd_write(queue.kick_fd, 1)
