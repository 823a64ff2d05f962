"""The configuration on disk: of this moment, and only once there is one."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reactor.ledger import Ledger
from reactor.operations import Operations, operation
from reactor.saved import Calls, Configured, PartKey, SavedConfig, read_saved


class Things(Configured):
    """Operations that change something, ask for it, or tell of it."""

    name = "things"
    depends_on = ()

    def __init__(self) -> None:
        self.names: list[str] = []
        self.asked = 0

    def parts(self) -> Iterator[tuple[PartKey, Calls]]:
        """See Configured."""
        yield PartKey(2, ""), [{"method": "thing_end", "params": {}}]
        for name in self.names:
            yield PartKey(1, name), self.part(PartKey(1, name))

    def part(self, key: PartKey) -> Calls:
        """See Configured."""
        self.asked += 1
        if key.name not in self.names:
            return []
        return [{"method": "thing_create", "params": {"name": key.name}}]

    @operation
    def thing_create(self, name: str) -> None:
        """Add one, or fail after having done so."""
        self.names.append(name)
        if name == "bad":
            raise OSError(5, "failed")

    @operation(touches=True)
    def thing_add(self, name: str) -> None:
        """Add one, and say so."""
        self.names.append(name)
        self.touched(PartKey(1, name))

    @operation(touches=True)
    def thing_remove(self, name: str) -> None:
        """Remove one, and say so."""
        self.names.remove(name)
        self.touched(PartKey(1, name))

    @operation
    async def thing_get_all(self) -> list[str]:
        """Return all."""
        return self.names

    @operation(internal=True)
    def thing_broke(self) -> None:
        """Take note."""


class Bench:
    """Things, their operations, and what is saved of them."""

    def __init__(self, folder: Path) -> None:
        self.things, self.operations = Things(), Operations()
        self.operations.add(self.things)
        self.config = SavedConfig(folder, [self.things])
        self.operations.saved = self.config

    async def call(self, op: str, **args: Any) -> None:
        """Run an operation until it would be answered."""
        try:
            await self.operations.invoke(op, args)
        finally:
            await self.operations.kept(op)

    def saved(self) -> list[str]:
        """Return the names that are saved; what comes last is last."""
        (section,) = read_saved(self.config.path)["subsystems"]
        *calls, last = section["config"]
        assert last["method"] == "thing_end"
        return [call["params"]["name"] for call in calls]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "run")
    made.config.path.parent.mkdir()
    yield made
    made.config.close()


async def test_it_is_saved_before_an_operation_is_answered(bench: Bench) -> None:
    await bench.call("thing_create", name="a")
    assert not bench.config.path.exists()  # it was only being built
    bench.config.start()
    await bench.call("thing_create", name="b")
    assert bench.saved() == ["a", "b"]
    with pytest.raises(OSError, match="failed"):
        await bench.call("thing_create", name="bad")
    assert bench.saved() == ["a", "b", "bad"]
    bench.config.close()
    assert os.listdir(bench.config.path.parent) == []


async def test_after_an_operation_that_tells_what_it_changes_nothing_else_is_looked_at(
    bench: Bench,
) -> None:
    bench.things.names = [f"t{number}" for number in range(100)]
    bench.config.start()
    bench.things.asked = 0
    await bench.call("thing_add", name="new")
    assert bench.saved() == [*bench.things.names]
    await bench.call("thing_remove", name="t5")
    assert bench.saved() == [*bench.things.names]
    assert bench.things.asked == 2


async def test_an_operation_that_only_asks_writes_nothing(bench: Bench) -> None:
    bench.config.start()
    bench.things.names.append("unnoticed")
    await bench.call("thing_get_all")
    await bench.call("thing_broke")
    assert bench.saved() == []
    await bench.call("thing_create", name="a")
    assert bench.saved() == ["unnoticed", "a"]


async def test_what_comes_while_one_change_is_written_is_written_together(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.config.start()
    commits = []
    commit = Ledger.commit

    def count(self: Ledger, changes: Any, *, complete: bool = False) -> None:
        commits.append(list(changes))
        commit(self, changes, complete=complete)

    monkeypatch.setattr(Ledger, "commit", count)
    names = [f"t{number}" for number in range(50)]
    await asyncio.gather(*(bench.call("thing_add", name=name) for name in names))
    assert bench.saved() == names
    assert len(commits) == 1
    assert len(commits[0]) == 50


async def test_each_is_answered_when_its_own_change_is_on_disk(bench: Bench) -> None:
    bench.config.start()

    async def add(name: str, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await bench.call("thing_add", name=name)
        assert name in bench.saved()

    await asyncio.gather(*(add(f"t{number}", number) for number in range(20)))


async def test_an_operation_is_answered_even_if_nothing_can_be_saved(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.config.start()
    bench.config.path.unlink()
    bench.config.path.parent.rmdir()
    await bench.call("thing_add", name="a")
    assert "the configuration could not be saved" in caplog.text
    bench.config.path.parent.mkdir()
    await bench.call("thing_add", name="b")
    assert bench.saved() == ["a", "b"]


async def test_who_insists_is_told_that_nothing_can_be_saved(bench: Bench) -> None:
    bench.config.start()
    bench.config.path.unlink()
    bench.config.path.parent.rmdir()
    with pytest.raises(FileNotFoundError):
        bench.config.store()
    bench.config.path.parent.mkdir()
    bench.things.names.append("a")
    bench.config.store()
    assert bench.saved() == ["a"]


def test_what_the_program_before_this_one_has_written_is_read(tmp_path: Path) -> None:
    document = {"subsystems": [{"subsystem": "bdev", "config": [{"method": "m", "params": {}}]}]}
    (tmp_path / "config").write_text(json.dumps(document, indent=2))
    assert read_saved(tmp_path / "config") == document


@pytest.mark.parametrize("text", ["{", "[1]\n", "text\n"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(ValueError, match=r"/config is damaged: "):
        read_saved(tmp_path / "config")
