"""What docs/bdev.md says to type, and SPDK's own command, against a running cluster."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import ROOT, Cluster
from vhost.cli import parse_arguments

SPDK_RPC = Path(sys.executable).parent / "spdk-rpc"


def example(title: str, folder: Path) -> list[list[str]]:
    """Return the commands of a section of docs/bdev.md, on files in ``folder``."""
    text = (ROOT / "docs" / "bdev.md").read_text().split(f"### {title}:")[1].split("\n### ")[0]
    lines = text.partition("    ")[2].split("\n\n")[0].splitlines()
    return [shlex.split(line.replace("/tmp/", f"{folder}/")) for line in lines]


def run(cluster: Cluster, words: list[str]) -> None:
    """Run a line: ``vhost-reactor rpc METHOD KEY=VALUE ...``, or another command."""
    if words[:2] != ["vhost-reactor", "rpc"]:
        subprocess.run(words, check=True)
        return
    cluster.rpc(words[2], **parse_arguments(tuple(words[3:])))


# What an example does not delete.
LEFT = {"Raid1": {"L0", "L1", "L2"}, "Cow": {"G0", "C1", "C1.overlay"}}


@pytest.mark.parametrize("title", LEFT)
def test_an_example_works_when_it_is_pasted(title: str, cluster: Cluster, short_path: Path) -> None:
    commands = example(title, short_path)
    assert len(commands) > 7
    for words in commands:
        run(cluster, words)
    names = {bdev["name"] for bdev in cluster.rpc("bdev_get_bdevs")}
    assert names == LEFT[title]


def spdk(cluster: Cluster, *words: str) -> Any:
    command = [str(SPDK_RPC), "-s", str(cluster.rpc_socket), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout.strip().startswith(("[", "{")) else done.stdout


def test_spdks_command_makes_a_mirror_and_changes_its_legs(cluster: Cluster) -> None:
    for name in ("A", "B", "C"):
        cluster.rpc("bdev_malloc_create", name=name, block_size=512, num_blocks=16384)
    spdk(cluster, "bdev_raid_create", "-n", "R", "-r", "raid1", "-b", "A B")
    spdk(cluster, "bdev_raid_remove_base_bdev", "A")
    (degraded,) = spdk(cluster, "bdev_raid_get_bdevs", "online")
    assert degraded["num_base_bdevs_operational"] == 1
    assert degraded["base_bdevs_list"][0]["name"] is None
    spdk(cluster, "bdev_raid_add_base_bdev", "R", "C")
    (rebuilt,) = spdk(cluster, "bdev_raid_get_bdevs", "all")
    assert [leg["name"] for leg in rebuilt["base_bdevs_list"]] == ["C", "B"]
    assert (rebuilt["raid_level"], rebuilt["state"]) == ("raid1", "online")
    spdk(cluster, "bdev_raid_delete", "R")
