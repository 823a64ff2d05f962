"""``python -m benchmarks [NAME …]``: run benchmarks, print tables, and write a report."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from benchmarks import machine, page, report, suite, tables
from benchmarks.series import Result, Run
from benchmarks.suite import Benchmark, Options, Session, UnavailableError
from vhost.frontend_link import FrontendError

RESULTS = Path(__file__).resolve().parent.parent / "results"


def parse_pair(_ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> object:
    """Return (key, value) of each "key=value"."""
    pairs = [value.partition("=") for value in values]
    for key, sign, value in pairs:
        if not (key and sign and value):
            raise click.BadParameter(f"{key + sign + value!r}: write {param.metavar}")
    return tuple((key, value) for key, _, value in pairs)


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as may be: each of a thousand front-ends has some."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check(names: Sequence[str], known: Iterable[str], cpus: Sequence[int]) -> None:
    """Raise UsageError for what is no benchmark, and for a CPU that is not there."""
    for name in names:
        if name not in known:
            raise click.UsageError(f"there is no benchmark {name!r}; there are: {', '.join(known)}")
    for cpu in cpus:
        if cpu not in os.sched_getaffinity(0):
            raise click.UsageError(f"CPU {cpu} is not available: use --driver-cpu, --server-cpu")


def run_one(benchmark: Benchmark, options: Options, console: Console) -> Result | None:
    """Run one benchmark; None, with the reason printed, if it cannot run here.

    One that fails raises RuntimeError, or what a front-end or the system has to say.
    """
    result = Result(benchmark.name, benchmark.title, benchmark.base)
    try:
        benchmark.check()
        benchmark.run(Session(options, result, console))
    except UnavailableError as reason:
        console.print(f"{benchmark.name}: left out: {reason}", style="yellow")
        if not result.series:
            return None
    for grid in tables.grids(result):
        console.print(grid.title, style="bold", markup=False)
        console.print(tables.terminal(grid))
        for note in grid.notes:
            console.print(f"* {note}", markup=False)
    return result


@click.command()
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="One short round of few cases: does everything run?")
@click.option("--full", is_flag=True, help="All cases; takes hours.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.01),
    default=0.5,
    show_default=True,
    help="Of each measurement.",
)
@click.option(
    "--only",
    multiple=True,
    callback=parse_pair,
    metavar="LABEL=VALUE",
    help="Only such cases, as disk=null or depth=1; may be repeated.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    callback=parse_pair,
    metavar="NAME=COMMAND",
    help="Another server: a shell command with {socket}, {device}, {disk}, {size}, {file}, {cpu}.",
)
@click.option("--driver-cpu", type=int, default=0, show_default=True, help="Of the front-end.")
@click.option("--server-cpu", type=int, default=1, show_default=True, help="Of the targets.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path.cwd,
    help="Where file disks lie; default: here.",
)
@click.option(
    "--huge",
    is_flag=True,
    help="Guests in blk, scsi, latency have huge pages, set aside with sysctl vm.nr_hugepages.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder for results; default: results/.",
)
@click.option("--page", "to_page", is_flag=True, help="Fill docs/performance.md from the results.")
def main(
    names: tuple[str, ...],
    quick: bool,
    full: bool,
    rounds: int,
    seconds: float,
    only: tuple[tuple[str, str], ...],
    peers: tuple[tuple[str, str], ...],
    driver_cpu: int,
    server_cpu: int,
    folder: Path,
    huge: bool,
    output: Path,
    to_page: bool,
) -> None:
    """Measure, beside what we measure ourselves against, in the same run; by default everything."""
    known = suite.find()
    check(names, known, (driver_cpu, server_cpu))
    if quick:
        rounds, seconds = 1, 0.05
    options = Options(
        quick, full, rounds, seconds, only, peers, driver_cpu, server_cpu, folder.resolve(), huge
    )
    console = Console(width=max(120, Console().width))
    raise_descriptor_limit()
    kept = {**asdict(options), "folder": str(folder), "command": sys.argv[1:]}
    run = Run(machine.facts(), kept)
    path = output / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    failed = []
    for name in names or known:
        console.rule(known[name].title)
        try:
            found = run_one(known[name], options, console)
        except (RuntimeError, FrontendError, OSError) as error:
            console.print(f"{name}: failed: {error}", style="red", markup=False)
            failed.append(name)
            continue
        if found is not None:
            run.results.append(found)
            run.save(path)  # what is measured is kept, whatever happens later
    if not run.results:
        raise click.ClickException("nothing was measured")
    finish(run, path, console, to_page=to_page)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; see above")


def finish(run: Run, path: Path, console: Console, *, to_page: bool) -> None:
    """Write the report, say where everything is, and fill the page of documentation if asked to."""
    pages = report.write(run, path)
    console.print(f"figures: {tables.LEGEND}", markup=False)
    console.print(f"every sample: {path}\nreport: {' and '.join(str(page) for page in pages)}")
    console.print(f"open it: xdg-open {pages[-1]}")
    if to_page:
        try:
            page.fill_file(page.PAGE, [run])
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        console.print(f"filled: {page.PAGE}", markup=False)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
