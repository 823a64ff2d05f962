"""SPDK's own command makes a mirror in a running cluster."""

from __future__ import annotations

from tests.support.cluster import Cluster
from tests.support.spdk import spdk


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
