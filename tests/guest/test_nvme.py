"""NVMe drives through VFIO, in an emulated machine: the kernel's own driver is the judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.nvme_guest import LOG, MIB, RUN, NvmeGuest, digest, pattern

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def machine(module_path: Path) -> Iterator[NvmeGuest]:
    with NvmeGuest(module_path) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(machine: NvmeGuest) -> Iterator[NvmeGuest]:
    """A cluster on two processors, which must end cleanly."""
    machine.start_cluster()
    yield machine
    ended = machine.stop_cluster()
    assert ended.status == 0, ended.output
    assert "Traceback" not in ended.output, ended.output


@pytest.fixture
def drive(cluster: NvmeGuest) -> Iterator[NvmeGuest]:
    """The first drive, attached as Nvme0; the kernel has it again afterwards."""
    machine = cluster
    machine.inside("write", "/dev/nvme0n1", 0, 2 * MIB, 1)
    machine.inside("write", "/dev/nvme0n2", 0, 2 * MIB, 4)
    assert "vfio-pci (it had nvme)" in machine.ours(f"nvme bind {machine.FIRST}").output
    names = machine.rpc(
        "bdev_nvme_attach_controller", name="Nvme0", trtype="PCIe", traddr=machine.FIRST
    )
    assert names == ["Nvme0n1", "Nvme0n2"]
    yield machine
    for controller in machine.rpc("vhost_get_controllers"):
        machine.rpc("vhost_delete_controller", ctrlr=controller["ctrlr"])
    machine.rpc("bdev_nvme_detach_controller", name="Nvme0")
    machine.unbind(machine.FIRST, "/dev/nvme0n1", "/dev/nvme0n2")


def test_data_goes_from_the_kernel_to_us_and_back(drive: NvmeGuest) -> None:
    machine = drive
    blk, scsi = machine.serve("disk1", "Nvme0n1"), machine.serve_scsi("disk2", "Nvme0n2")
    assert machine.inside("digest", blk, 0, 2 * MIB) == digest(pattern(2 * MIB, 1))
    machine.inside("write", blk, 4 * MIB, 2 * MIB, 2)
    machine.inside("discard", blk, 0, MIB)
    machine.inside("zeroes", blk, MIB, MIB // 2)
    assert machine.inside("digest", blk, 4 * MIB, 2 * MIB) == digest(pattern(2 * MIB, 2))

    assert machine.inside("verify", scsi, 0, 2 * MIB, 4) == "as written"
    assert machine.inside("digest", scsi, 0, 2 * MIB) == digest(pattern(2 * MIB, 4))
    machine.inside("write", scsi, 8 * MIB + 512, MIB, 3)
    machine.inside("discard", scsi, 0, MIB)
    machine.inside("zeroes", scsi, MIB, MIB // 2)
    assert machine.inside("verify", scsi, 8 * MIB + 512, MIB, 3) == "as written"

    health = machine.rpc("bdev_nvme_get_controller_health_info", name="Nvme0")
    assert health["serial_number"] == "TEST0"
    (device,) = machine.rpc("framework_get_pci_devices")
    assert device["address"] == machine.FIRST
    assert bytes.fromhex(device["config_space"])[8:12][1:] == b"\x02\x08\x01", "the class of NVMe"

    for controller in ("disk1", "disk2"):
        machine.rpc("vhost_delete_controller", ctrlr=controller)
    machine.rpc("bdev_nvme_detach_controller", name="Nvme0")
    machine.unbind(machine.FIRST, "/dev/nvme0n1", "/dev/nvme0n2")
    for disk, image, before, at, now, size in (
        ("/dev/nvme0n1", machine.images[0], 1, 4 * MIB, 2, 2 * MIB),
        ("/dev/nvme0n2", machine.images[1], 4, 8 * MIB + 512, 3, MIB),
    ):
        assert machine.inside("digest", disk, at, size) == digest(pattern(size, now))
        expected = bytes(MIB // 2) + pattern(2 * MIB, before)[MIB + MIB // 2 :]
        assert machine.inside("digest", disk, MIB, MIB) == digest(expected)
        contents = image.read_bytes()
        assert contents[at : at + size] == pattern(size, now), "and so says the drive itself"
        assert not any(contents[:MIB]), "what was discarded is gone"

    machine.ours(f"nvme bind {machine.FIRST}")  # as the fixture expects it
    machine.rpc("bdev_nvme_attach_controller", name="Nvme0", trtype="PCIe", traddr=machine.FIRST)


def test_resets_and_a_killed_reactor_under_verified_load_on_two_reactors(drive: NvmeGuest) -> None:
    machine = drive
    socket = machine.serve("disk", "Nvme0n1")
    machine.start_ours(
        f"io {socket} --rw randrw --iodepth 8 --queues 2 --runtime 15 --size 4m --verify "
        "--timeout 90 --interrupt --rate 300 --json",
        "/tmp/io",
    )
    queues = machine.busy_queues("Nvme0", 2)
    assert {queue["reactor"] for queue in queues} == {"reactor-0", "reactor-1"}
    assert sum(queue["bounced"] for queue in queues) == 0, "guest memory is the target of DMA"
    assert machine.rpc("bdev_nvme_reset_controller", name="Nvme0") is True
    reactors = machine.rpc("framework_get_reactors")["reactors"]
    machine.run(f"kill -9 {reactors[-1]['pid']}")
    machine.busy_queues("Nvme0", 2)
    assert machine.rpc("bdev_nvme_reset_controller", name="Nvme0") is True
    done = machine.guest.wait("/tmp/io", 90)
    assert done.status == 0, done.output + machine.run(f"cat {LOG}").output
    (entry,) = machine.rpc("bdev_nvme_get_controllers", name="Nvme0")
    assert entry["ctrlrs"][0]["resets"] == 2
    assert entry["ctrlrs"][0]["state"] == "enabled"


@pytest.mark.parametrize("how", ["killed", "killed with a reactor", "upgraded"])
def test_a_control_process_that_is_replaced_under_verified_load(drive: NvmeGuest, how: str) -> None:
    machine = drive
    socket = machine.serve("disk", "Nvme0n1")
    machine.start_ours(
        f"io {socket} --rw randrw --iodepth 8 --queues 2 --runtime 60 --size 4m --verify "
        "--timeout 120 --interrupt --rate 200 --json",
        "/tmp/io",
    )
    machine.busy_queues("Nvme0", 2)
    if how == "upgraded":
        machine.ours(f"upgrade -s {RUN}/rpc.sock -t 150")
    else:
        if how == "killed with a reactor":  # whose queue pair nobody deletes
            reactors = machine.rpc("framework_get_reactors")["reactors"]
            machine.run(f"kill -9 $(cat {LOG}.pid) {reactors[-1]['pid']}")
        machine.replace_control()
    machine.busy_queues("Nvme0", 2)
    done = machine.guest.wait("/tmp/io", 120)
    assert done.status == 0, done.output + machine.run(f"cat {LOG}").output
    (entry,) = machine.rpc("bdev_nvme_get_controllers", name="Nvme0")
    assert entry["ctrlrs"][0]["state"] == "enabled"


def test_blocks_of_4096_bytes_by_way_of_bounce_buffers(cluster: NvmeGuest) -> None:
    machine = cluster
    machine.ours(f"nvme bind {machine.SECOND}")
    machine.rpc(
        "bdev_nvme_attach_controller", name="N", trtype="PCIe", traddr=machine.SECOND, dma="bounce"
    )
    socket = machine.serve("disk", "Nn1")
    machine.inside("write", socket, 8192, MIB, 7)
    assert machine.inside("digest", socket, 8192, MIB) == digest(pattern(MIB, 7))
    machine.rpc("vhost_delete_controller", ctrlr="disk")
    machine.rpc("bdev_nvme_detach_controller", name="N", restore="true")
    machine.wait_for_disks("/dev/nvme1n1")
    assert machine.inside("digest", "/dev/nvme1n1", 8192, MIB) == digest(pattern(MIB, 7))


def test_a_drive_comes_and_goes_as_the_kernel_says(cluster: NvmeGuest) -> None:
    machine = cluster
    machine.rpc("bdev_nvme_set_hotplug", enable="true")
    for _ in range(2):
        machine.ours(f"nvme bind {machine.SECOND}")
        machine.wait_for_bdevs("HotInNvme0n1")
        socket = machine.serve("disk", "HotInNvme0n1")
        machine.inside("write", socket, 0, MIB, 9)
        # The kernel asks for the drive, and waits until it has been given back.
        machine.run(f"echo 1 >/sys/bus/pci/devices/{machine.SECOND}/remove")
        machine.wait_for_bdevs()
        assert machine.rpc("bdev_nvme_get_controllers") == []
        machine.rpc("vhost_delete_controller", ctrlr="disk")
        machine.run("echo 1 >/sys/bus/pci/rescan")
        machine.wait_for_disks("/dev/nvme1n1")
        assert machine.inside("digest", "/dev/nvme1n1", 0, MIB) == digest(pattern(MIB, 9))
    machine.rpc("bdev_nvme_set_hotplug", enable="false")


def test_a_drive_in_use_is_never_taken(machine: NvmeGuest) -> None:
    machine.run("mkswap /dev/nvme1n1; swapon /dev/nvme1n1")
    refused = machine.ours(f"nvme bind {machine.SECOND}", status=1).output
    assert "nvme1n1 is swap space" in refused
    assert "in use, never taken" in machine.ours("check", status=None).output
    machine.run("swapoff /dev/nvme1n1")


def test_what_is_not_a_free_nvme_drive_is_refused_by_name(cluster: NvmeGuest) -> None:
    for address, reason in (
        ("0000:00:1e.0", "there is nothing at PCI address"),
        ("0000:00:1f.2", "not an NVMe controller"),
        (cluster.SECOND, "vhost-reactor nvme bind"),
    ):
        call = f"bdev_nvme_attach_controller name=N trtype=PCIe traddr={address}"
        answer = cluster.ours(f"rpc -s {RUN}/rpc.sock {call}", status=None)
        assert answer.status != 0
        assert reason in answer.output
