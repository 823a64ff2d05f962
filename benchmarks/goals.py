"""What the project aims at, and where in the results to look whether it is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.series import CPU, IOPS, P50, Case, Result, Series
from benchmarks.suite import OURS
from benchmarks.tables import cell, describe, number, varied

QEMU = "qemu-storage-daemon"
SPDK = "spdk"  # what --peer is to call it
MEMCPY = "memcpy"

Found = dict[str, Result]


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure in words; ``reached`` is None where there was nothing to compare it with."""

    text: str
    reached: bool | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """What a figure must reach: at least so much, or at most."""

    value: float
    at_most: bool = False

    def reached(self, value: float) -> bool:
        """Whether a figure does."""
        return value <= self.value if self.at_most else value >= self.value


@dataclass(frozen=True, slots=True)
class Goal:
    """A row: ``measured`` returns what was found, nothing if it was not measured."""

    work: str
    at_least: str
    measured: Callable[[Found], list[Finding]] = field(repr=False)

    def row(self, found: Found) -> list[str]:
        """Return work, goal, what was measured, and whether it is reached as far as that goes."""
        findings = self.measured(found)
        verdicts = {each.reached for each in findings} - {None}
        answer = "" if not verdicts else "no" if False in verdicts else "yes"
        text = "; ".join(each.text for each in findings)
        return [self.work, self.at_least, text or "not measured", answer]


def find(found: Found, name: str, case: Case, contender: str, quantity: str) -> Series | None:
    """Return a series, if it was measured; the case may say less than the result's own."""
    result = found.get(name)
    for each in result.series if result else ():
        named = (each.contender, each.quantity.name) == (contender, quantity)
        if named and case.items() <= each.case.items():
            return each
    return None


@dataclass(frozen=True, slots=True)
class Against:
    """Our figure in each case, and its ratios to those of ``bases``, each with its limit.

    A base without one is shown only. ``limit`` is for the figure itself. With ``better``, only the
    base of the lowest figure counts, of those that have a limit.
    """

    name: str
    cases: Sequence[Case]
    bases: Mapping[str, Limit | None]
    quantity: str = IOPS.name
    limit: Limit | None = None
    contender: str = OURS
    better: bool = False

    def __call__(self, found: Found) -> list[Finding]:
        """Return a finding for each case that was measured."""
        measured = []
        for case in self.cases:
            ours = find(found, self.name, case, self.contender, self.quantity)
            if ours is not None:
                measured.append(self._finding(found, case, ours))
        return measured

    def _finding(self, found: Found, case: Case, ours: Series) -> Finding:
        others = {
            base: other.median
            for base in self.bases
            if (other := find(found, self.name, case, base, self.quantity)) and other.median
        }
        verdicts = [self.limit.reached(ours.median)] if self.limit else []
        limits = {base: limit for base in others if (limit := self.bases[base]) is not None}
        if self.better and limits:
            lowest = min(limits, key=lambda base: others[base])
            limits = {lowest: limits[lowest]}
        for base, limit in limits.items():
            verdicts.append(limit.reached(ours.median / others[base]))
        keys = varied(self.cases)
        label = describe({key: case[key] for key in keys} if len(self.cases) > 1 else {})
        text = " ".join(filter(None, [label + ":" if label else "", cell(ours, unit=True)]))
        parts = [f"{ours.median / other:.2f} times {base}" for base, other in others.items()]
        return Finding(", ".join([text, *parts]), all(verdicts) if verdicts else None)


def figures(name: str, case: Case, limits: Mapping[str, Limit]) -> Callable[[Found], list[Finding]]:
    """Return what quotes figures with their units, each beside its limit."""

    def measured(found: Found) -> list[Finding]:
        findings = []
        for quantity, limit in limits.items():
            each = find(found, name, case, OURS, quantity)
            if each is not None:
                text = f"{quantity} {cell(each, unit=True)}"
                findings.append(Finding(text, limit.reached(each.median)))
        return findings

    return measured


def times(
    name: str, pairs: Mapping[str, tuple[Case, Case]], quantity: str, limit: Limit
) -> Callable[[Found], list[Finding]]:
    """Return what divides, for each pair, our figure in one case by that in another."""

    def measured(found: Found) -> list[Finding]:
        findings = []
        for label, (one, other) in pairs.items():
            above = find(found, name, one, OURS, quantity)
            below = find(found, name, other, OURS, quantity)
            if above is not None and below is not None and below.median:
                ratio = above.median / below.median
                unit = above.quantity.unit
                text = f"{ratio:.2f} ({number(above.median)} : {number(below.median)} {unit})"
                text = f"{label}: {text}" if label else text
                findings.append(Finding(text, limit.reached(ratio)))
        return findings

    return measured


