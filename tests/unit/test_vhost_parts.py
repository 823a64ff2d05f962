"""Small parts of the back-end: placement of queues, and log lines that a peer can cause."""

from __future__ import annotations

import logging

import pytest

from vhost.placement import Placement
from vhost.ratelimit import LimitedLog


def test_a_queue_goes_where_there_are_fewest() -> None:
    placement = Placement()
    assert [placement.place([0, 1, 2]) for _ in range(5)] == [0, 1, 2, 0, 1]
    placement.release(1)
    placement.release(1)
    assert placement.place([0, 1, 2]) == 1


def test_only_the_cpus_that_are_given_are_used() -> None:
    placement = Placement()
    assert [placement.place([4]) for _ in range(3)] == [4, 4, 4]
    assert placement.place([4, 7]) == 7
    assert placement.load(4) == 3


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_past_the_limit_are_counted_and_said_later(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = LimitedLog(logging.getLogger("test"), burst=2, period=10.0, clock=clock)
    for line in range(5):
        limited.warning(f"line {line}")
    assert caplog.messages == ["line 0", "line 1"]
    clock.now += 10.0
    limited.warning("line 5")
    limited.warning("line 6")
    assert caplog.messages[2:] == ["line 5 (3 lines before this one were left out)"]


def test_a_long_silence_earns_no_more_than_a_burst(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = LimitedLog(logging.getLogger("test"), burst=2, period=1.0, clock=clock)
    clock.now += 1000.0
    for line in range(5):
        limited.warning(f"line {line}")
    assert len(caplog.messages) == 2


def test_lines_for_information_are_limited_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    limited = LimitedLog(logging.getLogger("test"), burst=2, clock=Clock())
    for line in range(5):
        limited.info(f"line {line}")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "line 0"),
        ("INFO", "line 1"),
    ]
