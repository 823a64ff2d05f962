"""SPDK's own command makes a mirror in a running cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster

SPDK_RPC = Path(sys.executable).parent / "spdk-rpc"


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
