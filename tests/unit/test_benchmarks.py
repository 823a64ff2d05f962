"""The suite of benchmarks: what it makes of samples, and that a worse hot path is noticed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import goals, instructions, page, plots, report, suite, tables
from benchmarks.__main__ import main
from benchmarks.recovery import PAUSE
from benchmarks.series import CPU, IOPS, P50, P99, Case, Quantity, Result, Run
from benchmarks.suite import OURS, Options

NULL: Case = {"disk": "null", "block": 512, "mode": "randread", "ring": "split", "queues": 1}


def made() -> Run:
    """Return a run in which ours is three times as fast as a peer."""
    result = Result("blk", "virtio-blk", base="*")
    for depth in (1, 128):
        for sample in (0.9e6, 1.0e6, 1.1e6):
            result.add({**NULL, "depth": depth}, OURS, IOPS, 3 * sample * depth)
            result.add({**NULL, "depth": depth}, "spdk", IOPS, sample * depth)
            result.add({**NULL, "depth": depth}, OURS, P50, sample / 1e6)
    return Run({"cpu": "a < b"}, {}, [result])


def test_a_saved_run_is_read_back_with_every_sample(tmp_path: Path) -> None:
    made().save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == made()


def test_a_file_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of this suite"):
        Run.load(tmp_path / "other.json")


def test_a_table_has_medians_spreads_and_ratios() -> None:
    rate = next(iter(tables.grids(made().results[0])))
    assert rate.head == ["depth", OURS, "spdk"]
    assert rate.rows[0] == ["1", "3.00 M ± 10 %", "1.00 M ± 10 % [3.00]"]


def test_a_wide_spread_is_marked() -> None:
    result = Result("x", "x")
    for sample in (100.0, 130.0, 160.0):
        series = result.add({}, OURS, IOPS, sample)
    assert series.wide
    assert tables.cell(series) == "130 ± 23 %!"


def test_goals_quote_what_was_measured_and_say_what_was_not() -> None:
    rows = page.goal_rows(made().results)
    assert len(rows) == len(goals.GOALS)
    assert rows[0][2:] == ["384.00 M IOPS ± 10 %, 3.00 times spdk", "yes", ""]
    assert rows[-1][2:] == ["not measured", "", ""]


def judged(goal: goals.Against, **figures: float) -> bool | None:
    result = Result("x", "x")
    for contender, figure in figures.items():
        result.add({}, OURS if contender == "ours" else contender, IOPS, figure)
    (finding,) = goal({"x": result})
    return finding.reached


def test_a_goal_is_judged_by_each_of_its_limits() -> None:
    goal = goals.Against("x", [{}], {"a": goals.Limit(2), "b": None}, limit=goals.Limit(10))
    assert judged(goal, ours=10, a=5, b=1000) is True
    assert judged(goal, ours=10, a=6) is False
    assert judged(goal, ours=9, a=1) is False
    assert judged(goal, ours=10) is True
    unlimited = goals.Against("x", [{}], {"a": goals.Limit(2)})
    assert judged(unlimited, ours=10) is None  # there is nothing to compare it with


def test_a_goal_may_ask_for_the_better_of_two_peers() -> None:
    limit = goals.Limit(0.7, at_most=True)
    goal = goals.Against("x", [{}], {"a": limit, "b": limit}, better=True)
    assert judged(goal, ours=7, a=10, b=100) is True
    assert judged(goal, ours=7, a=100, b=9) is False


PAGE = """by hand
<!-- goals: begin -->
| work | at least | measured | reached | why not |
|---|---|---|---|---|
| null, 512 B, depth 128, one queue | old | old | no | the machine \\| ours |
| 1000 controllers | old | 1.9 s | yes |  |
<!-- goals: end -->
<!-- blk: begin -->
old
<!-- blk: end -->
"""


def test_a_page_gets_new_figures_and_keeps_reasons_and_what_was_not_measured() -> None:
    text = page.fill(PAGE, [made()])
    assert text.startswith("by hand\n")
    assert "times spdk | yes | the machine \\| ours |\n" in text
    assert "| created in under 2 s; under 200 KB resident each | 1.9 s | yes |  |" in text
    assert "\nold\n" not in text
    assert "| 1 | 3.00 M ± 10 % | 1.00 M ± 10 % [3.00] |" in text
    assert page.fill(text, [made()]) == text


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("by hand\n")
    with pytest.raises(ValueError, match="no lines '<!-- goals: begin -->'"):
        page.fill_file(tmp_path / "page.md", [made()])
    assert (tmp_path / "page.md").read_text() == "by hand\n"


def test_goals_alone_are_filled_by_the_report_command(tmp_path: Path) -> None:
    made().save(tmp_path / "run.json")
    (tmp_path / "page.md").write_text(PAGE)
    command = [str(tmp_path / "run.json"), "--goals", "--to", str(tmp_path / "page.md")]
    answer = CliRunner().invoke(report.main, command)
    assert (answer.exit_code, "384.00 M" in answer.output) == (0, True)
    text = (tmp_path / "page.md").read_text()
    assert ("384.00 M" in text, "\nold\n" in text) == (True, True)


def test_the_page_of_this_repository_has_a_place_for_every_benchmark() -> None:
    run = Run({}, {}, [Result(name, name) for name in suite.find()])
    assert page.fill(page.PAGE.read_text(), [run])


def test_a_report_escapes_what_it_quotes(tmp_path: Path) -> None:
    pages = report.write(made(), tmp_path / "run.json")
    assert [page.suffix for page in pages] == [".md", ".html"]
    assert "a &lt; b" in pages[1].read_text()
    assert "3.00 M ± 10 %" in pages[0].read_text()


def titles(name: str, cases: list[Case], *quantities: Quantity) -> list[str]:
    """Return the titles of the plots of two contenders in these cases."""
    result = Result(name, name)
    for case, quantity in itertools.product(cases, quantities):
        for contender in (OURS, "other"):
            result.add(case, contender, quantity, 1.0)
    drawn = list(plots.plots(result))
    assert all(svg.startswith("<svg") and OURS in svg for _, svg in drawn)
    return [title for title, _ in drawn]


@pytest.mark.skipif(not plots.available(), reason="matplotlib is not there")
def test_the_four_plots() -> None:
    depths: list[Case] = [{"depth": depth} for depth in (1, 32)]
    blk = titles("blk", depths, IOPS, P99)
    assert {"p99, µs, against rate, IOPS", "rate, IOPS, against depth"} <= set(blk)
    devices: list[Case] = [{"devices": count} for count in (0, 1000)]
    assert titles("scale", devices, CPU) == ["CPU, µs/IO, against devices"]
    events: list[Case] = [{"event": event} for event in ("reactor killed", "moved")]
    assert titles("recovery", events, PAUSE) == ["longest request, ms"]


def test_only_cases_that_have_the_labels_asked_for_are_wanted() -> None:
    options = Options(only=(("disk", "null"), ("disk", "file"), ("depth", "1")))
    assert options.wanted({"disk": "file", "depth": 1})
    assert not options.wanted({"disk": "malloc", "depth": 1})
    assert not options.wanted({"disk": "null", "depth": 32})
    assert options.wanted({"devices": 10})


def test_too_little_memory_is_a_reason_to_leave_out() -> None:
    with pytest.raises(suite.UnavailableError, match="MiB that are free"):
        suite.require_memory(1 << 60)


def test_every_benchmark_is_found() -> None:
    assert {"blk", "events", "idle", "instructions", "recovery"} <= set(suite.find())


def test_a_name_that_is_no_benchmark_is_refused() -> None:
    answer = CliRunner().invoke(main, ["nonsense"])
    assert answer.exit_code == 2
    assert "there is no benchmark 'nonsense'" in answer.output


def test_more_instructions_than_the_tolerance_are_reported() -> None:
    before = {"read": 100.0, "write": 100.0, "gone": 1.0}
    lines = instructions.compare({"read": 103.1, "write": 102.9, "new": 1.0}, before)
    assert lines == [
        "gone: not in what was counted",
        "new: not in the baseline",
        "read: 103.1, was 100.0 (+3.1%)",
    ]


def test_the_baseline_names_its_compiler() -> None:
    baseline = json.loads(instructions.BASELINE.read_text())
    assert baseline["compiler"].startswith("gcc ")
    assert all(count > 0 for count in baseline["counts"].values())
