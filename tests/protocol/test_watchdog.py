"""Reactors that live but do not turn are found and replaced; those that do are let live."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from reactor import watchdog as watchdog_module
from reactor.child import Process
from reactor.cluster import Cluster
from reactor.watchdog import Watchdog
from tests.protocol.test_cluster import run_dir, running, until
from tests.support.adoption import DISKS, Disk, cluster, load, serve

__all__ = ["run_dir"]

PATIENCE = 0.4


@contextlib.asynccontextmanager
async def watched(run_dir: Path) -> AsyncIterator[Cluster]:
    async with running(run_dir) as made:
        watchdog = Watchdog(made, PATIENCE)
        watchdog.start()
        try:
            yield made
        finally:
            await watchdog.stop()


@pytest.mark.parametrize("disk", [DISKS[0], DISKS[3]], ids=str)
def test_a_reactor_that_is_stopped_under_load_is_replaced_and_nothing_is_lost(disk: Disk) -> None:
    with cluster("0x3", ["--watchdog", str(PATIENCE)]) as target:
        serve(target, disk)
        with load(target, disk, queues=4):
            before = target.reactors()
            os.kill(before[0], signal.SIGSTOP)
            deadline = time.monotonic() + 30
            while target.reactors()[0] in (before[0], None):
                assert time.monotonic() < deadline, target.log
                time.sleep(0.02)
            assert target.reactors()[1] == before[1]
            assert f"reactor-0 (pid {before[0]}) has not turned for" in target.log
        target.stop()


def test_nobody_is_killed_after_the_whole_machine_stood_still() -> None:
    with cluster(arguments=["--watchdog", str(PATIENCE)]) as target:
        serve(target, DISKS[0])
        with load(target, DISKS[0]) as running_load:
            before = target.reactors()
            stopped = [target.pid, before[0]]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(3 * PATIENCE)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            running_load.progress()
            assert target.reactors() == before
        target.stop()


@pytest.mark.parametrize("how", ["test_spin", "test_block"])
async def test_a_reactor_that_loops_or_waits_is_killed(how: str, run_dir: Path) -> None:
    async with watched(run_dir) as made:
        reactor = made.reactors[0]
        child = reactor.child
        assert child is not None
        made._peers.get(reactor.name).send(how, None)
        async with asyncio.timeout(30):
            assert await child.wait() == -signal.SIGKILL
        await until(lambda: reactor.restarts == 1 and reactor.state == "running")


async def test_a_reactor_that_sleeps_is_only_woken(run_dir: Path) -> None:
    async with watched(run_dir) as made:
        reactor = made.reactors[0]

        async def events() -> int:
            told = await made.call(reactor, "reactor_get_stats")
            return int(told["events"]["received"])

        # As many as it takes to find that one is hung; between them it turns for them alone.
        async with asyncio.timeout(30):
            while await events() < 3 * watchdog_module.LOOKS:  # noqa: ASYNC110
                await asyncio.sleep(PATIENCE)
        assert reactor.restarts == 0


async def test_a_reactor_that_carries_out_a_call_may_take_longer(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog_module, "AT_WORK", 3)
    async with watched(run_dir) as made:
        with pytest.raises(ConnectionResetError):
            await made.call(made.reactors[0], "test_block", timeout=None)
        assert f"has not turned for {3 * PATIENCE:.1f} s" in caplog.text


async def test_a_patience_of_0_watches_nobody(run_dir: Path) -> None:
    async with running(run_dir) as made:
        watchdog = Watchdog(made, 0)
        watchdog.start()
        assert asyncio.all_tasks() - {asyncio.current_task()} == set(made._supervisors)
        await watchdog.stop()


@contextlib.contextmanager
def python(code: str) -> Iterator[Process]:
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        process = Process(child.pid, os.pidfd_open(child.pid))
        try:
            yield process
        finally:
            process.end_blocking(0)


def status(process: Process) -> Any:
    return psutil.Process(process.pid).status()


async def test_who_is_traced_is_let_live() -> None:
    trace_me = "import ctypes, os, signal; ctypes.CDLL(None).ptrace(0, 0, 0, 0);"
    with python(trace_me + "os.kill(os.getpid(), signal.SIGSTOP)") as process:
        await until(lambda: status(process) == psutil.STATUS_TRACING_STOP)
        assert watchdog_module._excuse(process, 0, 1) == "a debugger has it"


async def test_who_wants_a_cpu_and_gets_none_is_let_live() -> None:
    with python("while True: pass") as process:
        await until(lambda: status(process) == psutil.STATUS_RUNNING)
        assert watchdog_module._excuse(process, 0, seconds=1e9) == "it gets no CPU"
        assert watchdog_module._excuse(process, 0, seconds=0) is None
