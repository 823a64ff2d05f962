"""What the project aims at, and where in the results to look whether it is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.series import CPU, IOPS, P50, Case, Result
from benchmarks.suite import OURS
from benchmarks.tables import number

QEMU = "qemu-storage-daemon"
SPDK = "spdk"  # what --peer is to call it
BETTER_PEER = (SPDK, QEMU)

Found = dict[str, Result]


@dataclass(frozen=True, slots=True)
class Goal:
    """A row: ``measured`` returns what was found, or nothing if it was not measured."""

    work: str
    at_least: str
    measured: Callable[[Found], str]


def median(found: Found, name: str, case: Case, contender: str, quantity: str) -> float | None:
    """Return a figure, if it was measured; the case may say less than the result's own."""
    result = found.get(name)
    if result is None:
        return None
    for each in result.series:
        named = (each.contender, each.quantity.name) == (contender, quantity)
        if named and case.items() <= each.case.items():
            return each.median
    return None


def against(
    name: str, cases: Sequence[Case], bases: Sequence[str], quantity: str = IOPS.name
) -> Callable[[Found], str]:
    """Return what says, for each case, our figure and its ratios to the bases."""

    def measured(found: Found) -> str:
        parts = []
        for case in cases:
            ours = median(found, name, case, OURS, quantity)
            if ours is None:
                continue
            text = f"{' '.join(str(value) for value in case.values())}: {number(ours)}"
            for base in bases:
                other = median(found, name, case, base, quantity)
                text += f", {ours / other:.2f} times {base}" if other else ""
            parts.append(text)
        return "; ".join(parts)

    return measured


def figures(name: str, case: Case, contender: str, *quantities: str) -> Callable[[Found], str]:
    """Return what quotes figures with their units."""

    def measured(found: Found) -> str:
        units = {q.name: q.unit for r in found.values() for q in r.quantities()}
        parts = []
        for quantity in quantities:
            value = median(found, name, case, contender, quantity)
            if value is not None:
                parts.append(f"{quantity} {number(value)} {units[quantity]}")
        return ", ".join(parts)

    return measured


def times(name: str, one: Case, other: Case, quantity: str) -> Callable[[Found], str]:
    """Return what divides our figure in one case by that in another."""

    def measured(found: Found) -> str:
        above = median(found, name, one, OURS, quantity)
        below = median(found, name, other, OURS, quantity)
        return f"{above / below:.2f}" if above is not None and below else ""

    return measured


def _random(disk: str, block: int, depths: Sequence[int], *modes: str) -> list[Case]:
    return [
        {"disk": disk, "block": block, "mode": mode, "depth": depth, "ring": "split", "queues": 1}
        for mode in modes or ("randread",)
        for depth in depths
    ]


SCSI_CASES: list[Case] = [
    {"disk": disk, "block": block, "depth": 128}
    for disk, block in (("null", 512), ("malloc", 4096))
]
GOALS = (
    Goal(
        "null, 512 B, depth 128, one queue",
        "3 times SPDK vhost, and 15 M IOPS",
        against("blk", _random("null", 512, [128]), [SPDK, QEMU]),
    ),
    Goal(
        "malloc 64 MiB, 4 KiB random read / write, depth 32 and 128",
        "1.35 times SPDK, and 95 % of memcpy's bound",
        against(
            "blk",
            _random("malloc", 4096, [32, 128], "randread", "randwrite"),
            [SPDK, QEMU, "memcpy", "memcpy from huge pages"],
        ),
    ),
    Goal(
        "depth 1, null and malloc 4 KiB",
        "round trip no longer than SPDK's, 0.8 times as the aim",
        against(
            "blk",
            [*_random("null", 4096, [1]), *_random("malloc", 4096, [1])],
            [SPDK, QEMU, "bare ring"],
            P50.name,
        ),
    ),
    Goal("scsi, the same", "1.5 times SPDK vhost-scsi", against("scsi", SCSI_CASES, [SPDK, "blk"])),
    Goal(
        "file (io_uring, O_DIRECT), 4 KiB, depth 1 / 32 / 128",
        "equal to bare fio io_uring's IOPS",
        against("blk", _random("file", 4096, [1, 32, 128]), ["fio", QEMU]),
    ),
    Goal(
        "the same, CPU per I/O",
        "0.7 times the better of SPDK's uring bdev and qemu-storage-daemon",
        against("blk", _random("file", 4096, [1, 32, 128]), BETTER_PEER, CPU.name),
    ),
    Goal(
        "a filled cow disk, 4 KiB, depth 1 / 32",
        "95 % of the file itself",
        against(
            "cow",
            [{"mode": mode, "depth": depth} for mode in ("read", "write") for depth in (1, 32)],
            ["the file itself"],
        ),
    ),
    Goal(
        "one busy among 1000 idle connected devices",
        "98 % of its speed alone",
        times("scale", {"devices": 1000}, {"devices": 0}, IOPS.name),
    ),
    Goal(
        "idle, 1000 connected devices",
        "under 1 % of one CPU; wake-up p99 under 50 µs",
        figures("idle", {"devices": 1000}, OURS, "idle CPU", "wake-up p99"),
    ),
    Goal(
        "light guest beside a heavy one",
        "p99 within 2 times of alone",
        times("fairness", {"light": "beside a heavy one"}, {"light": "alone"}, "p99"),
    ),
    Goal(
        "events, round trip to a polling reactor",
        "0.5 times bare pyzmq's between two sleeping processes, never above 1.2 times",
        lambda found: _events(found, "round trip p50"),
    ),
    Goal(
        "events, one way",
        "70 % of bare pyzmq's rate",
        lambda found: _events(found, "one way"),
    ),
    Goal(
        "1000 controllers",
        "created in under 2 s; under 200 KB resident each",
        figures("control", {"controllers": 1000}, OURS, "create", "memory"),
    ),
)


def _events(found: Found, quantity: str) -> str:
    ours = median(found, "events", {}, "polling reactor", quantity)
    bare = median(found, "events", {}, "bare pyzmq", quantity)
    return f"{number(ours)}, {ours / bare:.2f} times" if ours is not None and bare else ""
