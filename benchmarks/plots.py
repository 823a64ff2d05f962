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
LOADS = ("depth", "load %")  # of these, latency is shown against the rate that they lead to
PANELS = 12  # in one figure: a full matrix has its tables
COLUMNS = 3
BARS = 30

Curves = dict[str, list[tuple[float, Series]]]


def available() -> bool:
    """Whether there is something to plot with."""
    return "Figure" in globals()


def plots(result: Result) -> Iterator[tuple[str, str]]:
    """Yield title and SVG of everything that is worth looking at."""
    axes = _axes(result)
    for quantity in result.quantities():
        title = f"{quantity.name}, {quantity.unit}"
        drawn = [(axis, groups) for axis in axes if (groups := _groups(result, quantity, axis))]
        for axis, groups in drawn:
            yield f"{title}, against {axis}", _curves(quantity, axis, groups)
        if not drawn:
            yield title, _bars(result, quantity)
    if {IOPS.name, P99.name} <= {quantity.name for quantity in result.quantities()}:
        for axis in axes:
            if axis in LOADS and (groups := _groups(result, P99, axis)):
                yield "p99, µs, against rate, IOPS", _latency_against_rate(result, groups)


def _axes(result: Result) -> list[str]:
    """Return the labels of which there are several numbers."""
    values = {key: {case[key] for case in result.cases() if key in case} for key in AXES}
    return [key for key, found in values.items() if len(found) > 1]


def _groups(result: Result, quantity: Quantity, axis: str) -> dict[str, Curves]:
    """Return curves by contender, by all that stays the same along each."""
    found: dict[str, Curves] = {}
    for each in result.series:
        if each.quantity.name == quantity.name and axis in each.case:
            rest: Case = {key: value for key, value in each.case.items() if key != axis}
            curves = found.setdefault(describe(rest), {})
            curves.setdefault(each.contender, []).append((float(each.case[axis]), each))
    return {
        title: curves
        for title, curves in found.items()
        if any(len(points) > 1 for points in curves.values())
    }


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


def _curves(quantity: Quantity, axis: str, groups: dict[str, Curves]) -> str:
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

    return _panels(groups, draw)


def _latency_against_rate(result: Result, groups: dict[str, Curves]) -> str:
    def draw(axes: Any, curves: Curves) -> None:
        for name, points in curves.items():
            pairs = []
            for _, late in sorted(points, key=lambda point: point[0]):
                rate = result.find(late.case, name, IOPS.name)
                if rate is not None:
                    pairs.append((rate.median, late.median))
            axes.plot(*zip(*pairs, strict=True), marker="o", ms=3, label=name)
        axes.set_xlabel("IOPS")
        axes.set_ylabel("p99, µs")
        axes.set_yscale("log")

    return _panels(groups, draw)


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
