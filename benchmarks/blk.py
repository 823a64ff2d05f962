"""virtio-blk: this target, its peers, and what the machine allows, round by round."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contest import Contender, Contest, case, files, matrix, start_servers
from benchmarks.series import Case
from benchmarks.servers import QUEUES, REGISTERED
from benchmarks.suite import Benchmark, Session


def quick() -> list[Case]:
    """Return one case of each kind."""
    return [
        case("null", 512, "randread", 128),
        case("malloc", 4096, "randrw", 32),
        case("malloc", 4096, "randread", 8, "packed", 2),
        case("file", 4096, "randread", 32),
    ]


def usual() -> list[Case]:
    """Return what the goals speak of, and samples of everything else."""
    some = (1, 32, 128)
    return [
        *(case("null", 512, "randread", depth) for depth in (1, 8, 32, 128, 256)),
        *(case("null", 4096, "randread", depth) for depth in (1, 128)),
        *(case("malloc", 4096, m, depth) for m in ("randread", "randwrite") for depth in some),
        case("malloc", 512, "randread", 128),
        case("malloc", 4096, "randrw", 32),
        case("malloc", 65536, "randread", 32),
        case("malloc", 1 << 20, "read", 8),
        case("null", 512, "randread", 128, "packed"),
        case("malloc", 4096, "randread", 128, "packed"),
        *(case("null", 512, "randread", 32, queues=queues) for queues in (2, QUEUES)),
        *(case("file", 4096, "randread", depth) for depth in some),
        case("file", 4096, "randwrite", 32),
    ]  # fmt: skip


def run(session: Session) -> None:
    """Run all rounds."""
    options = session.options
    cases = list(filter(options.wanted, options.choose(quick(), usual(), matrix())))
    if not cases:
        return
    with ExitStack() as stack:
        made = stack.enter_context(files(options.folder))
        kinds = dict.fromkeys(str(case["disk"]) for case in cases)
        servers = start_servers(stack, options, [made[kind] for kind in kinds])
        contest = Contest(session, made)
        targets = [contest.server(server, "blk") for server in servers]
        registered = contest.server(servers[0], REGISTERED, "registered buffers")

        def contenders(case: Case) -> list[Contender]:
            bare = case["disk"] != "file" and case["ring"] == "split" and case["queues"] == 1
            ring = [contest.ring] if bare else []
            others = [registered] if case["disk"] == "file" else []
            return targets + others + ring + contest.limits(case)

        contest.run(cases, contenders)


benchmark = Benchmark("blk", "virtio-blk", run, base="*", memory=1 << 30)
