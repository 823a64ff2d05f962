"""What a disk counts is what fio in the guest says that it has done."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartCluster
from tests.guest import initramfs
from tests.guest.guest import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]

SIZE = 64  # MiB
DELAY = 1000  # microseconds that every request takes, at least
MEMORY = 512  # MiB of the guest: fio loads libraries of many kinds of storage
# One after the other. Each direction has another number of requests of another size.
JOBS = (
    "--name=read --rw=randread --bs=4k --io_size=2m --ioengine=libaio --iodepth=8",
    "--name=write --rw=randwrite --bs=8k --io_size=3m --ioengine=libaio --iodepth=4",
    "--name=trim --rw=randtrim --bs=64k --io_size=4m --ioengine=psync",
    "--name=both --rw=randrw --bs=512,1k --io_size=512k --ioengine=libaio --iodepth=16",
)
COMMAND = "fio --filename=/dev/vda --direct=1 --thread --randseed=1 --stonewall"
EXACT = "echo 2 >/sys/block/vda/queue/nomerges"  # else the guest makes one of neighbours
# fio's words for what it has done, and SPDK's.
WORDS = {
    "read": ("num_read_ops", "bytes_read"),
    "write": ("num_write_ops", "bytes_written"),
    "trim": ("num_unmap_ops", "bytes_unmapped"),
}


def run_fio(guest: Guest) -> list[dict[str, Any]]:
    """Run all jobs, and return what fio says of each."""
    command = f"{COMMAND} --output=/tmp/fio --output-format=json {' '.join(JOBS)} && cat /tmp/fio"
    jobs: list[dict[str, Any]] = json.loads(guest.run(command).output)["jobs"]
    assert [job["error"] for job in jobs] == [0] * len(JOBS)
    return jobs


def said(jobs: list[dict[str, Any]], word: str) -> tuple[int, int]:
    """Return operations and bytes of one direction, in all jobs."""
    sums = (sum(job[word][count] for job in jobs) for count in ("total_ios", "io_bytes"))
    return next(sums), next(sums)


def test_counters_are_what_fio_reports(start_cluster: StartCluster, tmp_path: Path) -> None:
    cluster = start_cluster()
    cluster.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=SIZE << 11)
    kinds = ("avg_read", "p99_read", "avg_write", "p99_write")
    delay = {f"{kind}_latency": DELAY for kind in kinds}
    cluster.rpc("bdev_delay_create", name="D", base_bdev_name="M", **delay)
    cluster.rpc("vhost_create_blk_controller", ctrlr="C", dev_name="D")
    root = partial(initramfs.build, more=("fio",))
    with Guest(tmp_path, [cluster.socket("C")], memory_mib=MEMORY, root=root) as guest:
        guest.run(EXACT)
        cluster.rpc("bdev_reset_iostat", mode="all")
        (before,) = cluster.rpc("vhost_get_iostat", ctrlr="C")["controllers"]
        jobs = run_fio(guest)
        (after,) = cluster.rpc("vhost_get_iostat", ctrlr="C")["controllers"]
        disks = cluster.rpc("bdev_get_iostat")["bdevs"]
        (latency,) = cluster.rpc("bdev_get_latency", name="D")
        guest.shutdown()
    for word, counters in WORDS.items():
        expected = said(jobs, word)
        assert min(expected) > 0
        for disk in disks:  # a disk, and what it stands on
            assert tuple(disk[counter] for counter in counters) == expected, (disk["name"], word)
        assert tuple(after[counter] - before[counter] for counter in counters) == expected, word
    # What the disk takes is a part of what its user waits.
    for word in ("read", "write"):
        total = sum(job[word]["lat_ns"]["mean"] * job[word]["total_ios"] for job in jobs)
        mean = total / said(jobs, word)[0] / 1000
        assert DELAY <= latency["operations"][word]["mean_us"] <= mean
