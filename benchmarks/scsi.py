"""virtio-scsi: this target, its own virtio-blk on the same disks, peers, and the machine's limits.

A peer takes part if its command says ``{device}``, which is then ``scsi``.
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contest import Contender, Contest, case, files, matrix, start_servers
from benchmarks.series import Case
from benchmarks.servers import QUEUES
from benchmarks.suite import Benchmark, Session


def quick() -> list[Case]:
    """Return one case of each kind."""
    return [
        case("null", 512, "randread", 32),
        case("malloc", 4096, "randrw", 32, "packed", 2),
        case("file", 4096, "randread", 32),
    ]


def usual() -> list[Case]:
    """Return what the goals speak of, and samples of everything else."""
    some = (1, 32, 128)
    return [
        *(case("null", 512, "randread", depth) for depth in (1, 32, 128)),
        case("null", 4096, "randread", 1),
        *(case("malloc", 4096, m, depth) for m in ("randread", "randwrite") for depth in some),
        case("malloc", 65536, "randread", 32),
        case("malloc", 1 << 20, "read", 8),
        case("null", 512, "randread", 128, "packed"),
        case("null", 512, "randread", 32, queues=QUEUES),
        *(case("file", 4096, "randread", depth) for depth in some),
    ]


def run(session: Session) -> None:
    """Run all rounds."""
    options = session.options
    cases = list(filter(options.wanted, options.choose(quick(), usual(), matrix())))
    if not cases:
        return
    with ExitStack() as stack:
        made = stack.enter_context(files(options.folder))
        kinds = dict.fromkeys(str(case["disk"]) for case in cases)
        servers = start_servers(stack, options, [made[kind] for kind in kinds], "scsi")
        contest = Contest(session, made)
        targets = [contest.server(server, "scsi") for server in servers]
        targets.append(contest.server(servers[0], "blk", name="blk"))

        def contenders(case: Case) -> list[Contender]:
            return targets + contest.limits(case)

        contest.run(cases, contenders)


benchmark = Benchmark("scsi", "virtio-scsi", run, base="*", memory=1 << 30)
