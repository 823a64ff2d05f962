"""Disks of another server, qemu-storage-daemon, as bdevs of poll loops in this process."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bdev.io import BdevIO, Op, Request
from bdev.kind import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench
from tests.support.conformance import check_bdev, outcome
from tests.support.storage_daemon import DAEMON, StorageDaemon
from tests.support.waiting import until
from vhost import initiator as initiator

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(DAEMON is None, reason="qemu-storage-daemon is not installed"),
]


@pytest.fixture
def daemon(short_path: Path) -> Iterator[StorageDaemon]:
    running = StorageDaemon(short_path)
    yield running
    running.stop()


async def attach(bench: Bench, daemon: StorageDaemon, **params: Any) -> BdevIO:
    (name,) = await bench.rpc(
        "bdev_virtio_attach_controller",
        **{"name": "V", "trtype": "user", "traddr": daemon.socket, "dev_type": "blk", **params},
    )
    return await bench.open(name)


async def detach(bench: Bench) -> None:
    for reactor in range(len(bench.cluster.reactors)):
        await bench.close("V", reactor)
    await bench.rpc("bdev_virtio_detach_controller", name="V")


async def until_state(bench: Bench, state: str) -> None:
    controller = bench.registry.find("V").controller  # type: ignore[attr-defined]
    await until(lambda: controller.connected == (state == "connected"))


def test_it_passes_the_kit(daemon: StorageDaemon) -> None:
    async def make(bench: Bench) -> str:
        await bench.rpc(
            "bdev_virtio_attach_controller",
            name="V",
            trtype="user",
            traddr=daemon.socket,
            dev_type="blk",
        )
        return "V"

    check_bdev(make)


def test_a_stack_of_three_passes_the_kit(daemon: StorageDaemon) -> None:
    async def make(bench: Bench) -> str:
        params = {"name": "V", "trtype": "user", "traddr": daemon.socket, "dev_type": "blk"}
        await bench.rpc("bdev_virtio_attach_controller", **params)
        await bench.rpc("bdev_error_create", base_name="V")
        await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="EE_V")
        return "P"

    check_bdev(make)


@on_bench()
async def test_what_is_written_is_in_the_servers_file(bench: Bench, daemon: StorageDaemon) -> None:
    io = await attach(bench, daemon)
    data = os.urandom(1 << 20)
    io.write(512 * 3, data[:700], data[700:])
    io.flush()
    assert daemon.file.read_bytes()[512 * 3 :][: len(data)] == data
    io.write_zeroes(512 * 3, 512, unmap=True)
    io.unmap(1 << 20, 1 << 20)
    io.write(0, b"f" * 512, fua=True)
    start = daemon.file.read_bytes()[: 512 * 5]
    assert start == b"f" * 512 + bytes(1024) + bytes(512) + data[512:1024]
    await detach(bench)


@on_bench()
async def test_what_was_in_flight_is_done_again_when_the_server_is_back(
    bench: Bench, daemon: StorageDaemon
) -> None:
    io = await attach(bench, daemon)
    data = os.urandom(256 * 4096)
    writes = [
        io.start(Op.WRITE, i * 4096, 0, [data[i * 4096 : (i + 1) * 4096]]) for i in range(256)
    ]
    daemon.kill()
    await until_state(bench, "reconnecting")
    late = io.start(Op.READ, 0, 0, [bytearray(512)])
    await asyncio.to_thread(daemon.start)
    assert {await outcome(write) for write in writes} == {0}
    assert await outcome(late) == 0
    assert io.read(0, len(data)) == data
    (server,) = await bench.rpc("bdev_virtio_get_controllers")
    assert (server["state"], server["reconnects"]) == ("connected", 1)
    await detach(bench)


@on_bench()
async def test_a_reactor_that_comes_while_the_server_is_away_is_told_when_it_is_back(
    bench: Bench, daemon: StorageDaemon
) -> None:
    await attach(bench, daemon)
    await bench.close("V")
    daemon.kill()
    await until_state(bench, "reconnecting")
    io = await bench.open("V")
    read = io.start(Op.READ, 0, 0, [bytearray(512)])
    await asyncio.sleep(0)
    assert not read.done
    aborted = io.start(Op.READ, 0, 0, [bytearray(512)])
    assert aborted.abort()
    assert await outcome(aborted) == errno.ECANCELED
    await asyncio.to_thread(daemon.start)
    assert await outcome(read) == 0
    await detach(bench)


@on_bench()
async def test_a_server_that_stays_away_does_not_keep_its_disk_from_being_removed(
    bench: Bench, daemon: StorageDaemon
) -> None:
    io = await attach(bench, daemon)
    daemon.kill()
    await until_state(bench, "reconnecting")
    reads = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(100)]
    await bench.rpc("bdev_virtio_detach_controller", name="V")
    assert {await outcome(read) for read in reads} == {errno.ENODEV}
    await bench.registry.close(next(iter(bench.registry._entries.values())).bdev, bench.reactor)
    daemon.start()


@on_bench()
async def test_a_server_that_hangs_is_given_up_when_its_disk_is_removed(
    bench: Bench, daemon: StorageDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = await attach(bench, daemon)
    patient = bench.registry.remove
    monkeypatch.setattr(bench.registry, "remove", partial(patient, timeout=0.1))
    daemon.process.send_signal(signal.SIGSTOP)
    reads = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(100)]
    try:
        await bench.rpc("bdev_virtio_detach_controller", name="V")
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert {await outcome(read) for read in reads} == {errno.ENODEV}
    assert list(bench.registry) == []
    await bench.registry.close(next(iter(bench.registry._entries.values())).bdev, bench.reactor)


@on_bench()
async def test_a_server_with_another_disk_is_not_used(
    bench: Bench, daemon: StorageDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    io = await attach(bench, daemon)
    daemon.kill()
    daemon.options = "writable=off,num-queues=2"
    await until_state(bench, "reconnecting")
    daemon.start()
    await until(lambda: "has other disks than before" in caplog.text)
    read = io.start(Op.READ, 0, 0, [bytearray(512)])
    daemon.kill()
    daemon.options = "writable=on,num-queues=2"
    daemon.start()
    assert await outcome(read) == 0
    await detach(bench)


@on_bench(reactors=3)
async def test_each_reactor_needs_a_queue(bench: Bench, daemon: StorageDaemon) -> None:
    await attach(bench, daemon)
    await bench.open("V", 1)
    with pytest.raises(OperationError, match="all 2 queues are in use"):
        await bench.open("V", 2)
    await bench.close("V", 1)
    third = await bench.open("V", 2)
    assert third.read(0, 512) == bytes(512)
    await detach(bench)


@on_bench()
async def test_a_small_queue_serves_many_requests(bench: Bench, daemon: StorageDaemon) -> None:
    io = await attach(bench, daemon, vq_size=4)
    reads: list[Request] = [io.start(Op.READ, 0, 0, [bytearray(512)]) for _ in range(50)]
    assert {await outcome(read) for read in reads} == {0}
    await detach(bench)


def test_a_disk_that_cannot_be_written_is_readonly(short_path: Path) -> None:
    daemon = StorageDaemon(short_path, writable=False)

    @on_bench()
    async def check(bench: Bench) -> None:
        io = await attach(bench, daemon)
        assert bench.registry.find("V").readonly
        assert await outcome(io.start(Op.WRITE, 0, 0, [bytes(512)])) == errno.EROFS
        assert io.read(0, 512) == bytes(512)
        await detach(bench)

    check()
    daemon.stop()


@on_bench()
async def test_a_saved_server_comes_back(bench: Bench, daemon: StorageDaemon) -> None:
    await attach(bench, daemon, vq_count=1, vq_size=64)
    before, calls = await bench.rpc("bdev_get_bdevs"), bench.registry.config()
    await detach(bench)
    assert list(bench.registry) == []
    for call in calls:
        await bench.rpc(call["method"], **call["params"])
    assert await bench.rpc("bdev_get_bdevs") == before
    assert before[0]["driver_specific"]["virtio"]["vq_count"] == 1
    await detach(bench)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"trtype": "pci"}, "trtype 'pci': must be user"),
        ({"traddr": ""}, "must be the path of a socket"),
        ({"traddr": "/" + "x" * 120}, "must be the path of a socket"),
        ({"traddr": "/no/such/socket"}, "no such socket"),
        ({"vq_count": 0}, "vq_count 0: must be 1 to 64"),
        ({"vq_count": 3}, "3 queues asked for, the server has 2"),
        ({"vq_size": 100}, "vq_size 100: must be a power of two"),
        ({"vq_size": 2048}, "vq_size 2048: must be a power of two"),
        ({"name": ""}, "must have 1 to 255"),
        ({"dev_type": "scsi"}, "disk.sock"),
        ({"dev_type": "fs"}, "dev_type"),
    ],
)
def test_what_cannot_be_attached_is_refused(
    params: dict[str, Any], text: str, daemon: StorageDaemon
) -> None:
    @on_bench()
    async def refused(bench: Bench) -> None:
        with pytest.raises(OperationError, match=text):
            await attach(bench, daemon, **params)
        assert await bench.rpc("bdev_virtio_get_controllers") == []
        assert list(bench.registry) == []

    refused()


@on_bench()
async def test_a_server_that_answers_what_was_not_asked_fails_its_disk(
    bench: Bench, daemon: StorageDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    """As if it had written an entry of its own into the used ring."""
    io = await attach(bench, daemon)
    bdev = bench.registry.find("V")
    controller = bdev.controller  # type: ignore[attr-defined]
    (lent,) = controller._lent.values()
    area = controller._session.areas[lent.place]
    layout = lib.initiator_layout(area.size)
    index = int.from_bytes(area._memory.read(area.guest + layout.used + 2, 2), "little")
    area._memory.write(area.guest + layout.used + 2, ((index + 3) & 0xFFFF).to_bytes(2, "little"))
    os.eventfd_write(area.call_fd, 1)
    await until(lambda: "answers what was not asked" in caplog.text)
    assert await outcome(io.start(Op.READ, 0, 0, [bytearray(512)])) == errno.EIO
    daemon.kill()  # the next one is another
    await until_state(bench, "reconnecting")
    await asyncio.to_thread(daemon.start)
    assert await outcome(io.start(Op.READ, 0, 0, [bytearray(512)])) in (0, errno.EIO)
    await until_state(bench, "connected")
    assert await outcome(io.start(Op.READ, 0, 0, [bytearray(512)])) == 0
    await detach(bench)
