"""A guest whose disk is behind a virtual IOMMU: every address in its rings has to be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.guest.load import Load
from tests.guest.servers import ClusterServer

pytestmark = pytest.mark.guest

# The device needs a port of its own to be one that has ATS: without it QEMU 7.2 does not tell all
# that the guest's kernel invalidates (docs/vhost-user.md, "Behind an IOMMU").
DEVICES = ["-device", "intel-iommu,device-iotlb=on,intremap=off", "-device", "pcie-root-port,id=rp"]
OPTIONS = "iommu_platform=on,ats=on,disable-legacy=on,bus=rp,addr=0x0"


def test_guest_with_an_iommu_reads_what_it_wrote_across_a_crash(
    cluster_server: ClusterServer, tmp_path: Path
) -> None:
    disk = cluster_server.add_disk("translated", "file")
    with Guest(
        tmp_path,
        [disk.socket],
        machine="q35",
        devices=DEVICES,
        device_options=OPTIONS,
        parameters="intel_iommu=on iommu.passthrough=0",
    ) as guest:
        (controller,) = cluster_server.cluster.rpc("vhost_get_controllers")
        assert "ACCESS_PLATFORM" in controller["sessions"][0]["feature_names"]
        load = Load(guest, "/dev/vda", blocks=256)
        load.advance(60)
        cluster_server.cluster.kill_reactor(min(cluster_server.cluster.reactors()))
        load.advance(60)
        result = load.stop()
        assert result.status == 0, result.output
        guest.shutdown()
