"""Options of ``vhost-reactor io``, and what is made of them before anything is sent."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vhost.io import complaints, format_size, io_command, parse_size
from vhost.results import Direction, Mismatch, Results
from vhost.workload import Workload


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("1m", 1 << 20),
        ("2 GiB", 2 << 30),
        ("1TB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "4kk", "4x", "1.5m", "0x200"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: write 512, 4k"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1023), st.sampled_from(["", "k", "m", "g"]))
def test_sizes_print_as_they_are_written(number: int, unit: str) -> None:
    printed = format_size(parse_size(f"{number}{unit}"))
    assert parse_size(printed) == parse_size(f"{number}{unit}")


@given(
    size=st.integers(min_value=1, max_value=1000),
    queues=st.integers(min_value=1, max_value=16),
    requests=st.integers(min_value=0, max_value=1000),
)
def test_queues_share_the_range_without_gap_or_overlap(
    size: int, queues: int, requests: int
) -> None:
    work = Workload(size=size * 4096, offset=512, requests=requests)
    parts = [work.part(index, queues) for index in range(queues)]
    at = work.offset
    for part in parts:
        assert part.offset == at
        assert part.size % work.block_size == 0
        at += part.size
    assert at == work.offset + work.size
    assert sum(part.requests for part in parts) >= requests


@given(st.lists(st.integers(min_value=1, max_value=1000), min_size=1))
def test_percentiles_are_ordered_and_within_what_was_seen(latencies: list[int]) -> None:
    direction = Direction(
        ops=len(latencies),
        latency_max=float(max(latencies)),
        histogram={float(value): latencies.count(value) for value in set(latencies)},
    )
    found = [direction.percentile(percent) for percent in (1, 50, 90, 99, 100)]
    assert found == sorted(found)
    assert found[-1] == max(latencies)
    assert sum(value <= direction.percentile(50) for value in latencies) * 2 >= len(latencies)


def test_a_ring_has_room_for_every_descriptor() -> None:
    assert Workload(size=0, depth=128).queue_size() == 512
    assert Workload(size=0, depth=128, indirect=True).queue_size() == 128
    assert Workload(size=0, depth=1).queue_size() == 128


def test_complaints_say_where_data_were_wrong() -> None:
    results = Results(mismatches=1, mismatch=[Mismatch(4104, b"12345678", b"87654321")])
    (line,) = complaints(results, Workload(size=0))
    assert line == "wrong data at byte 4104: expected 3132333435363738, got 3837363534333231"


def test_reading_nothing_that_can_be_verified_is_a_failure() -> None:
    lines = complaints(Results(unwritten=8), Workload(size=0, mode="read", verify=True))
    assert lines == [
        "nothing was verified: the range holds no pattern, write it first with --rw write --verify"
    ]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(io_command, list(arguments))
    return result.exit_code, result.output


def test_no_such_socket(tmp_path: Path) -> None:
    code, output = invoke(str(tmp_path / "none"))
    assert code == 1
    assert "no such socket" in output


def test_a_socket_that_nobody_serves(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    code, output = invoke(str(path))
    assert code == 1
    assert "nothing listens there" in output


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("--bs", "4q", "is not a size"),
        ("--rw", "backwards", "is not one of"),
        ("--iodepth", "0", "not in the range"),
        ("--rwmixread", "101", "not in the range"),
        ("--cpus", "a", "is no list of CPUs"),
        ("--cpus", "0,99999", "there is no CPU 99999"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, option: str, value: str, hint: str) -> None:
    code, output = invoke(str(tmp_path / "none"), option, value)
    assert code == 2
    assert option in output
    assert hint in output


def test_results_are_json() -> None:
    results = Results(read=Direction(ops=2, bytes=8192, seconds=2.0, histogram={1e-5: 2}))
    wire = json.loads(json.dumps(results.to_json()))
    assert wire["read"]["iops"] == 1.0
    assert wire["total"]["ops"] == 2
