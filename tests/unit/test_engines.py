"""Which way to the kernel a file disk takes, and what it says of that."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bdev.kind import OperationError
from tests.support.bdevs import Bench, on_bench
from tests.support.denied import NUMBERS

pytestmark = pytest.mark.skipif(
    platform.machine() not in NUMBERS, reason="numbers of system calls are not known"
)

READ = "w" * 512 + "\0" * 512 + "v" * 512


def run(path: Path, *denied: str) -> tuple[list[list[str]], str]:
    """Return what a process prints and logs that may not make some system calls."""
    path.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-m", "tests.support.denied", str(path), *denied]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize(
    ("denied", "engine"),
    [
        ([], "io_uring"),
        (["io_uring_setup"], "aio"),
        (["io_uring_setup", "io_setup"], "threads"),
    ],
)
def test_the_first_that_is_allowed_is_taken_and_said_once(
    denied: list[str], engine: str, tmp_path: Path
) -> None:
    printed, logged = run(tmp_path / "disk", *denied)
    assert printed == [[engine, READ]] * 2
    said = logged.count("file disks go without io_uring")
    assert said == (1 if denied else 0), logged
    assert not denied or f"a seccomp profile forbids it), by {engine}" in logged


@on_bench()
async def test_a_file_without_direct_io_is_threads_work_where_there_is_no_io_uring(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AIO would block the reactor."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    monkeypatch.setattr("bdev.backing._enable_direct", lambda *_: (1, 1))
    with pytest.raises(OperationError, match="engine aio: without O_DIRECT"):
        await bench.rpc("bdev_aio_create", name="F", filename=str(path), engine="aio")
    assert list(bench.registry) == []
    await bench.rpc("bdev_aio_create", name="F", filename=str(path), engine="threads")
    io = await bench.open("F")
    io.write(512, b"x" * 512, fua=True)
    assert path.read_bytes()[512:1024] == b"x" * 512
    await bench.close("F")


@on_bench()
async def test_an_engine_that_was_asked_for_is_saved(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    for engine in ("io_uring", "aio", "threads", None):
        given = {} if engine is None else {"engine": engine}
        await bench.rpc("bdev_aio_create", name="F", filename=str(path), **given)
        (call,) = bench.registry.config()
        assert call["params"].get("engine") == engine
        await bench.rpc("bdev_aio_delete", name="F")
        await bench.rpc(call["method"], **call["params"])
        (entry,) = await bench.rpc("bdev_get_bdevs", name="F")
        assert entry["driver_specific"]["aio"]["engine"] == (engine or "io_uring")
        await bench.rpc("bdev_aio_delete", name="F")


@on_bench()
async def test_disks_of_all_engines_share_a_reactor(bench: Bench, tmp_path: Path) -> None:
    """One fence tells of all of them, and is let go with the last."""
    ios = {}
    for engine in ("io_uring", "aio", "threads"):
        path = tmp_path / engine
        path.write_bytes(engine.encode().ljust(1 << 20))
        await bench.rpc("bdev_aio_create", name=engine, filename=str(path), engine=engine)
        ios[engine] = await bench.open(engine)
    for engine, io in ios.items():
        assert io.read(0, 512).split() == [engine.encode()]
    for engine in ios:
        await bench.close(engine)
    await bench.registry.reactor_lost(bench.reactor)


@on_bench()
async def test_an_engine_that_there_is_not_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(OperationError, match="engine"):
        await bench.rpc("bdev_aio_create", name="F", filename=str(tmp_path), engine="posix")
