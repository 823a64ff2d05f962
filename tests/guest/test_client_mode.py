"""A virtual machine that listens, and whose disk comes to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.guest.servers import ClusterServer
from tests.support.cluster import Cluster

pytestmark = pytest.mark.guest


def reads_back(directory: Path, socket: Path) -> None:
    """Start a machine that listens at ``socket``, use its disk, and end it."""
    with Guest(directory, [socket], chardev_options=",server=on,wait=off") as guest:
        guest.run("dd if=/bin/busybox of=/dev/vda bs=64k conv=fsync")
        guest.run(
            "dd if=/dev/vda bs=64k iflag=direct | cmp -n $(stat -c %s /bin/busybox) - /bin/busybox"
        )
        guest.shutdown()


def test_a_disk_comes_to_each_machine_that_listens_there(
    cluster_server: ClusterServer, tmp_path: Path
) -> None:
    cluster: Cluster = cluster_server.cluster
    socket = cluster.socket_dir / "machine"
    cluster.rpc("bdev_malloc_create", name="m", num_blocks=16384, block_size=512)
    cluster.rpc(
        "vhost_create_blk_controller", ctrlr="c", dev_name="m", mode="client", path=str(socket)
    )
    for _ in range(2):
        reads_back(tmp_path, socket)
    cluster.rpc("vhost_delete_controller", ctrlr="c")
