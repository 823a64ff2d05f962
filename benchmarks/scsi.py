"""virtio-scsi against virtio-blk of the same target, on the same kinds of disks, turn by turn."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.blk import MEMORY_SIZE
from benchmarks.load import Load, record
from benchmarks.series import Case
from benchmarks.servers import Disk, OursScsi, scsi_name
from benchmarks.suite import OURS, Benchmark, Session
from vhost.frontend import BlkFrontend
from vhost.frontend_scsi_disk import ScsiDisk
from vhost.workload import Workload

DISKS = ("null", "malloc")
CONTENDERS = (OURS, "blk")
USUAL = ((512, 1), (512, 32), (512, 128), (4096, 1), (4096, 32), (4096, 128))
FULL = tuple(
    (block, depth)
    for block in (512, 4096, 16384, 65536, 1 << 20)
    for depth in (1, 4, 16, 32, 64, 128)
)


def cases(session: Session) -> list[Case]:
    """Return what is asked for."""
    options = session.options
    sizes = options.choose(((512, 32),), USUAL, FULL)
    modes = options.choose(("randread",), ("randread",), ("randread", "randwrite", "randrw"))
    rings = options.choose(("split",), ("split",), ("split", "packed"))
    found: list[Case] = [
        {"disk": disk, "block": block, "mode": mode, "ring": ring, "depth": depth}
        for disk in DISKS
        for block, depth in sizes
        for mode in modes
        for ring in rings
    ]
    return [case for case in found if options.wanted(case)]


def measure_once(session: Session, server: OursScsi, case: Case, name: str) -> None:
    """Put the load on one of the two devices."""
    options = session.options
    work = Workload(
        size=0,
        mode=str(case["mode"]),
        block_size=int(case["block"]),
        depth=int(case["depth"]),
        seed=1,
    )
    disk, packed = str(case["disk"]), case["ring"] == "packed"
    front = (
        BlkFrontend(server.socket(disk), packed=packed)
        if name == "blk"
        else ScsiDisk(server.socket(scsi_name(disk)), packed=packed)
    )
    with front as device:
        load = Load(device, work, cpus=(options.driver_cpu,))
        record(session, case, name, load.measure(options.seconds, server.cpu_seconds))


def run(session: Session) -> None:
    """Run all rounds; each device begins as often as the other."""
    disks = [Disk(kind, MEMORY_SIZE, Path()) for kind in DISKS]
    with (
        tempfile.TemporaryDirectory(prefix="scsi-") as place,
        OursScsi(disks, Path(place), session.options.server_cpu) as server,
    ):
        todo = [(turn, case) for turn in range(session.options.rounds) for case in cases(session)]
        for turn, case in session.track(todo, "scsi"):
            for name in CONTENDERS if turn % 2 == 0 else reversed(CONTENDERS):
                measure_once(session, server, case, name)


benchmark = Benchmark("scsi", "virtio-scsi beside virtio-blk", run, base="blk", memory=1 << 29)
