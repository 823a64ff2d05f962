"""The configuration on disk: whole, of this moment, and only once there is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from reactor.operations import Operations, operation
from reactor.saved import SavedConfig, write_atomically


class Things:
    """Operations that change something, ask for it, or tell of it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @operation
    def thing_create(self, name: str) -> None:
        """Add one, or fail after having done so."""
        self.names.append(name)
        if name == "bad":
            raise OSError(5, "failed")

    @operation
    async def thing_get_all(self) -> list[str]:
        """Return all."""
        return self.names

    @operation(internal=True)
    def thing_broke(self) -> None:
        """Take note."""


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SavedConfig, Operations, Things]:
    things, operations = Things(), Operations()
    operations.add(things)
    made = SavedConfig(tmp_path, lambda: {"names": things.names})
    operations.on_change = made.save
    return made, operations, things


async def test_it_is_saved_before_an_operation_is_answered(
    saved: tuple[SavedConfig, Operations, Things],
) -> None:
    config, operations, _ = saved
    await operations.invoke("thing_create", {"name": "a"})
    assert not config.path.exists()  # it was only being built
    config.start()
    await operations.invoke("thing_create", {"name": "b"})
    assert json.loads(config.path.read_text()) == {"names": ["a", "b"]}
    with pytest.raises(OSError, match="failed"):
        await operations.invoke("thing_create", {"name": "bad"})
    assert json.loads(config.path.read_text()) == {"names": ["a", "b", "bad"]}
    config.close()
    assert os.listdir(config.path.parent) == []


async def test_only_a_change_is_written(saved: tuple[SavedConfig, Operations, Things]) -> None:
    config, operations, things = saved
    config.start()
    inode = config.path.stat().st_ino
    things.names.append("unnoticed")
    await operations.invoke("thing_get_all")
    await operations.invoke("thing_broke")
    assert config.path.stat().st_ino == inode
    await operations.invoke("thing_create", {"name": "a"})
    assert json.loads(config.path.read_text()) == {"names": ["unnoticed", "a"]}


async def test_an_operation_is_answered_even_if_nothing_can_be_saved(
    saved: tuple[SavedConfig, Operations, Things], caplog: pytest.LogCaptureFixture
) -> None:
    config, operations, _ = saved
    config.start()
    config.path.unlink()
    config.path.parent.rmdir()
    await operations.invoke("thing_create", {"name": "a"})
    assert "the configuration could not be saved" in caplog.text


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def fail(_: int) -> Any:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600
