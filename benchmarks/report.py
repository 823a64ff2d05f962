"""Reports of runs: ``python -m benchmarks.report results/FILE.json`` writes them again.

Of several files given the later ones win: a benchmark may be measured again by itself.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from benchmarks import page, plots, tables
from benchmarks.series import Run

STYLE = """body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: right }
th { background: #f2f2f2 } svg { max-width: 100%; height: auto } .note { color: #666 }"""
NO_PLOTS = "There are no plots: matplotlib is not installed (pip install -e .[bench])."


def goals_markdown(run: Run) -> str:
    """Return the table of goals."""
    return tables.markdown(page.HEAD[:-1], _goals(run))


def _goals(run: Run) -> list[list[str]]:
    """Return its rows, without the reasons, which only docs/performance.md has."""
    return [row[:-1] for row in page.goal_rows(run.results)]


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
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Benchmarks</title>"]
    parts += [f"<style>{STYLE}</style><h1>Benchmarks</h1>"]
    parts += _table(page.HEAD[:-1], _goals(run))
    if not plots.available():
        parts.append(f"<p class=note>{html.escape(NO_PLOTS)}</p>")
    for result in run.results:
        parts.append(f"<h2>{html.escape(result.name)}: {html.escape(result.title)}</h2>")
        if plots.available():
            for title, svg in plots.plots(result):
                parts.append(f"<h3>{html.escape(title)}</h3>{svg}")
        for grid in tables.grids(result):
            parts.append(f"<h3>{html.escape(grid.title)}</h3>")
            parts += _table(grid.head, grid.rows)
            parts += [f"<p class=note>* {html.escape(note)}</p>" for note in grid.notes]
    parts.append(f"<p class=note>{html.escape(tables.LEGEND)}</p><h2>Machine</h2>")
    parts += _table(["what", "value"], [[key, str(value)] for key, value in run.machine.items()])
    parts.append(f"<p class=note>Options: {html.escape(str(run.options))}</p></html>")
    return "\n".join(parts) + "\n"


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
@click.option(
    "--goals", is_flag=True, help="Only fill the table of goals on the page, and print it."
)
@click.option("--page", "whole", is_flag=True, help="Fill all of the page from the results.")
@click.option(
    "--to",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=page.PAGE,
    help="The page; default: docs/performance.md.",
)
def main(files: tuple[Path, ...], goals: bool, whole: bool, to: Path) -> None:
    """Write the report of runs (JSON FILES) again, beside the last one."""
    try:
        runs = [Run.load(path) for path in files]
        if goals or whole:
            page.fill_file(to, runs, only_goals=not whole)
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(str(error)) from None
    last = runs[-1]
    last.results = list({result.name: result for run in runs for result in run.results}.values())
    if goals:
        click.echo(goals_markdown(last))
    if goals or whole:
        click.echo(f"filled: {to}")
        return
    pages = write(last, files[-1])
    click.echo(f"{pages[0]}\nopen it: xdg-open {pages[1]}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.report")
