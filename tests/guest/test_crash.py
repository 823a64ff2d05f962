"""What must not be lost, or noticed, when something dies under a guest's load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.guest.guest import Guest
from tests.guest.load import Load
from tests.guest.servers import ClusterServer, DiskServer
from tests.support.cluster import Cluster

pytestmark = pytest.mark.guest


def test_guest_that_was_killed_under_load_is_followed_by_another(
    server: DiskServer, tmp_path: Path
) -> None:
    disk = server.add_disk("shared", server.kinds[-1])
    with Guest(tmp_path, [disk.socket], queues=2, cpus=2, packed=server.packed) as guest:
        guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=4")
        guest.run("dd if=/tmp/data of=/dev/vda bs=1M seek=32 conv=fsync")
        wanted = guest.run("sha256sum </tmp/data").output
        Load(guest, "/dev/vda").advance(500)
        guest.kill()

    server.check_alive()
    with Guest(tmp_path, [disk.socket], queues=2, cpus=2, packed=server.packed) as guest:
        guest.run("dd if=/dev/vda of=/tmp/data bs=1M skip=32 count=4 iflag=direct")
        assert guest.run("sha256sum </tmp/data").output == wanted
        load = Load(guest, "/dev/vda")
        load.advance(500)
        result = load.stop()
        assert result.status == 0, result.output
        guest.shutdown()
    server.check_alive()


@pytest.mark.parametrize("cluster_server", [False, True], ids=["split", "packed"], indirect=True)
def test_guest_does_not_notice_that_reactors_are_killed_under_its_load(
    cluster_server: ClusterServer, cpus: list[int], tmp_path: Path
) -> None:
    places = (cpus[0], cpus[:2][-1])
    disks = [
        cluster_server.add_disk(f"{kind}-disk", kind, cpu=cpu)
        for kind, cpu in zip(cluster_server.kinds, places, strict=True)
    ]
    sockets = [disk.socket for disk in disks]
    with Guest(tmp_path, sockets, queues=2, cpus=2, packed=cluster_server.packed) as guest:
        for device in ("/dev/vda", "/dev/vdb"):
            guest.run(f"dd if=/bin/busybox of={device} bs=64k seek=512 conv=fsync")
        loads = [Load(guest, device) for device in ("/dev/vda", "/dev/vdb")]
        for cpu in (*places, *places):
            for load in loads:
                load.advance(200)
            cluster_server.cluster.kill_reactor(cpu)

        for load in loads:
            load.advance(200)
        for load in loads:
            # The threads of the load verify what was in flight, too: nothing failed, nothing hangs.
            result = load.stop()
            assert result.status == 0, result.output
        for device in ("/dev/vda", "/dev/vdb"):
            guest.run(
                f"dd if={device} bs=64k skip=512 iflag=direct | cmp -n $(stat -c %s "
                "/bin/busybox) - /bin/busybox"
            )
            load = Load(guest, device)
            load.advance(500)
            result = load.stop()
            assert result.status == 0, result.output
        guest.shutdown()


@pytest.mark.parametrize("cluster_server", [True], ids=["packed"], indirect=True)
def test_guest_does_not_notice_that_the_control_process_is_killed_and_upgraded_under_its_load(
    cluster_server: ClusterServer, tmp_path: Path
) -> None:
    cluster = cluster_server.cluster
    disks = [cluster_server.add_disk(f"{kind}-disk", kind) for kind in cluster_server.kinds]
    sockets = [disk.socket for disk in disks]
    with Guest(tmp_path, sockets, queues=2, cpus=2, packed=cluster_server.packed) as guest:
        loads = [Load(guest, device) for device in ("/dev/vda", "/dev/vdb")]

        def advance() -> None:
            for load in loads:
                load.advance(200)

        advance()
        cluster.kill_control()
        advance()
        cluster.restart()
        advance()
        cluster_server.check_alive()  # the same reactors
        cluster.upgrade()
        advance()
        for load in loads:
            result = load.stop()
            assert result.status == 0, result.output
        guest.shutdown()


@pytest.mark.parametrize("cluster_server", [False, True], ids=["split", "packed"], indirect=True)
def test_guest_that_reconnects_goes_on_after_everything_was_killed_under_its_load(
    cluster_server: ClusterServer, tmp_path: Path
) -> None:
    cluster, packed = cluster_server.cluster, cluster_server.packed
    disk = cluster_server.add_disk("disk", "file")
    with Guest(
        tmp_path, [disk.socket], queues=2, cpus=2, packed=packed, chardev_options=",reconnect=1"
    ) as guest:
        load = Load(guest, "/dev/vda")
        load.advance(200)
        (before,) = sessions(cluster)
        assert "INFLIGHT_SHMFD" in before["protocol_feature_names"]
        cluster.kill()
        answered = load.requests()
        cluster.restart()
        load.advance(200)
        (after,) = sessions(cluster)
        assert after["peer_pid"] == before["peer_pid"]
        # What was in flight then is still owned by the load's threads, which verify it.
        result = load.stop()
        assert result.status == 0, result.output
        assert load.requests() > answered
        guest.shutdown()


def sessions(cluster: Cluster) -> list[dict[str, Any]]:
    (controller,) = cluster.rpc("vhost_get_controllers")
    listed: list[dict[str, Any]] = controller["sessions"]
    return listed


def test_deleting_a_bdev_in_use_fails_its_requests_and_nothing_else(
    cluster_server: ClusterServer, tmp_path: Path
) -> None:
    names = {"malloc": "bdev_malloc_delete", "file": "bdev_uring_delete"}
    disks = [cluster_server.add_disk(f"doomed-{kind}", kind) for kind in names]
    disks.append(cluster_server.add_disk("survivor", "malloc"))
    with Guest(tmp_path, [disk.socket for disk in disks]) as guest:
        doomed = [Load(guest, device) for device in ("/dev/vda", "/dev/vdb")]
        survivor = Load(guest, "/dev/vdc")
        for load, (kind, method) in zip(doomed, names.items(), strict=True):
            load.advance(200)
            cluster_server.cluster.rpc(method, name=f"doomed-{kind}")

        for load in doomed:
            result = load.wait()
            assert result.status == 1
            assert "Input/output error" in result.output
            read = f"dd if={load.device} of=/dev/null bs=4k count=1 iflag=direct"
            assert guest.run(read, status=None).status != 0
        survivor.advance(200)
        result = survivor.stop()
        assert result.status == 0, result.output
        cluster_server.check_alive()
        guest.shutdown()
