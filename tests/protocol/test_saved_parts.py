"""What is saved after each operation is the whole configuration, however little was looked at."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from reactor.errors import OperationError
from reactor.saved import Calls, SavedConfig, read_saved
from tests.support.stack import Stack, stack


class Saving:
    """A target whose configuration is saved, and compared with what was saved."""

    def __init__(self, target: Stack, folder: Path) -> None:
        self.target = target
        self.subsystems = (target.registry, target.vhost, target.scsi)
        self.config = SavedConfig(folder, self.subsystems)
        target.operations.saved = self.config
        target.management.save = self.config.store
        self.config.start()

    async def call(self, op: str, **args: Any) -> Any:
        """Run an operation until it would be answered; what is saved is what there is."""
        try:
            return await self.target.call(op, **args)
        finally:
            await self.target.operations.kept(op)
            self.check(f"{op} {args}")

    def check(self, why: str) -> None:
        """Compare; controllers may have any order."""
        saved = read_saved(self.config.path)["subsystems"]
        found = {section["subsystem"]: section["config"] for section in saved}
        for subsystem in self.subsystems:
            calls = found.get(subsystem.name, [])
            assert by_controller(calls) == by_controller(subsystem.config()), why


def by_controller(calls: Calls) -> Calls:
    return sorted(calls, key=lambda call: call["params"].get("ctrlr", ""))


@asynccontextmanager
async def saving(folder: Path) -> AsyncIterator[Saving]:
    async with stack() as target:
        made = Saving(target, folder)
        yield made
        made.config.close()


def disk(name: str, num_blocks: int = 2048) -> dict[str, Any]:
    return {"name": name, "num_blocks": num_blocks, "block_size": 512}


async def test_what_is_deleted_takes_with_it_what_was_set_of_it(tmp_path: Path) -> None:
    async with saving(tmp_path) as saved:
        await saved.call("bdev_null_create", **disk("N"))
        await saved.call("bdev_set_qos_limit", name="N", rw_ios_per_sec=1000)
        await saved.call("bdev_set_timeout", name="N", timeout_us=10**6)
        await saved.call("bdev_qos_group_create", name="g", rw_ios_per_sec=1000)
        await saved.call("bdev_qos_group_add_bdev", name="g", bdev_name="N")
        await saved.call("vhost_create_blk_controller", ctrlr="b", dev_name="N")
        await saved.call("vhost_create_scsi_controller", ctrlr="s")
        await saved.call(
            "vhost_scsi_controller_add_target", ctrlr="s", scsi_target_num=0, bdev_name="N"
        )
        await saved.call("bdev_null_delete", name="N")
        sections = read_saved(saved.config.path)["subsystems"]
        calls = [call["method"] for section in sections for call in section["config"]]
        assert calls == [
            "bdev_qos_group_create",
            "vhost_create_scsi_controller",
            "vhost_start_scsi_controller",
        ]


async def test_a_device_that_goes_away_by_itself_is_gone_with_the_next_change(
    tmp_path: Path,
) -> None:
    async with saving(tmp_path) as saved:
        for name in ("A", "B", "C"):
            await saved.call("bdev_malloc_create", **disk(name, num_blocks=8192))
        await saved.call("bdev_passthru_create", name="P", base_bdev_name="A")
        mirror = {"name": "R", "raid_level": "raid1", "base_bdevs": ["B", "C"]}
        await saved.call("bdev_raid_create", **mirror)
        await saved.target.registry.remove("A", unplug=True)
        await saved.target.registry.remove("B", unplug=True)
        await saved.call("bdev_null_create", **disk("N"))


async def test_a_name_that_is_used_again_is_that_of_another_thing(tmp_path: Path) -> None:
    async with saving(tmp_path) as saved:
        await saved.call("bdev_null_create", **disk("N"))
        await saved.call("bdev_null_create", **disk("M"))
        await saved.target.call("bdev_null_delete", name="N")  # written together with the next
        await saved.call("bdev_passthru_create", name="N", base_bdev_name="M")
        await saved.call("vhost_create_blk_controller", ctrlr="c", dev_name="N")
        await saved.target.call("vhost_delete_controller", ctrlr="c")
        await saved.call("vhost_create_scsi_controller", ctrlr="c")


@pytest.mark.parametrize("seed", range(2))
async def test_any_sequence_of_operations(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda _: None)  # takes most of the time otherwise
    chance = random.Random(seed)

    def name(prefix: str) -> str:
        return f"{prefix}{chance.randrange(2)}"

    def operations() -> list[tuple[str, dict[str, Any]]]:
        target = {"ctrlr": "s", "scsi_target_num": 0}
        return [
            ("bdev_null_create", disk(name("d"))),
            ("bdev_malloc_create", disk(name("d"))),
            ("bdev_passthru_create", {"name": name("p"), "base_bdev_name": name("d")}),
            ("bdev_split_create", {"base_bdev": name("d"), "split_count": 2}),
            ("bdev_split_delete", {"base_bdev": name("d")}),
            ("bdev_null_delete", {"name": name("d")}),
            ("bdev_malloc_delete", {"name": name("d")}),
            ("bdev_passthru_delete", {"name": name("p")}),
            ("bdev_null_resize", {"name": name("d"), "new_size": 2}),
            ("bdev_set_qos_limit", {"name": name("d"), "rw_ios_per_sec": 1000}),
            ("bdev_set_qos_limit", {"name": name("p"), "rw_ios_per_sec": 0}),
            ("bdev_set_slow_request_limit", {"name": name("d"), "limit_us": 1000}),
            ("bdev_qos_group_create", {"name": name("g"), "rw_ios_per_sec": 1000}),
            ("bdev_qos_group_add_bdev", {"name": name("g"), "bdev_name": name("d")}),
            ("bdev_qos_group_delete", {"name": name("g")}),
            ("vhost_create_blk_controller", {"ctrlr": name("c"), "dev_name": name("p")}),
            ("vhost_create_blk_controller", {"ctrlr": name("c"), "dev_name": name("d")}),
            ("vhost_create_scsi_controller", {"ctrlr": "s", "delay": chance.random() < 0.5}),
            ("vhost_start_scsi_controller", {"ctrlr": "s"}),
            ("vhost_scsi_controller_add_target", {**target, "bdev_name": name("d")}),
            ("vhost_scsi_controller_remove_target", target),
            (
                "vhost_controller_set_coalescing",
                {"ctrlr": name("c"), "delay_base_us": 10, "iops_threshold": 1000},
            ),
            ("vhost_controller_set_qos_limit", {"ctrlr": name("c"), "rw_ios_per_sec": 1000}),
            ("vhost_blk_controller_set_bdev", {"ctrlr": name("c"), "dev_name": name("d")}),
            ("vhost_delete_controller", {"ctrlr": chance.choice(["s", name("c")])}),
        ]

    done = set()
    async with saving(tmp_path) as saved:
        for _ in range(600):
            op, args = chance.choice(operations())
            with suppress(OperationError):
                await saved.call(op, **args)
                done.add(op)
    assert len(done) > 20
