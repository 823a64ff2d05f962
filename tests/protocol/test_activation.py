"""Sockets that a service manager has made: they are there before we are, and while we are not."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor import activation
from reactor.rpc_client import RpcClient
from tests.support.application import Application
from tests.support.waiting import PATIENCE
from vhost.frontend import BlkFrontend

CONFIG = {
    "subsystems": [
        {
            "subsystem": "bdev",
            "config": [
                {
                    "method": "bdev_malloc_create",
                    "params": {"name": "m", "num_blocks": 2048, "block_size": 512},
                }
            ],
        },
        {
            "subsystem": "vhost_blk",
            "config": [
                {
                    "method": "vhost_create_blk_controller",
                    "params": {"ctrlr": "disk0", "dev_name": "m"},
                }
            ],
        },
    ]
}


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(8)
    return sock


def test_front_ends_and_clients_that_came_first_are_served(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    handed = {name: listening(tmp_path / name) for name in ("disk0", "rpc.sock")}
    for turn in range(2):  # the second time after a restart
        disks: list[BlkFrontend] = []
        early = threading.Thread(
            target=lambda found=disks: found.append(BlkFrontend.connect(tmp_path / "disk0"))
        )
        early.start()
        with Application(tmp_path, "-c", config, handed=handed) as application:
            early.join()
            disks[0].write(0, bytes([turn]) * 512)
            assert disks[0].read(0, 512) == bytes([turn]) * 512
            with RpcClient(tmp_path / "rpc.sock", timeout=PATIENCE) as client:
                (controller,) = client.call("vhost_get_controllers")
            assert controller["socket"] == str(tmp_path / "disk0")
            assert f"RPC at {tmp_path / 'rpc.sock'}" in application.ready_line
            disks[0].close()
        assert (tmp_path / "disk0").exists()
        assert (tmp_path / "rpc.sock").exists()
    for sock in handed.values():
        sock.close()


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let this process be handed descriptor FIRST_FD."""
    monkeypatch.setattr(activation, "_sockets", {})
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "disk0")
    yield monkeypatch
    for sock in activation._sockets.values():
        sock.close()


def hand_over(announce: pytest.MonkeyPatch, sock: socket.socket) -> None:
    announce.setattr(activation, "FIRST_FD", os.dup(sock.fileno()))


def test_what_is_handed_over_is_known_by_its_name_and_passed_on_to_nobody(
    announce: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with listening(tmp_path / "s") as sock:
        hand_over(announce, sock)
        assert activation.take() == ["disk0"]
    found = activation.find("disk0")
    assert found is not None
    assert found.getsockname() == str(tmp_path / "s")
    assert not found.get_inheritable()
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & set(os.environ)
    assert activation.take() == []


def test_what_another_process_is_handed_is_left_alone(announce: pytest.MonkeyPatch) -> None:
    announce.setenv("LISTEN_PID", str(os.getppid()))
    announce.setattr(activation, "FIRST_FD", -1)
    assert activation.take() == []


@pytest.mark.parametrize("kind", ["datagram", "connected", "file"])
def test_what_cannot_be_listened_on_ends_the_start(
    announce: pytest.MonkeyPatch, kind: str, tmp_path: Path
) -> None:
    if kind == "file":
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    else:
        how = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, how)
        theirs.close()
        fd = ours.detach()
    announce.setattr(activation, "FIRST_FD", fd)
    with pytest.raises(OSError, match="the service manager's socket disk0"):
        activation.take()
    if kind == "file":
        os.close(fd)


def test_a_name_that_comes_twice_ends_the_start(
    announce: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with listening(tmp_path / "s") as sock:
        hand_over(announce, sock)
        announce.setenv("LISTEN_FDS", "2")
        announce.setenv("LISTEN_FDNAMES", "disk0:disk0")
        with pytest.raises(OSError, match="two sockets of the service manager"):
            activation.take()