def _random(disk: str, block: int, depths: Sequence[int], *modes: str) -> list[Case]:
    return [
        {"disk": disk, "block": block, "mode": mode, "depth": depth, "ring": "split", "queues": 1}
        for mode in modes or ("randread",)
        for depth in depths
    ]


NULL = _random("null", 512, [128])
MALLOC = _random("malloc", 4096, [32, 128], "randread", "randwrite")
ONE = [*_random("null", 4096, [1]), *_random("malloc", 4096, [1])]
FILE = _random("file", 4096, [1, 32, 128])
HEAVY = ("64 KiB, depth 64", "1 MiB, depth 16", "4 KiB, depth 256")
SAME = 0.95  # "equal", of figures that differ by as much from round to round

GOALS = (
    Goal(
        "null, 512 B, depth 128, one queue",
        "3 times SPDK vhost, and 15 M IOPS",
        Against("blk", NULL, {SPDK: Limit(3), QEMU: None}, limit=Limit(15e6)),
    ),
    Goal(
        "malloc 64 MiB, 4 KiB random read / write, depth 32 and 128",
        "1.35 times SPDK, and 95 % of memcpy's bound",
        Against(
            "blk",
            MALLOC,
            {SPDK: Limit(1.35), QEMU: None, MEMCPY: Limit(0.95), f"{MEMCPY} from huge pages": None},
        ),
    ),
    Goal(
        "depth 1, null and malloc 4 KiB",
        "round trip (p50) no longer than SPDK's, 0.8 times as the aim",
        Against(
            "blk", ONE, {SPDK: Limit(1, at_most=True), QEMU: None, "bare ring": None}, P50.name
        ),
    ),
    Goal(
        "scsi, the same: null at depth 128, malloc at 32 and 128",
        "1.5 times SPDK vhost-scsi",
        Against("scsi", NULL + MALLOC, {SPDK: Limit(1.5), "blk": None}),
    ),
    Goal(
        "scsi, the same: depth 1",
        "round trip (p50) no longer than SPDK's",
        Against("scsi", ONE, {SPDK: Limit(1, at_most=True), "blk": None}, P50.name),
    ),
    Goal(
        "file (io_uring, O_DIRECT), 4 KiB, depth 1 / 32 / 128",
        "equal to bare fio io_uring's IOPS (within 5 %)",
        Against("blk", FILE, {"fio": Limit(SAME), SPDK: None, QEMU: None}),
    ),
    Goal(
        "the same, CPU per I/O",
        "0.7 times the better of SPDK's uring bdev and qemu-storage-daemon",
        Against(
            "blk",
            FILE,
            {SPDK: Limit(0.7, at_most=True), QEMU: Limit(0.7, at_most=True), "fio": None},
            CPU.name,
            better=True,
        ),
    ),
    Goal(
        "a filled cow disk, 4 KiB, depth 1 / 32",
        "95 % of the file itself",
        Against(
            "cow",
            [{"mode": mode, "depth": depth} for mode in ("read", "write") for depth in (1, 32)],
            {"the file itself": Limit(0.95)},
        ),
    ),
    Goal(
        "one busy among 1000 idle connected devices",
        "98 % of its speed alone",
        times("scale", {"": ({"devices": 1000}, {"devices": 0})}, IOPS.name, Limit(0.98)),
    ),
    Goal(
        "idle, 1000 connected devices",
        "under 1 % of one CPU",
        figures("idle", {"devices": 1000}, {"idle CPU": Limit(1, at_most=True)}),
    ),
    Goal(
        "the same, a queue wakes up",
        "p99 under 50 µs",
        Against(
            "idle",
            [{"devices": 1000}],
            {"bare sleeping ring": None},
            "wake-up p99",
            limit=Limit(50, at_most=True),
        ),
    ),
    Goal(
        "light guest beside a heavy one",
        "p99 within 2 times of alone",
        times(
            "fairness",
            {
                f"beside {heavy}": (
                    {"light": "beside a heavy one", "heavy": heavy},
                    {"light": "alone", "heavy": heavy},
                )
                for heavy in HEAVY
            },
            "p99",
            Limit(2, at_most=True),
        ),
    ),
    Goal(
        "events, round trip to a polling reactor",
        "0.5 times bare pyzmq's between two sleeping processes, never above 1.2 times",
        Against(
            "events",
            [{}],
            {"bare pyzmq": Limit(0.5, at_most=True), "bare pyzmq, polling": None},
            "round trip p50",
            contender="polling reactor",
        ),
    ),
    Goal(
        "events, one way",
        "70 % of bare pyzmq's rate",
        Against("events", [{}], {"bare pyzmq": Limit(0.7)}, "one way", contender="polling reactor"),
    ),
    Goal(
        "1000 controllers",
        "created in under 2 s; under 200 KB resident each",
        figures(
            "control",
            {"controllers": 1000},
            {"create": Limit(2, at_most=True), "memory": Limit(200e3 / 1024, at_most=True)},
        ),
    ),
)
