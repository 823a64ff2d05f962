"""NVMe drives through VFIO, in an emulated machine with an IOMMU: the kernel's own driver is the judge."""

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


@pytest.fixture
def cluster(machine: NvmeGuest) -> Iterator[NvmeGuest]:
    """A cluster on two processors, which must end cleanly and leave the drives free."""
    machine.start_cluster()
    yield machine
    ended = machine.stop_cluster()
    assert ended.status == 0, ended.output
    assert "Traceback" not in ended.output, ended.output
    for address in (machine.FIRST, machine.SECOND):
        machine.ours(f"nvme unbind {address}")


def test_data_goes_from_the_kernel_to_us_and_back(cluster: NvmeGuest) -> None:
    machine = cluster
    machine.inside("write", "/dev/nvme0n1", 0, 2 * MIB, 1)
    bound = machine.ours(f"nvme bind {machine.FIRST}").output
    assert "vfio-pci (it had nvme)" in bound
    names = machine.rpc(
        "bdev_nvme_attach_controller", name="Nvme0", trtype="PCIe", traddr=machine.FIRST
    )
    assert names == ["Nvme0n1", "Nvme0n2"]
    first, second = machine.serve("disk1", "Nvme0n1"), machine.serve("disk2", "Nvme0n2")

    assert machine.inside("digest", first, 0, 2 * MIB) == digest(pattern(2 * MIB, 1))
    machine.inside("write", first, 4 * MIB, 2 * MIB, 2)
    machine.inside("write", second, 512, MIB, 3)
    machine.inside("discard", first, 0, MIB)
    machine.inside("zeroes", first, MIB, 512 * 1024)
    assert machine.inside("digest", first, 4 * MIB, 2 * MIB) == digest(pattern(2 * MIB, 2))

    assert machine.rpc("bdev_nvme_get_controller_health_info", name="Nvme0")["serial_number"] == "TEST0"
    machine.rpc("bdev_nvme_detach_controller", name="Nvme0")
    machine.ours(f"nvme unbind {machine.FIRST}")
    assert machine.inside("digest", "/dev/nvme0n1", 4 * MIB, 2 * MIB) == digest(pattern(2 * MIB, 2))
    assert machine.inside("digest", "/dev/nvme0n2", 512, MIB) == digest(pattern(MIB, 3))
    expected = bytes(512 * 1024) + pattern(2 * MIB, 1)[MIB + 512 * 1024 :]
    assert machine.inside("digest", "/dev/nvme0n1", MIB, MIB) == digest(expected)
    image = machine.images[0].read_bytes()
    assert image[4 * MIB : 6 * MIB] == pattern(2 * MIB, 2), "and so says the drive itself"
    assert not any(image[:MIB]), "what was discarded is gone"


def test_guest_memory_is_the_target_of_dma(cluster: NvmeGuest) -> None:
    machine = cluster
    machine.ours(f"nvme bind {machine.SECOND}")
    machine.rpc("bdev_nvme_attach_controller", name="N", trtype="PCIe", traddr=machine.SECOND)
    socket = machine.serve("disk", "Nn1")
    load = f"io {socket} --rw randrw --bs 4k --iodepth 16 --number-ios 2000 --size 8m --verify"
    machine.guest.start(_environment(load), "/tmp/io")
    machine.run("sleep 3", status=None)
    queues = machine.queues("N")
    done = machine.guest.wait("/tmp/io", 60)
    assert done.status == 0, done.output
    if queues:
        assert sum(queue["bounced"] for queue in queues) == 0, "no byte was copied"
        for queue in queues:
            assert queue["submission_doorbells"] <= queue["commands"]


def _environment(arguments: str) -> str:
    from tests.guest.nvme_guest import _ENVIRONMENT, _OURS

    return f"{_ENVIRONMENT} {_OURS} {arguments}"


def test_resets_and_a_killed_reactor_under_verified_load_on_two_reactors(cluster: NvmeGuest) -> None:
    machine = cluster
    machine.ours(f"nvme bind {machine.FIRST}")
    machine.rpc("bdev_nvme_attach_controller", name="N", trtype="PCIe", traddr=machine.FIRST)
    socket = machine.serve("disk", "Nn1")
    load = f"io {socket} --rw randrw --iodepth 8 --queues 2 --runtime 25 --size 4m --verify --timeout 60"
    machine.guest.start(_environment(load), "/tmp/io")
    machine.run("sleep 3", status=None)
    assert {queue["reactor"] for queue in machine.queues("N")} == {"reactor-0", "reactor-1"}
    assert machine.rpc("bdev_nvme_reset_controller", name="N") is True
    reactors = machine.rpc("framework_get_reactors")["reactors"]
    machine.run(f"kill -9 {reactors[-1]['pid']}")
    machine.run("sleep 3", status=None)
    assert machine.rpc("bdev_nvme_reset_controller", name="N") is True
    done = machine.guest.wait("/tmp/io", 90)
    assert done.status == 0, done.output + machine.run(f"cat {LOG}").output
    (entry,) = machine.rpc("bdev_nvme_get_controllers", name="N")
    assert entry["ctrlrs"][0]["resets"] == 2
    assert entry["ctrlrs"][0]["state"] == "enabled"


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
        answer = cluster.ours(
            f"rpc -s {RUN}/rpc.sock bdev_nvme_attach_controller name=N trtype=PCIe traddr={address}",
            status=None,
        )
        assert answer.status != 0
        assert reason in answer.output
