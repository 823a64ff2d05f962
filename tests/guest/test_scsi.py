"""A guest with SCSI disks, asked by the programs of sg3-utils; one guest for most of these tests.

Host 0 has target 0 with LUN 0 (a malloc disk, sda); host 1 is another initiator of the same disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import running_cluster
from tests.guest.guest import Guest
from tests.support.cluster import Cluster

pytestmark = pytest.mark.guest

MIB = 64
BLOCKS = MIB * 2**20 // 512


@pytest.fixture(scope="module")
def cluster(cpus: list[int]) -> Iterator[Cluster]:
    with running_cluster(cpus=cpus[:2]) as cluster:
        cluster.rpc("bdev_malloc_create", name="M0", num_blocks=BLOCKS, block_size=512)
        for index in range(2):
            name = f"s{index}"
            place = hex(1 << cpus[:2][index % len(cpus[:2])])
            cluster.rpc("vhost_create_scsi_controller", ctrlr=name, cpumask=place)
            cluster.rpc(
                "vhost_scsi_controller_add_target", ctrlr=name, scsi_target_num=0, bdev_name="M0"
            )
        yield cluster


@pytest.fixture(scope="module")
def guest(cluster: Cluster, module_path: Path) -> Iterator[Guest]:
    hosts = [cluster.socket("s0"), cluster.socket("s1")]
    with Guest(module_path, hosts=hosts, cpus=2) as guest:
        guest.run("until [ -b /dev/sdb ]; do usleep 50000; done")
        # The guest sees host 0 first, whichever of them answers first.
        assert guest.run("ls -d /sys/class/scsi_disk/0:0:0:0/device/block/*").output.split()
        yield guest
        guest.shutdown()


def disk(guest: Guest, host: int = 0) -> str:
    """Return the device of the disk at a SCSI host."""
    listing = guest.run(f"ls /sys/class/scsi_disk/{host}:0:0:0/device/block").output.split()
    return f"/dev/{listing[0]}"


def test_disk_has_its_size(guest: Guest) -> None:
    name = disk(guest).rpartition("/")[2]
    assert guest.run(f"cat /sys/block/{name}/size").output.split() == [str(BLOCKS)]
    assert guest.run(f"cat /sys/block/{name}/device/vendor").output.split() == ["VHOST"]
    modes = guest.run(f"cat /sys/block/{name}/queue/write_cache /sys/block/{name}/ro").output
    assert modes.split() == ["write", "back", "0"]
    assert int(guest.run(f"cat /sys/block/{name}/queue/discard_max_bytes").output) > 0


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sg_turs -v", ""),
        ("sg_inq", "Malloc disk"),
        ("sg_inq --vpd", "Supported VPD pages"),
        ("sg_vpd --page=sn", "Unit serial number"),
        ("sg_vpd --page=di", "designator type: NAA"),
        ("sg_vpd --page=ei", "Extended INQUIRY data"),
        ("sg_vpd --page=mpp", "Mode page policy"),
        ("sg_vpd --page=sp", "SCSI Ports"),
        ("sg_vpd --page=bl", "Maximum compare and write length: 255 blocks"),
        ("sg_vpd --page=0xb0", "Maximum transfer length: 65536 blocks"),
        ("sg_vpd --page=bdc", "Non-rotating medium"),
        ("sg_vpd --page=lbpv", "Unmap command supported (LBPU): 1"),
        ("sg_readcap", f"Number of logical blocks={BLOCKS}"),
        ("sg_readcap --long", "lbpme=1"),
        ("sg_modes --all", "Caching"),
        ("sg_modes --page=0x0a", "Control"),
        ("sg_luns --select=2", "c101000000000000"),
        ("sg_opcodes", "Compare and write"),
        ("sg_opcodes --opcode=0x28 --rctd", "nominal timeout: 30 secs"),
        ("sg_opcodes --tmf", "Abort task"),
        ("sg_logs --page=0", "Supported log pages"),
        ("sg_logs --all", "Temperature"),
        ("sg_requests", "No Sense"),
        ("sg_sync --16", ""),
        ("sg_verify --lba=0 --count=128 --16", ""),
        ("sg_get_lba_status --lba=0", f"blocks: {BLOCKS:10}  deallocated"),
    ],
    ids=lambda text: text.replace(" ", "") if text.startswith("sg_") else "",
)
def test_program_understands_the_disk(guest: Guest, command: str, expected: str) -> None:
    output = guest.run(f"{command} {disk(guest)}").output
    assert expected.lower() in output.lower()


def test_unmap_and_write_same(guest: Guest) -> None:
    name = disk(guest)
    guest.run(f"dd if=/dev/urandom of={name} bs=1M count=1 oflag=direct")
    guest.run(f"sg_unmap --lba=8 --num=8 --force {name}")
    status = guest.run(f"sg_get_lba_status --lba=8 {name}; sg_get_lba_status --lba=16 {name}")
    first, second = [line for line in status.output.splitlines() if "blocks:" in line]
    assert first.endswith("blocks:          8  deallocated")
    assert "  mapped" in second
    guest.run(f"sg_write_same --16 --in=/dev/zero --lba=32 --num=16 --xferlen=512 {name}")
    for skip in (1, 4, 5):
        guest.run(f"dd if={name} bs=4k skip={skip} count=1 iflag=direct | cmp -n 4096 - /dev/zero")
    guest.run(f"! dd if={name} bs=4k skip=2 count=1 iflag=direct | cmp -s -n 4096 - /dev/zero")


def test_compare_and_write(guest: Guest) -> None:
    name = disk(guest)
    guest.run(f"dd if=/dev/zero of={name} bs=4k count=1 oflag=direct")
    guest.run(
        "dd if=/dev/zero of=/tmp/caw bs=512 count=1; dd if=/dev/urandom bs=512 count=1 >>/tmp/caw"
    )
    command = f"sg_compare_and_write --in=/tmp/caw --lba=0 --num=1 --xferlen=1024 {name}"
    guest.run(command)
    guest.run(
        f"dd if={name} bs=512 count=1 iflag=direct >/tmp/now; tail -c 512 /tmp/caw | cmp - /tmp/now"
    )
    assert guest.run(command, status=14).status == 14  # sg3-utils: miscompare


def test_extended_copy(guest: Guest, cluster: Cluster) -> None:
    cluster.rpc("bdev_malloc_create", name="M2", num_blocks=BLOCKS, block_size=512)
    place = {"ctrlr": "s0", "scsi_target_num": 2}
    cluster.rpc("vhost_scsi_controller_add_target", bdev_name="M2", **place)
    where = "/sys/class/scsi_disk/0:0:2:0/device/scsi_generic"
    guest.run(f"until [ -e {where} ]; do usleep 50000; done")
    other = "/dev/" + guest.run(f"ls {where}").output.strip()
    generic = "/sys/class/scsi_disk/0:0:0:0/device/scsi_generic"
    first = "/dev/" + guest.run(f"ls {generic}").output.strip()
    guest.run(f"dd if=/dev/urandom of={disk(guest)} bs=1M count=1 oflag=direct")
    guest.run(f"sg_xcopy if={first} of={other} bs=512 count=2048 seek=100 list_id=3")
    guest.run(f"sg_raw -r 1M -o /tmp/copied {other} 28 00 00 00 00 64 00 08 00 00")
    guest.run(f"dd if={disk(guest)} bs=1M count=1 iflag=direct | cmp -n 1048576 - /tmp/copied")
    cluster.rpc("vhost_scsi_controller_remove_target", **place)


def test_reset_of_the_unit(guest: Guest) -> None:
    name = disk(guest)
    guest.run(f"sg_reset --device {name}")
    guest.run(f"dd if={name} of=/dev/null bs=4k count=16 iflag=direct")


def test_file_system_keeps_its_files(guest: Guest) -> None:
    name = disk(guest)
    guest.run(f"/sbin/mke2fs -q -F -t ext4 {name}")
    guest.run(f"mount -t ext4 {name} /mnt")
    guest.run("cp -r /bin/busybox /mnt; for n in $(seq 100); do echo $n >/mnt/file$n; done")
    written = guest.run("cd /mnt && find . -type f | sort | xargs sha256sum").output
    guest.run("/sbin/fstrim /mnt; umount /mnt")
    guest.run(f"/sbin/e2fsck -f -n {name}")
    guest.run(f"mount -t ext4 -o ro {name} /mnt")
    assert guest.run("cd /mnt && find . -type f | sort | xargs sha256sum").output == written
    guest.run("umount /mnt")


def test_initiators_fence_each_other(guest: Guest) -> None:
    """Two SCSI hosts of one guest are what two guests are: nexuses of their own."""
    first, second = disk(guest, 0), disk(guest, 1)
    persist = "sg_persist --no-inquiry --out"
    guest.run(f"for disk in {first} {second}; do sg_turs $disk || sg_turs $disk; done")
    guest.run(f"{persist} --register --param-sark=0xa {first}")
    guest.run(f"{persist} --register --param-sark=0xb {second}")
    guest.run(f"{persist} --reserve --param-rk=0xa --prout-type=5 {first}")
    guest.run(f"dd if=/dev/zero of={second} bs=4k count=1 oflag=direct")
    guest.run(f"{persist} --preempt-abort --param-rk=0xa --param-sark=0xb --prout-type=5 {first}")
    guest.run(f"! dd if=/dev/zero of={second} bs=4k count=1 oflag=direct")
    guest.run(f"dd if=/dev/zero of={first} bs=4k count=1 oflag=direct")
    keys = guest.run(f"sg_persist --no-inquiry --in --read-keys {second}").output
    assert ("0xa" in keys, "0xb" in keys) == (True, False)
    status = guest.run(f"sg_persist --no-inquiry --in --read-full-status {first}").output
    assert "Reservation holder" in status
    guest.run(f"{persist} --clear --param-rk=0xa {first}")
    guest.run(f"sg_turs {second} || true; dd if=/dev/zero of={second} bs=4k count=1 oflag=direct")


def test_two_guests_fence_each_other(guest: Guest, cluster: Cluster, tmp_path: Path) -> None:
    """One writes when it is fenced: nothing of it comes after what the other one writes then."""
    persist = "sg_persist --no-inquiry --out"
    with Guest(tmp_path, hosts=[cluster.socket("s1")], cpus=1) as other:
        other.run("until [ -b /dev/sda ]; do usleep 50000; done")
        mine, theirs = disk(guest), disk(other)
        guest.run(f"sg_turs {mine} || sg_turs {mine}")
        guest.run(f"{persist} --register --param-sark=0xa {mine}")
        other.run(f"{persist} --register --param-sark=0xb {theirs}")
        other.run(f"{persist} --reserve --param-rk=0xb --prout-type=5 {theirs}")
        other.start(f"while dd if=/dev/urandom of={theirs} bs=4k count=64 oflag=direct; do :; done",
                    "/tmp/l")  # fmt: skip
        guest.run(
            f"{persist} --preempt-abort --param-rk=0xa --param-sark=0xb --prout-type=5 {mine}"
        )
        guest.run(f"dd if=/dev/zero of={mine} bs=4k count=64 oflag=direct")
        other.wait("/tmp/l", 30)
        other.run(f"! dd if=/dev/urandom of={theirs} bs=4k count=1 oflag=direct")
        guest.run(f"dd if={mine} bs=4k count=64 iflag=direct | cmp -n 262144 - /dev/zero")
        guest.run(f"{persist} --clear --param-rk=0xa {mine}")
        other.shutdown()


def test_targets_come_and_go_under_load(guest: Guest, cluster: Cluster) -> None:
    cluster.rpc("bdev_malloc_create", name="M1", num_blocks=BLOCKS, block_size=4096)
    add = {"ctrlr": "s0", "bdev_name": "M1"}
    target = cluster.rpc("vhost_scsi_controller_add_target", scsi_target_num=-1, **add)
    where = f"/sys/class/scsi_disk/0:0:{target}:0/device/block"
    guest.run(f"until [ -e {where} ]; do usleep 50000; done")
    name = "/dev/" + guest.run(f"ls {where}").output.strip()
    guest.run(f"until [ -b {name} ]; do usleep 50000; done")
    guest.start(
        f"while dd if=/dev/zero of={name} bs=64k count=500 oflag=direct; do :; done", "/tmp/l"
    )
    remove = {"ctrlr": "s0", "scsi_target_num": target}
    assert cluster.rpc("vhost_scsi_controller_remove_target", **remove) is True
    guest.wait("/tmp/l", 30)
    guest.run(f"while [ -e {where} ]; do usleep 50000; done")
    assert cluster.rpc("bdev_malloc_delete", name="M1") is True
    guest.run(f"dd if={disk(guest)} of=/dev/null bs=4k count=16 iflag=direct")
