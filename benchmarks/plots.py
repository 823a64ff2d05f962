"""Plots of results as SVG: over whatever was varied, or bars where nothing numeric was.

matplotlib is needed for that (``pip install -e .[bench]``); without it a report has tables only.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from benchmarks.series import IOPS, P99, Case, Quantity, Result, Series
from benchmarks.tables import describe

with suppress(ModuleNotFoundError):
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "font.size": 8, "axes.grid": True})
    from matplotlib.figure import Figure

AXES = ("depth", "devices", "busy", "reactors", "receivers", "controllers", "queues", "load %")
PANELS = 12  # in one figure: a full matrix has its tables
COLUMNS = 3
BARS = 30

Curves = dict[str, list[tuple[float, Series]]]


def available() -> bool:
    """Whether there is something to plot with."""
    return "Figure" in globals()


def plots(result: Result) -> Iterator[tuple[str, str]]:
    """Yield title and SVG of everything that is worth looking at."""
    axis = _axis(result)
    for quantity in result.quantities():
        title = f"{quantity.name}, {quantity.unit}"
        if axis is None:
            yield title, _bars(result, quantity)
        else:
            yield f"{title}, against {axis}", _curves(result, quantity, axis)
    names = {quantity.name for quantity in result.quantities()}
    if axis is not None and {IOPS.name, P99.name} <= names:
        yield "p99, µs, against rate, IOPS", _latency_against_rate(result, axis)


def _axis(result: Result) -> str | None:
    """Return the label that is varied over the widest range of numbers."""
    counts = {
        key: len({case[key] for case in result.cases() if key in case})
        for key in AXES
        if any(key in case for case in result.cases())
    }
    best = max(counts, key=lambda key: counts[key], default=None)
    return best if best is not None and counts[best] > 1 else None


def _groups(result: Result, quantity: Quantity, axis: str) -> dict[str, Curves]:
    """Return curves by contender, by all that stays the same along each."""
    found: dict[str, Curves] = {}
    for each in result.series:
        if each.quantity.name == quantity.name and axis in each.case:
            rest: Case = {key: value for key, value in each.case.items() if key != axis}
            curves = found.setdefault(describe(rest), {})
            curves.setdefault(each.contender, []).append((float(each.case[axis]), each))
    return found


def _panels(groups: dict[str, Curves], draw: Callable[[Any, Curves], None]) -> str:
    shown = list(groups.items())[:PANELS]
    rows = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for place, (title, curves) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(title)
        draw(axes, curves)
        axes.legend(fontsize=6)
    return _svg(figure)


def _curves(result: Result, quantity: Quantity, axis: str) -> str:
    def draw(axes: Any, curves: Curves) -> None:
        for name, points in curves.items():
            points = sorted(points, key=lambda point: point[0])
            at = [x for x, _ in points]
            middle = [each.median for _, each in points]
            below = [each.median - min(each.samples) for _, each in points]
            above = [max(each.samples) - each.median for _, each in points]
            axes.errorbar(at, middle, yerr=[below, above], marker="o", ms=3, capsize=2, label=name)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlabel(axis)
        axes.set_ylabel(f"{quantity.name}, {quantity.unit}")
        axes.set_ylim(bottom=0)

    return _panels(_groups(result, quantity, axis), draw)


def _latency_against_rate(result: Result, axis: str) -> str:
    def draw(axes: Any, curves: Curves) -> None:
        for name, points in curves.items():
            pairs = []
            for _, rate in sorted(points, key=lambda point: point[0]):
                late = result.find(rate.case, name, P99.name)
                if late is not None:
                    pairs.append((rate.median, late.median))
            if pairs:
                axes.plot(*zip(*pairs, strict=True), marker="o", ms=3, label=name)
        axes.set_xlabel("IOPS")
        axes.set_ylabel("p99, µs")
        axes.set_yscale("log")

    groups = _groups(result, IOPS, axis)
    measured = {
        title: kept
        for title, curves in groups.items()
        if (kept := {n: p for n, p in curves.items() if result.find(p[0][1].case, n, P99.name)})
    }
    return _panels(measured, draw)


def _bars(result: Result, quantity: Quantity) -> str:
    shown = [each for each in result.series if each.quantity.name == quantity.name][:BARS]
    figure = Figure(figsize=(8, 0.8 + 0.26 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{describe(each.case)}  {each.contender}".strip() for each in shown]
    middle = [each.median for each in shown]
    below = [each.median - min(each.samples) for each in shown]
    above = [max(each.samples) - each.median for each in shown]
    axes.barh(range(len(shown)), middle, xerr=[below, above], capsize=2)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{quantity.name}, {quantity.unit}")
    return _svg(figure)


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
