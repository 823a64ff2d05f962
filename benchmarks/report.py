"""Reports of runs: ``python -m benchmarks.report results/FILE.json`` writes them again.

Of several files given the later ones win: a benchmark may be measured again by itself.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from benchmarks import plots, tables
from benchmarks.goals import GOALS
from benchmarks.series import Run

STYLE = """body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: right }
th { background: #f2f2f2 } svg { max-width: 100%; height: auto } .note { color: #666 }"""
NO_PLOTS = "There are no plots: matplotlib is not installed (pip install -e .[bench])."


def goal_rows(run: Run) -> list[list[str]]:
    """Return the rows of the table of goals: work, aim, measured."""
    found = {result.name: result for result in run.results}
    return [[goal.work, goal.at_least, goal.measured(found) or "not measured"] for goal in GOALS]


def goals_markdown(run: Run) -> str:
    """Return the table of docs/performance.md."""
    return tables.markdown(["work", "at least", "measured"], goal_rows(run))


def to_markdown(run: Run) -> str:
    """Return everything but the plots."""
    parts = ["# Benchmarks", "", goals_markdown(run), "", "## Machine", ""]
    parts += [f"* {key}: {value}" for key, value in run.machine.items()]
    parts += ["", f"Options: {run.options}", "", f"Figures: {tables.LEGEND}."]
    for result in run.results:
        parts += ["", f"## {result.name}: {result.title}"]
        for grid in tables.grids(result):
            parts += ["", f"**{grid.title}**", "", tables.markdown(grid.head, grid.rows)]
            parts += ["", *(f"\\* {note}" for note in grid.notes)]
    return "\n".join(parts) + "\n"


def to_html(run: Run) -> str:
    """Return one page with everything in it."""
    page = ["<!doctype html><html lang=en><meta charset=utf-8><title>Benchmarks</title>"]
    page += [f"<style>{STYLE}</style><h1>Benchmarks</h1>"]
    page += _table(["work", "at least", "measured"], goal_rows(run))
    if not plots.available():
        page.append(f"<p class=note>{html.escape(NO_PLOTS)}</p>")
    for result in run.results:
        page.append(f"<h2>{html.escape(result.name)}: {html.escape(result.title)}</h2>")
        if plots.available():
            for title, svg in plots.plots(result):
                page.append(f"<h3>{html.escape(title)}</h3>{svg}")
        for grid in tables.grids(result):
            page.append(f"<h3>{html.escape(grid.title)}</h3>")
            page += _table(grid.head, grid.rows)
            page += [f"<p class=note>* {html.escape(note)}</p>" for note in grid.notes]
    page.append(f"<p class=note>{html.escape(tables.LEGEND)}</p><h2>Machine</h2>")
    page += _table(["what", "value"], [[key, str(value)] for key, value in run.machine.items()])
    page.append(f"<p class=note>Options: {html.escape(str(run.options))}</p></html>")
    return "\n".join(page) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table>"
    for tag, line in (("th", head), *(("td", row) for row in rows)):
        yield "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
    yield "</table>"


def write(run: Run, path: Path) -> list[Path]:
    """Write the pages beside a file of results; returns Markdown, HTML."""
    pages = [path.with_suffix(".md"), path.with_suffix(".html")]
    pages[0].write_text(to_markdown(run))
    pages[1].write_text(to_html(run))
    return pages


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--goals", is_flag=True, help="Print only the table of docs/performance.md.")
def main(files: tuple[Path, ...], goals: bool) -> None:
    """Write the report of runs (JSON FILES) again, beside the last one."""
    try:
        runs = [Run.load(path) for path in files]
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(str(error)) from None
    last = runs[-1]
    last.results = list({result.name: result for run in runs for result in run.results}.values())
    if goals:
        click.echo(goals_markdown(last))
        return
    pages = write(last, files[-1])
    click.echo(f"{pages[0]}\nopen it: xdg-open {pages[1]}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.report")
