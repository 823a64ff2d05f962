"""What the unit tests share: coroutine tests run on asyncio's own loop and on ours."""

from __future__ import annotations

import asyncio
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor.loop import ReactorLoop

LOOPS = {"asyncio": asyncio.SelectorEventLoop, "reactor": ReactorLoop}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have each coroutine test once for every kind of loop."""
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("loop_kind")
        metafunc.parametrize("loop_kind", LOOPS)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    factory = LOOPS[pyfuncitem.callspec.params["loop_kind"]]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="vr-") as path:
        yield Path(path)
