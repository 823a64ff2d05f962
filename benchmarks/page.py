"""docs/performance.md: what of it comes from results, between marks that name it.

    <!-- goals: begin -->   the table of goals
    <!-- NAME: begin -->    the tables of the benchmark NAME, with when and where it was measured

each up to ``<!-- … : end -->``. Everything else is written by hand, and so is the last column of
the table of goals, which says why a goal is not reached: it stays, as does what was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.goals import GOALS
from benchmarks.series import Result, Run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
HEAD = ["work", "at least", "measured", "reached", "why not"]
NOT_MEASURED = "not measured"
SEPARATOR = re.compile(r"(?<!\\)\|")


def goal_rows(results: Iterable[Result], before: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Return the table of goals; ``before`` has its rows as they were: reasons, older figures."""
    found = {result.name: result for result in results}
    old = {row[0]: list(row) for row in before if len(row) == len(HEAD)}
    rows = []
    for goal in GOALS:
        row = [*goal.row(found), ""]
        if goal.work in old:
            row = old[goal.work] if row[2] == NOT_MEASURED else [*row[:-1], old[goal.work][-1]]
            row[1] = goal.at_least
        rows.append(row)
    return rows


def fill(text: str, runs: Sequence[Run], *, only_goals: bool = False) -> str:
    """Return the page with what the runs have measured; of several, the later one counts.

    ValueError if a mark is missing.
    """
    newest = {result.name: (run, result) for run in runs for result in run.results}
    rows = goal_rows((result for _, result in newest.values()), _rows(_between(text, "goals")))
    text = _replace(text, "goals", tables.markdown(HEAD, rows))
    for name, (run, result) in () if only_goals else newest.items():
        text = _replace(text, name, "\n".join(_measured(run, result)))
    return text


def fill_file(path: Path, runs: Sequence[Run], *, only_goals: bool = False) -> None:
    """Write the page anew; see ``fill``. Nothing is written if that fails."""
    path.write_text(fill(path.read_text(), runs, only_goals=only_goals))


def _measured(run: Run, result: Result) -> Iterable[str]:
    facts, options = run.machine, run.options
    when = f"{facts.get('time', '')[:10]}: {facts.get('cpu')}, {facts.get('cpus')} CPUs"
    how = f"{options.get('rounds')} rounds of {options.get('seconds')} s"
    quick = "; a quick run, which means nothing" if options.get("quick") else ""
    yield f"Measured {when}, Linux {facts.get('kernel')}, {how}{quick}."
    for grid in tables.grids(result):
        yield f"\n**{grid.title}**\n\n{tables.markdown(grid.head, grid.rows)}"
        if grid.notes:
            yield "\n" + "\n".join(f"\\* {note}" for note in grid.notes)


def _marks(text: str, name: str) -> tuple[int, int]:
    """Return where what is between the marks of a name begins and ends."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    start = text.find(begin)
    stop = text.find(end, start)
    if start < 0 or stop < 0:
        raise ValueError(
            f"the page has no lines {begin.strip()!r} and, after it, {end!r}: add them"
        )
    return start + len(begin), stop


def _between(text: str, name: str) -> str:
    start, stop = _marks(text, name)
    return text[start:stop]


def _replace(text: str, name: str, made: str) -> str:
    start, stop = _marks(text, name)
    return f"{text[:start]}{made}\n{text[stop:]}"


def _rows(table: str) -> list[list[str]]:
    """Return the cells of a table in Markdown, without its head."""
    lines = [line.strip() for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in SEPARATOR.split(line)[1:-1]] for line in lines[2:]]
    return [[cell.replace("\\|", "|") for cell in row] for row in cells]
