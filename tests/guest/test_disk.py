"""What a guest does with its disks every day; one guest for all of these tests.

vda and vdb are served by two reactors at once (if there are as many), vda with more queues than the
guest has processors; vdc is read-only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.guest.load import Load
from tests.guest.servers import BLOCK_SIZE, DISK_MIB, ClusterServer, Disk, DiskServer
from vhost.messages import Feature

pytestmark = pytest.mark.guest

SECTORS = DISK_MIB * 2**20 // 512


@dataclass
class Machine:
    """A guest and the disks it was given, by the guest's names."""

    guest: Guest
    disks: dict[str, Disk]


@pytest.fixture(scope="module")
def machine(server: DiskServer, cpus: list[int], module_path: Path) -> Iterator[Machine]:
    first, last = server.kinds[0], server.kinds[-1]
    disks = {
        "vda": server.add_disk("first", first, cpu=cpus[0]),
        "vdb": server.add_disk("second", last, cpu=cpus[:2][-1]),
        "vdc": server.add_disk("third", last, cpu=cpus[0], readonly=True),
    }
    sockets = [disk.socket for disk in disks.values()]
    with Guest(module_path, sockets, queues=[4, 1, 1], cpus=2, packed=server.packed) as guest:
        yield Machine(guest, disks)
        server.check_alive()
        guest.shutdown()


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


