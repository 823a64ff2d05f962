"""What depends on the guest's driver: legacy drivers, and the cache mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.guest.load import Load
from tests.guest.servers import ClusterServer

pytestmark = pytest.mark.guest

VERSION_1 = 1 << 32


def features(server: ClusterServer) -> int:
    """Return what the driver of the only disk has negotiated."""
    (controller,) = server.cluster.rpc("vhost_get_controllers")
    (session,) = controller["sessions"]
    return int(session["features"], 16)


def test_legacy_driver_works(cluster_server: ClusterServer, tmp_path: Path) -> None:
    disk = cluster_server.add_disk("old", "malloc")
    options = "disable-legacy=off,disable-modern=on"
    with Guest(tmp_path, [disk.socket], device_options=options) as guest:
        assert not features(cluster_server) & VERSION_1
        load = Load(guest, "/dev/vda")
        load.advance(2000)
        assert load.stop().status == 0
        guest.reboot()
        guest.run("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct")
        cluster_server.check_alive()
        guest.shutdown()


def test_guest_switches_the_cache_mode(cluster_server: ClusterServer, tmp_path: Path) -> None:
    disk = cluster_server.add_disk("wce", "file")
    with Guest(tmp_path, [disk.socket]) as guest:
        load = Load(guest, "/dev/vda")
        for mode in ("write through", "write back"):
            assert features(cluster_server) & VERSION_1
            guest.run(f"echo {mode} >/sys/block/vda/cache_type")
            assert guest.run("cat /sys/block/vda/cache_type").output.strip() == mode
            load.advance(1000)
        assert load.stop().status == 0
        cluster_server.check_alive()
        guest.shutdown()
