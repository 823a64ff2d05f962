"""The process in reserve: it takes the place of a reactor that dies, and is itself replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from reactor import cluster as cluster_module
from reactor.cluster import Cluster, Reactor
from reactor.envelope import PeerLostError
from tests.protocol.test_cluster import (
    CPUS,
    MODULE,
    ORPHAN,
    has_exited,
    restarted,
    run_dir,
    running,
    until,
)
from tests.support.waiting import wait_until

__all__ = ["run_dir"]


def kill(pid: int | None) -> int:
    """Kill a process and return once it has died, before anybody can have been told."""
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def asleep(cluster: Cluster) -> psutil.Process:
    """Return the standby once it waits to be told something."""
    process = psutil.Process(cluster.standby_pid)
    await until(lambda: process.name() == "reactor-standby")
    return process


async def test_the_standby_takes_the_place_of_a_reactor_that_dies(run_dir: Path) -> None:
    async with running(run_dir, CPUS) as cluster:
        for reactor in cluster.reactors:
            standby, old = cluster.standby_pid, kill(reactor.pid)
            await until(lambda r=reactor, old=old: restarted(r, old))
            assert reactor.pid == standby
            found = await cluster.call(reactor, "test_whoami")
            assert found["affinity"][str(reactor.pid)] == [reactor.cpu]
            assert found["comm"] == reactor.name
            await until(lambda: cluster.standby_pid is not None)
            assert cluster.standby_pid != standby


async def test_a_standby_sleeps_on_any_cpu_with_no_thread_beside_it(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        standby = await asleep(cluster)
        assert sorted(os.sched_getaffinity(standby.pid)) == sorted(os.sched_getaffinity(0))
        assert standby.num_threads() == 1
        assert os.listdir(run_dir) == [cluster.reactors[0].name]


async def test_a_stop_that_is_meant_for_all_processes_leaves_the_standby_to_the_control_process(
    run_dir: Path,
) -> None:
    async with running(run_dir) as cluster:
        standby = await asleep(cluster)
        standby.terminate()
        reactor = cluster.reactors[0]
        old = kill(reactor.pid)
        await until(lambda: restarted(reactor, old))
        assert reactor.pid == standby.pid
    assert has_exited(standby)


async def test_a_standby_that_dies_is_replaced(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_module, "STANDBY_DELAY", 0.05)
    async with running(run_dir) as cluster:
        old = kill(cluster.standby_pid)
        await until(lambda: cluster.standby_pid not in (None, old))
        assert f"the standby (pid {old}) was killed by SIGKILL" in caplog.text
        assert cluster.reactors[0].restarts == 0


async def test_a_reactor_that_dies_with_the_standby_is_replaced(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        standby, old = kill(cluster.standby_pid), kill(reactor.pid)
        await until(lambda: restarted(reactor, old))
        assert reactor.pid != standby
        assert await cluster.call(reactor, "event_ping", {"payload": 1}) == 1


async def test_all_reactors_that_die_at_once_are_replaced(run_dir: Path) -> None:
    async with running(run_dir, CPUS) as cluster:
        old = {reactor.cpu: kill(reactor.pid) for reactor in cluster.reactors}
        await until(lambda: all(restarted(r, old[r.cpu]) for r in cluster.reactors))
        assert [reactor.restarts for reactor in cluster.reactors] == [1] * len(CPUS)


async def test_a_reactor_starts_while_the_loss_of_the_last_is_dealt_with_but_is_not_called(
    run_dir: Path,
) -> None:
    cluster = Cluster(run_dir, CPUS[:1], load=[MODULE])
    seen: list[Any] = []
    fenced = asyncio.Event()

    async def lost(reactor: Reactor) -> None:
        seen.append(reactor.pid)
        await until(lambda: reactor.pid is not None)
        await until((run_dir / reactor.name).exists)  # it listens
        with pytest.raises(PeerLostError):
            await cluster.call(reactor, "event_ping")
        await fenced.wait()
        seen.append("fenced")

    async def started(reactor: Reactor) -> None:
        seen.append(await cluster.call(reactor, "event_ping", {"payload": "started"}))

    cluster.on_lost(lost)
    await cluster.start()
    cluster.on_started(started)
    try:
        reactor = cluster.reactors[0]
        old = kill(reactor.pid)
        await until(lambda: reactor.pid not in (None, old))
        assert reactor.state == "starting"
        fenced.set()
        await until(lambda: restarted(reactor, old))
        assert seen == [None, "fenced", "started"]
    finally:
        fenced.set()
        await cluster.stop()


async def test_a_reactor_that_dies_while_a_loss_is_dealt_with_is_replaced_after_it(
    run_dir: Path,
) -> None:
    cluster = Cluster(run_dir, CPUS[:1], load=[MODULE])
    fenced = asyncio.Event()
    running_callbacks: list[int] = []

    async def lost(reactor: Reactor) -> None:
        running_callbacks.append(reactor.restarts)
        await fenced.wait()

    cluster.on_lost(lost)
    await cluster.start()
    try:
        reactor = cluster.reactors[0]
        first = kill(reactor.pid)
        await until(lambda: reactor.pid not in (None, first))
        second = kill(reactor.pid)
        await until(lambda: reactor.pid is None)
        assert running_callbacks == [0]
        fenced.set()
        await until(lambda: restarted(reactor, second))
        assert running_callbacks == [0, 1]
        assert await cluster.call(reactor, "event_ping", {"payload": 1}) == 1
    finally:
        fenced.set()
        await cluster.stop()


async def test_a_cluster_stops_while_a_loss_is_dealt_with(run_dir: Path) -> None:
    cluster = Cluster(run_dir, CPUS[:1], load=[MODULE])

    async def lost(_: Reactor) -> None:
        await asyncio.Event().wait()

    cluster.on_lost(lost)
    await cluster.start()
    before = kill(cluster.reactors[0].pid)
    await until(lambda: cluster.reactors[0].pid not in (None, before))
    await cluster.stop()
    assert os.listdir(run_dir) == []
    assert psutil.Process().children() == []


async def test_a_call_to_a_reactor_that_has_died_unnoticed_is_lost(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        await cluster.call(reactor, "event_ping")
        kill(reactor.pid)
        with pytest.raises(PeerLostError):
            await cluster.call(reactor, "test_read", fds=[2])


def test_no_standby_outlives_a_killed_control_process(run_dir: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(run_dir), str(CPUS[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as control:
        assert control.stdout is not None
        control.stdout.readline()
        children = psutil.Process(control.pid).children()
        control.kill()
    assert len(children) == 2
    wait_until(lambda: all(map(has_exited, children)))
