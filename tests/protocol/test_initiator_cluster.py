"""One cluster's disks served by another: both ends are ours, in processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from spdk.rpc.client import JSONRPCException

from bdev.io import Op
from reactor.native import lib
from tests.conftest import running_cluster
from tests.support.bdevs import Bench, on_bench
from tests.support.cluster import Cluster
from tests.support.conformance import check_bdev, outcome
from tests.support.stack import CPUS, Stack, stack
from tests.support.waiting import PATIENCE, until

BLOCKS = 32768


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    """A cluster with a virtio-blk disk, and a SCSI host with two targets."""
    with running_cluster(cpus=CPUS[:1]) as cluster:
        for name in ("B", "S0", "S3"):
            cluster.rpc("bdev_malloc_create", name=name, num_blocks=BLOCKS, block_size=512)
        cluster.rpc("vhost_create_blk_controller", ctrlr="blk", dev_name="B")
        cluster.rpc("vhost_create_scsi_controller", ctrlr="scsi")
        for target in (0, 3):
            cluster.rpc(
                "vhost_scsi_controller_add_target",
                ctrlr="scsi",
                scsi_target_num=target,
                bdev_name=f"S{target}",
            )
        yield cluster


async def attach(caller: Any, server: Cluster, kind: str) -> list[str]:
    params = {"name": "V", "trtype": "user", "dev_type": kind, "vq_size": 128}
    path = str(server.socket(kind))
    return list(await caller("bdev_virtio_attach_controller", **params, traddr=path))


@pytest.mark.parametrize(("kind", "name"), [("blk", "V"), ("scsi", "Vt3")])
def test_it_passes_the_kit(kind: str, name: str, server: Cluster) -> None:
    async def make(bench: Bench) -> str:
        assert name in await attach(bench.rpc, server, kind)
        return name

    check_bdev(make)


@on_bench()
async def test_a_host_has_a_disk_for_each_target(bench: Bench, server: Cluster) -> None:
    assert await attach(bench.rpc, server, "scsi") == ["Vt0", "Vt3"]
    (host,) = await bench.rpc("bdev_virtio_scsi_get_devices")
    assert (host["name"], host["virtio"]["state"]) == ("V", "connected")
    data = os.urandom(1 << 20)
    for name in ("Vt0", "Vt3"):
        io = await bench.open(name)
        io.write(512, data)
        io.write(0, name.encode().ljust(512), fua=True)
        io.unmap(2 << 20, 1 << 20)
        io.flush()
    for name in ("Vt0", "Vt3"):
        io = bench.reactor.io(bench.registry.find(name))
        assert io.read(0, 512 + len(data)) == name.encode().ljust(512) + data
        await bench.close(name)
    await bench.rpc("bdev_virtio_detach_controller", name="V")


def test_a_controller_never_serves_itself() -> None:
    """Each request would come back as another one: directly, through a stack, or another socket."""
    with running_cluster(cpus=CPUS[:1]) as cluster:
        rpc = cluster.rpc
        rpc("bdev_malloc_create", name="B", num_blocks=BLOCKS, block_size=512)
        rpc("vhost_create_blk_controller", ctrlr="one", dev_name="B")
        attached = {"trtype": "user", "dev_type": "blk", "traddr": str(cluster.socket("one"))}
        assert rpc("bdev_virtio_attach_controller", name="V", **attached) == ["V"]
        rpc("bdev_passthru_create", base_bdev_name="V", name="P")
        rpc("vhost_create_blk_controller", ctrlr="two", dev_name="P")
        attached["traddr"] = str(cluster.socket("two"))
        assert rpc("bdev_virtio_attach_controller", name="W", **attached) == ["W"]
        for name in ("P", "W"):
            with pytest.raises(JSONRPCException, match="deadlock avoided: bdev"):
                rpc("vhost_blk_controller_set_bdev", ctrlr="one", dev_name=name)
        rpc("vhost_create_scsi_controller", ctrlr="three")
        place = {"ctrlr": "three", "scsi_target_num": 0}
        rpc("vhost_scsi_controller_add_target", **place, bdev_name="W")  # in turn, and no circle


@on_bench()
async def test_it_follows_the_servers_size(bench: Bench) -> None:
    with running_cluster(cpus=CPUS[:1]) as server:
        server.rpc("bdev_malloc_create", name="B", num_blocks=2048, block_size=512)
        server.rpc("vhost_create_blk_controller", ctrlr="blk", dev_name="B")
        await attach(bench.rpc, server, "blk")
        io = await bench.open("V")
        await asyncio.to_thread(server.rpc, "bdev_malloc_resize", name="B", new_size=2)
        await until(lambda: lib.bdev_size(io.handle) == 2 << 20)
        assert bench.registry.find("V").size == 2 << 20
        assert await outcome(io.start(Op.READ, 1 << 20, 0, [bytearray(512)])) == 0
        await bench.close("V")
        await bench.rpc("bdev_virtio_detach_controller", name="V")


@asynccontextmanager
async def chain(server: Cluster, kind: str, name: str) -> AsyncIterator[Stack]:
    """Serve a disk of ``server`` once more, with a device on it."""
    async with stack(CPUS[:1]) as target:
        await attach(target.call, server, kind)
        await target.call("bdev_passthru_create", name="P", base_bdev_name=name)
        await target.call("vhost_create_blk_controller", ctrlr="again", dev_name="P")
        yield target
        await target.call("vhost_delete_controller", ctrlr="again")
        await target.call("bdev_passthru_delete", name="P")
        await target.call("bdev_virtio_detach_controller", name="V")


@pytest.mark.parametrize(("kind", "name"), [("blk", "V"), ("scsi", "Vt0")])
async def test_reactors_of_both_ends_may_die_under_load(
    kind: str, name: str, server: Cluster
) -> None:
    """What was written through both is there, and no request fails."""
    async with chain(server, kind, name) as target:
        front = await target.connect("again")
        data = os.urandom(4 << 20)

        def write() -> None:
            for at in range(0, len(data), 16384):
                front.write(at, data[at : at + 16384])

        writing = asyncio.create_task(asyncio.to_thread(write))
        await asyncio.sleep(0)
        pid = target.cluster.reactors[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(server.kill_reactor, CPUS[0])
        async with asyncio.timeout(PATIENCE):
            await writing
        assert await target.in_thread(lambda: front.read(0, len(data))) == data
        await target.close(front)


async def test_a_server_that_ends_and_is_there_again_is_found(tmp_path: Path) -> None:
    """Its controller is removed by force under load, then its disk, and both come back."""
    image = tmp_path / "image"
    image.write_bytes(bytes(BLOCKS * 512))

    def serve(cluster: Cluster) -> None:
        cluster.rpc("bdev_uring_create", name="F", filename=str(image), block_size=512)
        cluster.rpc("vhost_create_blk_controller", ctrlr="blk", dev_name="F")

    with running_cluster(cpus=CPUS[:1]) as first:
        serve(first)
        async with chain(first, "blk", "V") as target:
            front = await target.connect("again")
            data = os.urandom(4 << 20)
            await target.in_thread(lambda: front.write(0, data[: 1 << 20]))
            first.rpc("vhost_delete_controller", ctrlr="blk", force=True)
            writing = asyncio.create_task(asyncio.to_thread(front.write, 1 << 20, data[1 << 20 :]))
            await asyncio.to_thread(first.rpc, "bdev_uring_delete", name="F")
            await asyncio.to_thread(serve, first)
            async with asyncio.timeout(PATIENCE):
                await writing
            assert await target.in_thread(lambda: front.read(0, len(data))) == data
            await target.close(front)