@pytest.fixture(params=["vda", "vdb"])
def disk(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_disk_has_its_size_and_block_size(guest: Guest, disk: str) -> None:
    seen = guest.run(f"cd /sys/block/{disk}; cat size queue/logical_block_size")

    assert seen.output.split() == [str(SECTORS), str(BLOCK_SIZE)]


def test_rings_have_the_format_that_was_asked_for(
    server: DiskServer, guest: Guest, disk: str
) -> None:
    features = guest.run(f"cat /sys/block/{disk}/device/features").output

    assert features[Feature.RING_PACKED.bit_length() - 1] == str(int(server.packed))


def test_disk_shows_its_serial(machine: Machine, disk: str) -> None:
    seen = machine.guest.run(f"cat /sys/block/{disk}/serial")

    assert seen.output.strip() == machine.disks[disk].serial


def test_each_processor_has_a_queue(guest: Guest) -> None:
    assert guest.run("ls /sys/block/vda/mq").output.split() == ["0", "1"]
    # And each of them is used, by a process on that processor.
    for cpu in (0, 1):
        before = _interrupts(guest, queue=cpu)
        guest.run(f"taskset {1 << cpu:x} dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct")
        assert _interrupts(guest, queue=cpu) > before


def _interrupts(guest: Guest, queue: int) -> int:
    """Return how often queue ``queue`` of vda, the lowest virtio device, has interrupted."""
    line = guest.run(f"grep virtio0-req.{queue} /proc/interrupts").output.split()
    return sum(int(count) for count in line[1:3])


@pytest.mark.parametrize("block", ["512", "4k", "1M"])
def test_direct_writes_are_read_back(guest: Guest, disk: str, block: str) -> None:
    guest.run(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=1;"
        f"dd if=/tmp/data of=/dev/{disk} bs={block} seek=3 oflag=direct"
    )

    read = f"dd if=/dev/{disk} bs={block} skip=3 iflag=direct 2>/dev/null | head -c 1048576"
    guest.run(f"{read} | cmp - /tmp/data")


def test_buffered_writes_are_on_the_disk_after_a_flush(guest: Guest, disk: str) -> None:
    guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=8")
    guest.run(f"dd if=/tmp/data of=/dev/{disk} bs=64k seek=100 conv=fsync")
    guest.run("echo 3 >/proc/sys/vm/drop_caches")

    read = guest.run(f"dd if=/dev/{disk} bs=64k skip=100 count=128 2>/dev/null | sha256sum")

    assert read.output == guest.run("sha256sum </tmp/data").output


def test_guest_writes_are_in_the_file(machine: Machine) -> None:
    image = machine.disks["vdb"].image
    assert image is not None
    marked = "the quick brown fox"

    machine.guest.run(f"echo {marked} | dd of=/dev/vdb bs=512 seek=9 conv=sync,fsync")

    with image.open("rb") as file:
        file.seek(9 * 512)
        assert file.read(512) == (marked + "\n").encode().ljust(512, b"\0")


def test_last_sector_is_served(guest: Guest, disk: str) -> None:
    last = SECTORS - 1
    guest.run(
        f"dd if=/dev/urandom of=/tmp/last bs=512 count=1; dd if=/tmp/last of=/dev/{disk} "
        f"bs=512 seek={last} oflag=direct"
    )

    guest.run(f"dd if=/dev/{disk} bs=512 skip={last} iflag=direct | cmp - /tmp/last")


def test_file_system_keeps_its_files(guest: Guest, disk: str) -> None:
    guest.run(f"/sbin/mke2fs -q -F -t ext4 /dev/{disk}")
    guest.run(f"mount -t ext4 /dev/{disk} /mnt")
    guest.run("cp -r /bin/busybox /sbin /mnt; for n in $(seq 100); do echo $n >/mnt/file$n; done")
    written = guest.run("cd /mnt && find . -type f | sort | xargs sha256sum").output
    guest.run("umount /mnt")

    guest.run(f"/sbin/e2fsck -f -n /dev/{disk}")
    guest.run(f"mount -t ext4 -o ro /dev/{disk} /mnt")
    found = guest.run("cd /mnt && find . -type f | sort | xargs sha256sum").output
    guest.run("umount /mnt")

    assert len(written.splitlines()) > 100
    assert found == written


def test_discard_gives_the_memory_back(machine: Machine) -> None:
    image = machine.disks["vdb"].image
    assert image is not None
    machine.guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=16 oflag=direct")
    before = image.stat().st_blocks

    machine.guest.run("/sbin/blkdiscard -o 1048576 -l 15728640 /dev/vdb")

    assert image.stat().st_blocks <= before - 15728640 // 512


def test_discard_leaves_the_neighbours_alone(guest: Guest, disk: str) -> None:
    guest.run(
        f"dd if=/dev/urandom of=/tmp/data bs=1M count=3; dd if=/tmp/data of=/dev/{disk} "
        "bs=1M oflag=direct"
    )

    guest.run(f"/sbin/blkdiscard -o 1048576 -l 1048576 /dev/{disk}")

    for part in (0, 2):
        guest.run(
            f"dd if=/dev/{disk} of=/tmp/read bs=1M skip={part} count=1 iflag=direct;"
            f"dd if=/tmp/data bs=1M skip={part} count=1 | cmp - /tmp/read"
        )


def test_write_zeroes_zeroes_and_leaves_the_neighbours_alone(guest: Guest, disk: str) -> None:
    guest.run(
        f"dd if=/dev/urandom of=/tmp/data bs=1M count=3; dd if=/tmp/data of=/dev/{disk} "
        "bs=1M oflag=direct"
    )

    guest.run(f"/sbin/blkdiscard -z -o 1048576 -l 1048576 /dev/{disk}")

    guest.run("dd if=/dev/zero of=/tmp/data bs=1M seek=1 count=1 conv=notrunc")
    guest.run(f"dd if=/dev/{disk} bs=1M count=3 iflag=direct | cmp - /tmp/data")


def test_file_system_can_be_trimmed(guest: Guest, disk: str) -> None:
    guest.run(f"/sbin/mke2fs -q -F -t ext4 -E nodiscard /dev/{disk}")
    guest.run(f"mount -t ext4 /dev/{disk} /mnt")

    trimmed = guest.run("/sbin/fstrim -v /mnt; umount /mnt").output

    assert "(" in trimmed, trimmed
    assert int(trimmed.partition("(")[2].split()[0]) > DISK_MIB * 2**20 // 2
    guest.run(f"/sbin/e2fsck -f -n /dev/{disk}")


def test_read_only_disk_refuses_writes_and_keeps_its_data(machine: Machine) -> None:
    guest, image = machine.guest, machine.disks["vdc"].image
    assert image is not None
    assert guest.run("cat /sys/block/vdc/ro").output.strip() == "1"

    for command in (
        "dd if=/dev/urandom of=/dev/vdc bs=4k count=1 oflag=direct",
        "/sbin/blkdiscard /dev/vdc",
        "/sbin/blkdiscard -z /dev/vdc",
    ):
        assert guest.run(command, status=None).status != 0, command

    guest.run("dd if=/dev/vdc of=/dev/null bs=1M iflag=direct")
    assert not any(image.read_bytes())


def test_two_disks_work_at_once(guest: Guest) -> None:
    loads = [Load(guest, device) for device in ("/dev/vda", "/dev/vdb")]

    for _ in range(3):
        for load in loads:
            load.advance(2000)

    for load in loads:
        result = load.stop()
        assert result.status == 0, result.output


def test_load_notices_data_that_it_has_not_written(guest: Guest, disk: str) -> None:
    load = Load(guest, f"/dev/{disk}", blocks=64)
    load.advance(500)

    guest.run(f"dd if=/dev/zero of=/dev/{disk} bs=256k count=1 oflag=direct")

    result = load.stop()
    assert result.status == 1
    assert "not what was written" in result.output


def test_guest_sees_a_disk_grow(server: DiskServer, machine: Machine) -> None:
    image = machine.disks["vdb"].image
    if not isinstance(server, ClusterServer) or image is None:
        pytest.skip("needs a disk in a file that is looked at again")
    with image.open("r+b") as file:
        file.truncate((DISK_MIB + 16) * 2**20)

    server.cluster.rpc("bdev_uring_rescan", name="second")

    larger = SECTORS + 16 * 2**20 // 512
    machine.guest.run(f"until [ $(cat /sys/block/vdb/size) = {larger} ]; do usleep 10000; done")
    marked = "at the new end"
    machine.guest.run(f"echo {marked} | dd of=/dev/vdb bs=512 seek={larger - 1} conv=sync,fsync")
    with image.open("rb") as file:
        file.seek((larger - 1) * 512)
        assert file.read().rstrip(b"\0").decode() == marked + "\n"


def test_disks_are_served_by_two_reactors(
    server: DiskServer, machine: Machine, cpus: list[int]
) -> None:
    if not isinstance(server, ClusterServer) or len(cpus) < 2:
        pytest.skip("needs reactors, two of them")
    controllers = {c["ctrlr"]: c for c in server.cluster.rpc("vhost_get_controllers")}

    assert int(controllers["first"]["cpumask"], 16) == 1 << cpus[0]
    assert int(controllers["second"]["cpumask"], 16) == 1 << cpus[1]


# The last: it loses what the others have left on the disk.
def test_guest_that_reboots_finds_its_data(machine: Machine, disk: str) -> None:
    guest = machine.guest
    guest.run(f"/sbin/mke2fs -q -F -t ext4 /dev/{disk}")
    guest.run(f"mount -t ext4 /dev/{disk} /mnt && cp /bin/busybox /mnt && sync")
    wanted = guest.run("sha256sum </bin/busybox").output

    guest.reboot()  # in the middle of things: mounted

    guest.run(f"mount -t ext4 /dev/{disk} /mnt")
    assert guest.run("sha256sum </mnt/busybox").output == wanted
    guest.run("umount /mnt")
    guest.run(f"/sbin/e2fsck -f -n /dev/{disk}")
