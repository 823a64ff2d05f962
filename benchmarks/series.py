"""The result format that all benchmarks share: samples with their unit, and a file of them.

A *case* says what was done (``{"disk": "null", "depth": 32}``), a *contender* who did it, a
*quantity* what of it was measured. There is one sample for each round.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
WIDE = 0.2  # a spread of more than that is not quoted without a mark

Label = str | int | float
Case = dict[str, Label]


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that is measured: its unit, and which direction is good."""

    name: str
    unit: str
    higher_is_better: bool = False


IOPS = Quantity("rate", "IOPS", higher_is_better=True)
P50 = Quantity("p50", "µs")
P99 = Quantity("p99", "µs")
CPU = Quantity("CPU", "µs/IO")


@dataclass(slots=True)
class Series:
    """The samples of one quantity, of one contender, in one case."""

    case: Case
    contender: str
    quantity: Quantity
    samples: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the lowest and the highest sample, as a part of the median."""
        middle = self.median
        return (max(self.samples) - min(self.samples)) / middle if middle else 0.0

    @property
    def wide(self) -> bool:
        """Whether the samples differ too much for the median to mean anything."""
        return self.spread > WIDE


@dataclass(slots=True)
class Result:
    """All that one benchmark has measured. ``base`` is the contender that ratios are made with."""

    name: str
    title: str
    base: str = ""
    series: list[Series] = field(default_factory=list)

    def find(self, case: Case, contender: str, quantity: str) -> Series | None:
        """Return the series of that name; None if there is none."""
        for each in self.series:
            if (each.contender, each.quantity.name) == (contender, quantity) and each.case == case:
                return each
        return None

    def add(self, case: Case, contender: str, quantity: Quantity, sample: float) -> Series:
        """Count a sample to its series, which begins with its first sample."""
        found = self.find(case, contender, quantity.name)
        if found is None:
            found = Series(dict(case), contender, quantity)
            self.series.append(found)
        found.samples.append(sample)
        return found

    def cases(self, quantity: str = "") -> list[Case]:
        """Return the cases (in which a quantity was measured), in their order."""
        found: list[Case] = []
        for each in self.series:
            if quantity in ("", each.quantity.name) and each.case not in found:
                found.append(each.case)
        return found

    def contenders(self, quantity: str = "") -> list[str]:
        """Return the contenders (of which a quantity was measured), in their order."""
        names = (each.contender for each in self.series if quantity in ("", each.quantity.name))
        return list(dict.fromkeys(names))

    def quantities(self) -> list[Quantity]:
        """Return what was measured."""
        return list(dict.fromkeys(each.quantity for each in self.series))


@dataclass(slots=True)
class Run:
    """One run of the suite: a file in ``results/``."""

    machine: dict[str, Any]
    options: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything, every sample included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        part = path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what save() wrote; ValueError for anything else."""
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path} is no result of this suite (format {FORMAT})")
        results = []
        for each in raw["results"]:
            series = [
                Series(**{**s, "quantity": Quantity(**s["quantity"])}) for s in each["series"]
            ]
            results.append(Result(**{**each, "series": series}))
        return cls(raw["machine"], raw["options"], results)
