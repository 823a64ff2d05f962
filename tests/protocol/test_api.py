"""The functions of SPDK's vhost.h of 2018: one test for each row of docs/api.md."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import vhost
import vhost.api
from tests.support import external
from tests.support.stack import CPUS
from vhost.frontend import BlkFrontend
from vhost.frontend_scsi import ScsiFrontend
from vhost.virtio_scsi import Response

INQUIRY = bytes.fromhex("12 00 00 00 60 00")


@asynccontextmanager
async def target() -> AsyncIterator[Path]:
    """Run a target with disk M0 and device b0, sockets in the directory that is yielded."""
    with tempfile.TemporaryDirectory(prefix="vr-") as folder:
        sockets = Path(folder) / "sockets"
        sockets.mkdir()
        vhost.set_socket_path(sockets)
        load = ("tests.support.external",)
        mask = hex(1 << CPUS[0])
        await vhost.init(Path(folder) / "run", mask, load=load, lock_dir=folder)
        try:
            disk = {"name": "M0", "num_blocks": 2048, "block_size": 512}
            await vhost.invoke("bdev_malloc_create", disk)
            await vhost.blk_construct("b0", mask, "M0")
            yield sockets
        finally:
            await vhost.fini()


@asynccontextmanager
async def guest(sockets: Path) -> AsyncIterator[BlkFrontend]:
    front = await asyncio.to_thread(lambda: BlkFrontend.connect(sockets / "b0"))
    try:
        yield front
    finally:
        await asyncio.to_thread(front.close)


async def error_of(call: object) -> int | None:
    with pytest.raises(OSError) as raised:
        await call  # type: ignore[misc]
    return raised.value.errno


async def test_set_socket_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vhost.set_socket_path(tmp_path / "none")
    async with target() as sockets:
        assert os.listdir(sockets) == ["b0"]
        with pytest.raises(OSError, match="before init"):
            vhost.set_socket_path(tmp_path)


async def test_init(tmp_path: Path) -> None:
    assert await error_of(vhost.invoke("bdev_get_bdevs")) == errno.ENXIO
    assert await error_of(vhost.init(tmp_path / "run", "0xzz")) == errno.EINVAL
    async with target():
        assert await error_of(vhost.init(tmp_path / "run")) == errno.EALREADY


async def test_fini() -> None:
    async with target() as sockets:
        called = []
        await vhost.fini(lambda: called.append(os.listdir(sockets)))
        assert called == [[]]
        assert await error_of(vhost.invoke("bdev_get_bdevs")) == errno.ENXIO


async def test_shutdown_cb() -> None:
    async with target() as sockets:
        await vhost.shutdown_cb()
        assert os.listdir(sockets) == []


async def test_config_json() -> None:
    async with target():
        blk, scsi = await vhost.config_json()
        assert (blk["subsystem"], scsi["subsystem"]) == ("vhost_blk", "vhost_scsi")
        assert blk["config"][0]["params"]["ctrlr"] == "b0"


async def test_blk_construct() -> None:
    async with target():
        assert await error_of(vhost.blk_construct("b0", None, "M0")) == errno.EEXIST
        assert await error_of(vhost.blk_construct("b1", None, "none")) == errno.ENODEV
        assert await error_of(vhost.blk_construct("b1", "0xzz", "M0")) == errno.EINVAL
        await vhost.blk_construct("b1", None, "M0", readonly=True)
        (created,) = await vhost.invoke("vhost_get_controllers", {"name": "b1"})
        assert created["backend_specific"]["block"]["readonly"] is True


async def test_call_external_event() -> None:
    """In the reactor when the device is in use, else here; with None when there is none."""
    async with target() as sockets:
        here = os.getpid()
        assert await vhost.call_external_event("none", external.where, 1) == [here, None, 1]
        assert await vhost.call_external_event("b0", external.where, 2) == [here, "b0", 2]
        (reactor,) = (await vhost.invoke("framework_get_reactors"))["reactors"]
        async with guest(sockets):
            answer = await vhost.call_external_event("b0", external.where, [3])
            assert answer == [reactor["pid"], "b0", [3]]
            refused = vhost.call_external_event("b0", external.unmarked)
            assert await error_of(refused) == errno.ENOENT
        assert await error_of(vhost.call_external_event("no", external.unmarked)) == errno.ENOENT


async def test_call_external_event_foreach() -> None:
    async with target():
        await vhost.blk_construct("b1", None, "M0", readonly=True)
        external.seen.clear()
        await vhost.call_external_event_foreach(external.note)
        assert external.seen == ["b0", "b1", None]


async def test_dev_get_name() -> None:
    async with target() as sockets, guest(sockets):
        _, name, _ = await vhost.call_external_event("b0", external.where)
        assert name == "b0"


async def test_dev_get_cpumask() -> None:
    async with target() as sockets, guest(sockets):
        seen = await vhost.call_external_event("b0", external.look)
        assert seen["cpumask"] == hex(1 << CPUS[0])


async def test_get_coalescing() -> None:
    async with target() as sockets, guest(sockets):
        seen = await vhost.call_external_event("b0", external.look)
        assert seen["coalescing"] == [0, 60000]


async def test_blk_get_dev() -> None:
    async with target() as sockets, guest(sockets):
        assert (await vhost.call_external_event("b0", external.look))["bdev"] == "M0"
        await vhost.invoke("bdev_malloc_delete", {"name": "M0"})
        assert (await vhost.call_external_event("b0", external.look))["bdev"] is None


async def test_set_coalescing() -> None:
    async with target() as sockets, guest(sockets):
        call = vhost.call_external_event
        assert await call("b0", external.coalesce, [10, 100000]) == 0
        assert (await call("b0", external.look))["coalescing"] == [10, 100000]
        assert await call("b0", external.coalesce, [10, 50]) == errno.EINVAL


async def test_dev_remove() -> None:
    async with target() as sockets:
        async with guest(sockets):
            assert await vhost.call_external_event("b0", external.remove, False) == errno.EBUSY
            assert await vhost.call_external_event("b0", external.remove, True) == 0
        assert os.listdir(sockets) == []


async def test_scsi_dev_construct() -> None:
    async with target() as sockets:
        await vhost.scsi_dev_construct("s0", hex(1 << CPUS[0]))
        assert sorted(os.listdir(sockets)) == ["b0", "s0"]
        (made,) = await vhost.invoke("vhost_get_controllers", {"name": "s0"})
        assert (made["cpumask"], made["backend_specific"]) == (hex(1 << CPUS[0]), {"scsi": []})
        assert await error_of(vhost.scsi_dev_construct("s0")) == errno.EEXIST
        assert await error_of(vhost.scsi_dev_construct("s1", "0x0")) == errno.EINVAL


@asynccontextmanager
async def scsi() -> AsyncIterator[ScsiFrontend]:
    """Run a target with a SCSI device s0, and a guest on it: functions run in the reactor."""
    async with target() as sockets:
        await vhost.scsi_dev_construct("s0")
        front = await asyncio.to_thread(lambda: ScsiFrontend.connect(sockets / "s0"))
        try:
            yield front
        finally:
            await asyncio.to_thread(front.close)


async def test_scsi_dev_add_tgt() -> None:
    async with scsi() as front:
        call = vhost.call_external_event
        assert await call("s0", external.add_target, [-1, "M0"]) == 0
        assert await call("s0", external.add_target, [7, "M0"]) == 7
        assert await call("s0", external.add_target, [7, "M0"]) == -errno.EEXIST
        assert await call("s0", external.add_target, [256, "M0"]) == -errno.EINVAL
        assert await call("s0", external.add_target, [1, "none"]) == -errno.ENODEV
        answer = await asyncio.to_thread(lambda: front.command(7, 0, INQUIRY, into=96))
        assert answer.data[8:32] == b"VHOST   Malloc disk     "


async def test_scsi_dev_get_tgt() -> None:
    async with scsi():
        call = vhost.call_external_event
        assert await call("s0", external.get_target, 2) is None
        await call("s0", external.add_target, [2, "M0"])
        found = await call("s0", external.get_target, 2)
        assert (found["scsi_dev_num"], found["target_name"]) == (2, "Target 2")
        assert found["luns"] == [{"id": 0, "bdev_name": "M0"}]
        assert await call("b0", external.get_target, 2) == -errno.EINVAL


async def test_scsi_dev_remove_tgt() -> None:
    """The callback comes when the target is gone."""
    async with scsi() as front:
        call = vhost.call_external_event
        await call("s0", external.add_target, [2, "M0"])
        assert await call("s0", external.remove_target, 2) == [0, ["s0", 2, None]]
        assert await call("s0", external.remove_target, 2) == [-errno.EBUSY, []]
        answer = await asyncio.to_thread(lambda: front.command(2, 0, INQUIRY, into=96))
        assert answer.response == Response.BAD_TARGET


def test_the_package_has_all_that_the_module_has() -> None:
    assert sorted(vhost._API) == sorted(vhost.api.__all__)
    with pytest.raises(AttributeError):
        vhost.no_such_function  # noqa: B018
