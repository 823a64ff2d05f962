"""What a running cluster tells of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from reactor.client import Client
from tests.support.cluster import Cluster
from tests.support.waiting import PATIENCE
from vhost.frontend import BlkFrontend
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.messages import U64, ProtocolFeature, Request


def watch(cluster: Cluster, count: int, *options: str) -> list[dict[str, Any]]:
    """Return what ``vhost-reactor events`` prints."""
    command = [sys.executable, "-m", "vhost.cli", "events", "--run-dir", str(cluster.run_dir)]
    command += ["--json", "--since", "0", "--count", str(count), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_life_of_a_disk_is_told(cluster: Cluster) -> None:
    cluster.rpc("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="b", dev_name="m")
    with BlkFrontend.connect(cluster.socket("b")):
        cluster.rpc("bdev_malloc_delete", name="m")
    told = watch(cluster, 6)
    assert [(one["type"], one["ctx"]) for one in told] == [
        ("bdev_register", "m"),
        ("vhost_connect", "b"),
        ("vhost_features", "b"),
        ("vhost_bdev_removed", "b"),
        ("bdev_unregister", "m"),
        ("vhost_disconnect", "b"),
    ]
    assert [one["id"] for one in told] == list(range(6))
    assert cluster.rpc("notify_get_notifications", id=1, max=2) == told[1:3]
    assert "vhost_connect" in cluster.rpc("notify_get_types")


def test_the_death_of_a_reactor_and_its_recovery_are_told(cluster: Cluster) -> None:
    (cpu,) = cluster.reactors()
    cluster.kill_reactor(cpu)
    lost, back = watch(cluster, 2, "--type", "reactor_lost", "--type", "reactor_recovered")
    assert (lost["type"], back["type"]) == ("reactor_lost", "reactor_recovered")
    assert lost["ctx"] == back["ctx"] == f"reactor-{cpu}"
    assert back["details"]["pid"] == cluster.reactors()[cpu]


RESETS = ProtocolFeature.STATUS | ProtocolFeature.RESET_DEVICE


def test_resets_of_a_device_in_use_are_told(cluster: Cluster) -> None:
    cluster.rpc("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="b", dev_name="m")
    with BlkFrontend.connect(
        cluster.socket("b"), protocol_features=WANTED_PROTOCOL | RESETS
    ) as disk:
        disk.raw.tell(Request.SET_STATUS, U64(0))
        disk.raw.tell(Request.SET_STATUS, U64(0))  # nothing is in use
        disk.start()
        disk.raw.tell(Request.RESET_DEVICE)
        disk.start()
        disk.raw.tell(Request.RESET_OWNER)
        told = watch(cluster, 3, "--type", "vhost_reset")
    assert [one["details"]["by"] for one in told] == ["SET_STATUS", "RESET_DEVICE", "RESET_OWNER"]
    assert {one["ctx"] for one in told} == {"b"}


def test_another_size_and_a_broken_queue_are_told(cluster: Cluster) -> None:
    cluster.rpc("bdev_null_create", name="n", num_blocks=2048, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="b", dev_name="n")
    with BlkFrontend.connect(cluster.socket("b")) as disk:
        cluster.rpc("bdev_null_resize", name="n", new_size=2)
        disk.queues[0].write_descriptor(0, 0, 16)  # outside of memory
        disk.queues[0].add_head(0)
        disk.queues[0].publish()
        resized, broken = watch(cluster, 2, "--type", "bdev_resize", "--type", "vhost_queue_broken")
    assert (resized["ctx"], resized["details"]) == ("n", {"num_blocks": 4096})
    assert (broken["ctx"], broken["details"]["queue"]) == ("b", 0)


def test_events_reach_the_log_too(cluster: Cluster) -> None:
    cluster.rpc("bdev_null_create", name="n", num_blocks=8, block_size=512)
    with Client(cluster.run_dir) as client:
        (told,) = client.call("control", "notify_get_notifications")
    assert told["details"] == {"kind": "null"}
