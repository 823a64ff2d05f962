"""SPDK's own command asks a running cluster for statistics, and sets limits."""

from __future__ import annotations

import base64

from tests.support.cluster import Cluster
from tests.support.spdk import spdk
from vhost.frontend import BlkFrontend


def test_spdks_command_reads_statistics(cluster: Cluster) -> None:
    cluster.rpc("bdev_malloc_create", name="S", block_size=512, num_blocks=2048)
    cluster.rpc("vhost_create_blk_controller", ctrlr="s", dev_name="S")
    spdk(cluster, "bdev_enable_histogram", "--histogram", "--opc", "read", "S")
    spdk(cluster, "bdev_set_qd_sampling_period", "S", "2000")
    with BlkFrontend.connect(cluster.socket("s")) as front:
        for _ in range(5):
            front.read(0, 4096)
        front.write(0, bytes(512))
    (entry,) = spdk(cluster, "bdev_get_iostat", "--names", "S")["bdevs"]
    assert (entry["num_read_ops"], entry["bytes_read"]) == (5, 5 * 4096)
    assert entry["queue_depth_polling_period"] == 2000
    assert {"queue_depth", "io_time", "weighted_io_time"} <= entry.keys()
    reply = spdk(cluster, "bdev_get_histogram", "S")
    counts = memoryview(base64.b64decode(reply["histogram"])).cast("Q")
    assert len(counts) == (reply["max_range"] - reply["min_range"] + 1) << reply["granularity"]
    assert sum(counts) == 5
    borders = spdk(cluster, "bdev_get_histogram_borders", "S", "--borders", "1,60000000")
    assert borders["borders_count"][1:] == [5, 5]
    spdk(cluster, "bdev_reset_iostat", "-b", "S", "-m", "all")
    (entry,) = spdk(cluster, "bdev_get_iostat", "--names", "S")["bdevs"]
    assert entry["num_read_ops"] == 0
    spdk(cluster, "bdev_enable_histogram", "--no-histogram", "S")
    cluster.rpc("vhost_delete_controller", ctrlr="s")
    cluster.rpc("bdev_malloc_delete", name="S")


def test_spdks_command_sets_limits(cluster: Cluster) -> None:
    cluster.rpc("bdev_malloc_create", name="L", block_size=512, num_blocks=2048)
    limits = ("--rw-ios-per-sec", "20000", "--w-mbytes-per-sec", "7")
    spdk(cluster, "bdev_set_qos_limit", *limits, "L")
    (entry,) = spdk(cluster, "bdev_get_bdevs", "-b", "L")
    assert entry["assigned_rate_limits"] == {
        "rw_ios_per_sec": 20000,
        "rw_mbytes_per_sec": 0,
        "r_mbytes_per_sec": 0,
        "w_mbytes_per_sec": 7,
    }
    cluster.rpc("bdev_malloc_delete", name="L")
