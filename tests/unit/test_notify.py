"""The service manager is told, over a socket with a name or an abstract one."""

import os
import socket

import pytest

from tests.support.waiting import PATIENCE
from vhost.notify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_state_arrives(monkeypatch, tmp_path, abstract):
    path = str(tmp_path / "notify")
    address = f"@vhost-reactor-test-{os.getpid()}" if abstract else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0") if abstract else path)
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1") is True
        assert manager.recv(64) == b"READY=1"


def test_without_a_service_manager_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False


def test_a_service_manager_that_is_gone_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert notify("READY=1") is False
