"""We connect to front-ends that listen, and come back for as long as the controller is there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from reactor.errors import OperationError
from reactor.vault import NoVault
from tests.support.stack import Stack, stack
from vhost import entrance
from vhost.frontend import BlkFrontend

BLK = "vhost_create_blk_controller"
SCSI = "vhost_create_scsi_controller"


class Listening:
    """A front-end's listening socket."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(str(path))
        self.socket.listen(1)

    def accept(self) -> BlkFrontend:
        """Return a driver of the device that connects."""
        return BlkFrontend.connect(self.socket)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@asynccontextmanager
async def target() -> AsyncIterator[Stack]:
    async with stack() as made:
        await made.call("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
        yield made


async def test_a_disk_is_brought_to_a_front_end_that_listens(tmp_path: Path) -> None:
    async with target() as made:
        with Listening(tmp_path / "vm") as front:
            await made.call(BLK, ctrlr="b", dev_name="m", mode="client", path=str(tmp_path / "vm"))
            disk = await made.in_thread(front.accept)
            await made.in_thread(lambda: disk.write(0, b"x" * 512))
            assert await made.in_thread(lambda: disk.read(0, 512)) == b"x" * 512
            (controller,) = await made.call("vhost_get_controllers")
            assert (controller["socket"], controller["mode"]) == (str(tmp_path / "vm"), "client")
            await made.close(disk)


async def test_it_connects_again_when_the_front_end_has_gone(tmp_path: Path) -> None:
    async with target() as made:
        with Listening(tmp_path / "vm") as front:
            await made.call(BLK, ctrlr="b", dev_name="m", mode="client", path=str(tmp_path / "vm"))
            for _ in range(3):
                disk = await made.in_thread(front.accept)
                assert len(await made.in_thread(partial(disk.read, 0, 512))) == 512
                await made.close(disk)


async def test_it_waits_for_a_front_end_that_is_not_there_yet(tmp_path: Path) -> None:
    async with target() as made:
        path = tmp_path / "vm"
        await made.call(BLK, ctrlr="b", dev_name="m", mode="client", path=str(path))
        await asyncio.sleep(0)
        with Listening(path) as front:
            await made.close(await made.in_thread(front.accept))


async def test_a_controller_that_is_deleted_connects_no_more(tmp_path: Path) -> None:
    async with target() as made:
        with Listening(tmp_path / "vm") as front:
            await made.call(BLK, ctrlr="b", dev_name="m", mode="client", path=str(tmp_path / "vm"))
            disk = await made.in_thread(front.accept)
            await made.call("vhost_delete_controller", ctrlr="b", force=True)
            assert not disk.raw.alive()
            await made.in_thread(disk.close)
            front.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(front.socket.accept)
        assert (tmp_path / "vm").exists()  # it is not ours


async def test_it_is_saved(tmp_path: Path) -> None:
    path = str(tmp_path / "vm")
    async with target() as made:
        await made.call(BLK, ctrlr="b", dev_name="m", mode="client", path=path)
        await made.call(SCSI, ctrlr="s", mode="client", path=path)
        (blk,), (scsi, _start) = made.vhost.config(), made.scsi.config()
        for call in (blk, scsi):
            assert (call["params"]["mode"], call["params"]["path"]) == ("client", path)
            await made.call("vhost_delete_controller", ctrlr=call["params"]["ctrlr"])
            assert await made.call(call["method"], **call["params"])


async def test_where_nobody_can_listen_is_refused() -> None:
    refused = [
        ({"mode": "both"}, "mode 'both': must be server or client"),
        ({"path": "/run/vm"}, "path '/run/vm': only in mode client"),
        ({"mode": "client", "path": "vm"}, "path 'vm': must be that of a socket, from /"),
        ({"mode": "client", "path": "/a\0b"}, "must be that of a socket, from /"),
        ({"mode": "client", "path": "/" + "x" * 107}, "longer than 107 bytes"),
    ]
    async with target() as made:
        for options, text in refused:
            with pytest.raises(OperationError, match=text):
                await made.call(BLK, ctrlr="b", dev_name="m", **options)
        assert await made.call("vhost_get_controllers") == []


async def test_attempts_that_fail_become_rare_and_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        if len(delays) == 8:
            enough.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(entrance.asyncio, "sleep", sleep)
    told: list[str] = []
    connector = entrance.Connector(str(tmp_path / "vm"), lambda _: None, told.append, NoVault())
    connector.open()
    await enough.wait()
    connector.close()
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert told == [f"no front-end at {tmp_path / 'vm'} yet: No such file or directory"]
