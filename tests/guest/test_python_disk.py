"""Disks that Python classes are, in a guest: one that is generated, one that keeps its data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import psutil
import pytest

from tests.conftest import StartCluster
from tests.guest.guest import Guest

pytestmark = pytest.mark.guest

BLOCKS = 32768


def test_a_guest_uses_what_python_generates_and_keeps(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    """A file system is made, filled, and whole after reactor and device have been killed."""
    contents = tmp_path / "contents"
    contents.touch()
    cluster = start_cluster("--load", "tests.support.devices")
    cluster.rpc("bdev_python_create", name="G", device="ramp", args={"blocks": 4096})
    keep = {"blocks": BLOCKS, "path": str(contents)}
    cluster.rpc("bdev_python_create", name="K", device="memory", args=keep)
    for name in "GK":
        cluster.rpc("vhost_create_blk_controller", ctrlr=name, dev_name=name, readonly=name == "G")
    generated = b"".join(bytes([block % 251]) * 512 for block in range(4096))

    with Guest(tmp_path, [cluster.socket(name) for name in "GK"]) as guest:
        seen = guest.run("sha256sum /dev/vda").output.split()[0]
        assert seen == hashlib.sha256(generated).hexdigest()
        assert guest.run("cat /sys/block/vda/ro /sys/block/vdb/ro").output.split() == ["1", "0"]
        guest.run("/sbin/mke2fs -q -t ext4 /dev/vdb && mkdir -p /mnt && mount /dev/vdb /mnt")
        guest.run("dd if=/dev/urandom of=/mnt/file bs=64k count=40 && sync")
        before = guest.run("sha256sum </mnt/file").output
        (cpu,) = cluster.reactors()
        cluster.kill_reactor(cpu)
        (entry,) = cluster.rpc("bdev_get_bdevs", name="K")
        psutil.Process(entry["driver_specific"]["python"]["pid"]).kill()
        guest.run("echo more >>/mnt/other && umount /mnt && echo 3 >/proc/sys/vm/drop_caches")
        guest.run("mount /dev/vdb /mnt")
        assert guest.run("sha256sum </mnt/file").output == before
        assert guest.run("cat /mnt/other").output.split() == ["more"]
        guest.run("umount /mnt")
        guest.shutdown()
    for name in "GK":
        cluster.rpc("vhost_delete_controller", ctrlr=name)
        cluster.rpc("bdev_python_delete", name=name)
