"""Results as tables, in the terminal and in Markdown: one for each quantity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks.series import WIDE, Case, Quantity, Result, Series
from benchmarks.suite import OURS
from vhost.io import format_size

LEGEND = (
    f"median ± half of the spread of the rounds; ! marks a spread of more than {WIDE:.0%}, which"
    " says that the figure is not to be relied on; * marks a remark below; in brackets: ours"
    " divided by it"
)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is drawn."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def grids(result: Result) -> Iterator[Grid]:
    """Yield one for each quantity."""
    for quantity in result.quantities():
        yield _grid(result, quantity)


def _grid(result: Result, quantity: Quantity) -> Grid:
    cases, names = result.cases(quantity.name), result.contenders(quantity.name)
    keys = varied(cases)
    subject = OURS if OURS in names else names[0]
    rows: list[list[str]] = []
    notes: list[str] = []
    for case in cases:
        row = [_label(key, case) for key in keys]
        ours = result.find(case, subject, quantity.name)
        for name in names:
            each = result.find(case, name, quantity.name)
            compared = name != subject and result.base in ("*", name)
            row.append(cell(each) + _ratio(ours if compared else None, each) if each else "")
            notes += each.notes if each else []
        rows.append(row)
    direction = "more is better" if quantity.higher_is_better else "less is better"
    title = f"{result.title}: {quantity.name}, {quantity.unit} ({direction})"
    return Grid(title, [*keys, *names], rows, list(dict.fromkeys(notes)))


def varied(cases: Sequence[Case]) -> list[str]:
    """Return the labels that tell cases apart."""
    keys = list(dict.fromkeys(key for case in cases for key in case))
    return [key for key in keys if len({str(case.get(key, "")) for case in cases}) > 1] or keys


def describe(case: Case) -> str:
    """Return a case in words."""
    return ", ".join(f"{key} {_label(key, case)}" for key in case)


def _label(key: str, case: Case) -> str:
    value = case.get(key, "")
    return format_size(value) if key == "block" and isinstance(value, int | float) else str(value)


def number(value: float) -> str:
    """Return three or four digits of a figure."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.2f} M"
    if size >= 1e4:
        return f"{value / 1e3:,.1f} k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def cell(series: Series, *, unit: bool = False) -> str:
    """Return median (with its unit) and spread."""
    mark = ("!" if series.wide else "") + ("*" if series.notes else "")
    spread = f" ± {series.spread * 50:.0f} %" if len(series.samples) > 1 else ""
    return number(series.median) + (f" {series.quantity.unit}" if unit else "") + spread + mark


def _ratio(ours: Series | None, base: Series) -> str:
    if ours is None or not base.median:
        return ""
    return f" [{ours.median / base.median:.2f}]"


def terminal(grid: Grid) -> Table:
    """Return the table for a terminal; title and notes are the caller's to print."""
    table = Table(box=box.SIMPLE)
    for name in grid.head:
        table.add_column(name, justify="right")
    for row in grid.rows:
        table.add_row(*(escape(each) for each in row))
    return table


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
