"""Clusters of real reactor processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from reactor import cluster as cluster_module
from reactor.client import AsyncClient, Client
from reactor.cluster import CRASH_LOOP, CRASH_WINDOW, MAX_DELAY, Backoff, Cluster, Reactor
from reactor.envelope import PeerLostError
from reactor.errors import OperationError
from tests.support.descriptors import open_fds
from tests.support.waiting import until, wait_until

CPUS = sorted(os.sched_getaffinity(0))[:2]
MODULE = "tests.support.reactor_module"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vr-") as path:
        yield Path(path)


@contextlib.asynccontextmanager
async def running(
    run_dir: Path, cpus: list[int] = CPUS[:1], **options: Any
) -> AsyncIterator[Cluster]:
    cluster = Cluster(run_dir, cpus, load=[MODULE], **options)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()


def restarted(reactor: Reactor, old_pid: int | None) -> bool:
    return reactor.state == "running" and reactor.pid not in (None, old_pid)


async def test_each_reactor_is_pinned_and_its_helper_threads_are_not(run_dir: Path) -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    async with running(run_dir, CPUS) as cluster:
        assert [reactor.name for reactor in cluster.reactors] == [f"reactor-{c}" for c in CPUS]
        for reactor in cluster.reactors:
            found = await cluster.call(reactor, "test_whoami")
            affinity = found["affinity"]
            assert (found["cpu"], found["pid"]) == (reactor.cpu, reactor.pid)
            assert found["comm"] == reactor.name
            assert affinity.pop(str(reactor.pid)) == [reactor.cpu]
            assert len(affinity) >= 2
            assert all(cpus == everywhere for cpus in affinity.values())


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan's memory counts, too")
async def test_a_reactor_is_small(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        found = await cluster.call(cluster.reactors[0], "test_whoami")
        assert found["rss"] < 60e6


async def test_a_reactor_inherits_nothing(run_dir: Path) -> None:
    secret = os.memfd_create("secret")
    os.set_inheritable(secret, True)
    try:
        async with running(run_dir) as cluster:
            found = await cluster.call(cluster.reactors[0], "test_whoami")
            assert not [name for name in found["fds"] if "secret" in name]
    finally:
        os.close(secret)


async def test_reactors_and_outsiders_reach_each_other(run_dir: Path) -> None:
    async with running(run_dir, CPUS), AsyncClient(run_dir) as client:
        for cpu in CPUS:
            assert await client.call(f"reactor-{cpu}", "event_ping", payload=cpu) == cpu


async def test_statistics_are_shared_and_told(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        told = await cluster.call(reactor, "reactor_get_stats")
        assert (told["name"], told["cpu"], told["pid"]) == (reactor.name, reactor.cpu, reactor.pid)
        assert told["events"]["received"] == 1
        seen = reactor.stats.counters
        assert seen["tick_rate"] == told["tick_rate"] > 0
        assert seen["polls"] >= told["polls"] > 0


async def test_descriptors_reach_the_operation_and_none_leaks(run_dir: Path) -> None:
    fds = [os.memfd_create(f"file-{n}") for n in range(300)]
    try:
        for n, fd in enumerate(fds):
            os.write(fd, b"%d" % n)
        async with running(run_dir) as cluster:
            reactor = cluster.reactors[0]
            before = (await cluster.call(reactor, "test_whoami"))["fds"]
            expected = [b"%d" % n for n in range(len(fds))]
            assert await cluster.call(reactor, "test_read", fds=fds) == expected
            assert await cluster.call(reactor, "test_read") == []
            with pytest.raises(OperationError):
                await cluster.call(reactor, "test_whoami", fds=fds[:1])
            assert (await cluster.call(reactor, "test_whoami"))["fds"] == before
    finally:
        for fd in fds:
            os.close(fd)


async def test_stopping_drains_and_leaves_nothing(run_dir: Path) -> None:
    mark = run_dir / "mark"
    before = open_fds()
    cluster = Cluster(run_dir, CPUS, load=[MODULE])
    await cluster.start()
    children = [psutil.Process(reactor.pid) for reactor in cluster.reactors]
    await cluster.call(cluster.reactors[0], "test_drain_into", {"path": str(mark)})
    await cluster.stop()
    assert mark.read_text() == "drained"
    assert not any(child.is_running() for child in children)
    assert os.listdir(run_dir) == ["mark"]
    assert open_fds() == before


async def test_an_orderly_stop_exits_with_status_0(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        child = reactor.child
        assert child is not None
        with contextlib.suppress(PeerLostError):  # its answer races with its death
            await cluster.call(reactor, "reactor_stop")
        assert await child.wait() == 0


async def test_stopping_twice_is_once(run_dir: Path) -> None:
    cluster = Cluster(run_dir, CPUS[:1])
    await cluster.start()
    await cluster.stop()
    await cluster.stop()


async def test_a_reactor_that_does_not_end_is_killed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_module, "STOP_TIMEOUT", 0.1)
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        child = reactor.child
        assert child is not None
        with pytest.raises(TimeoutError):
            await cluster.call(reactor, "test_block", timeout=0.1)
    assert child.exited.result() == -signal.SIGKILL
    assert "did not end" in caplog.text
    assert os.listdir(run_dir) == []


async def test_a_killed_reactor_is_replaced_on_its_cpu(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(run_dir, CPUS) as cluster:
        reactor = cluster.reactors[-1]
        old = reactor.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        await until(lambda: restarted(reactor, old))
        found = await cluster.call(reactor, "test_whoami")
        assert found["affinity"][str(reactor.pid)] == [reactor.cpu]
        assert reactor.restarts == 1
        assert f"{reactor.name} (pid {old}) was killed by SIGKILL" in caplog.text
        assert not psutil.pid_exists(old)  # reaped
        assert cluster.reactors[0].restarts == 0


async def test_pending_calls_of_a_dead_reactor_fail_at_once(run_dir: Path) -> None:
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        hanging = asyncio.ensure_future(cluster.call(reactor, "test_hang", timeout=None))
        await cluster.call(reactor, "event_ping")
        old = reactor.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        with pytest.raises(PeerLostError, match="test_hang") as caught:
            await hanging
        assert caught.value.code == -errno.ECONNRESET
        with pytest.raises(PeerLostError):
            await cluster.call(reactor, "event_ping")
        await until(lambda: restarted(reactor, old))
        assert await cluster.call(reactor, "event_ping", {"payload": 1}) == 1


async def test_callbacks_run_in_order_and_can_call_the_new_process(run_dir: Path) -> None:
    seen: list[Any] = []
    cluster = Cluster(run_dir, CPUS[:1], load=[MODULE])

    async def started(reactor: Reactor) -> None:
        found = await cluster.call(reactor, "test_whoami")
        seen.append(("started", found["pid"], reactor.state))

    async def lost(reactor: Reactor) -> None:
        seen.append(("lost", reactor.pid, reactor.state))

    cluster.on_started(started)
    cluster.on_lost(lost)
    await cluster.start()
    try:
        reactor = cluster.reactors[0]
        first = reactor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: restarted(reactor, first))
        assert seen == [
            ("started", first, "starting"),
            ("lost", None, "dead"),
            ("started", reactor.pid, "starting"),
        ]
    finally:
        await cluster.stop()


async def test_a_reactor_that_dies_in_a_start_callback_is_replaced(run_dir: Path) -> None:
    cluster = Cluster(run_dir, CPUS[:1], load=[MODULE])
    attempts = 0

    async def started(reactor: Reactor) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            await cluster.call(reactor, "test_die", timeout=None)

    cluster.on_started(started)
    await cluster.start()
    try:
        reactor = cluster.reactors[0]
        first = reactor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: reactor.restarts == 2 and reactor.state == "running")
        assert attempts == 3
    finally:
        await cluster.stop()


async def test_a_callback_that_raises_stops_nothing(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(run_dir, CPUS[:1], load=[MODULE])

    async def started(reactor: Reactor) -> None:
        raise RuntimeError("callback is broken")

    cluster.on_started(started)
    await cluster.start()
    assert cluster.reactors[0].state == "running"
    assert "callback is broken" in caplog.text
    await cluster.stop()


async def test_a_cluster_starts_wholly_or_not_at_all(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_FAIL_CPU", str(CPUS[-1]))
    before = psutil.Process().children()
    cluster = Cluster(run_dir, CPUS, load=[MODULE])
    with pytest.raises(OperationError, match=f"reactor-{CPUS[-1]} exited with status 1 before"):
        await cluster.start()
    assert psutil.Process().children() == before


async def test_a_crash_loop_backs_off_and_says_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_module, "CRASH_LOOP", 2)
    monkeypatch.setattr(cluster_module, "MIN_DELAY", 1.0)
    async with running(run_dir) as cluster:
        reactor = cluster.reactors[0]
        for _ in range(2):
            old = reactor.pid
            assert old is not None
            os.kill(old, signal.SIGKILL)
            await until(lambda old=old: restarted(reactor, old) or reactor.state == "waiting")
        assert reactor.state == "waiting"
        assert "keeps dying: next start in 1.0 s" in caplog.text
        await until(lambda: reactor.state == "running")
        assert reactor.restarts == 2


def test_deaths_far_apart_are_not_delayed() -> None:
    backoff = Backoff()
    assert {backoff.died(n * CRASH_WINDOW) for n in range(20)} == {0}


def test_delays_of_a_crash_loop_double_up_to_a_limit_and_end_with_it() -> None:
    backoff, now, delays = Backoff(), 0.0, []
    for _ in range(20):
        delays.append(backoff.died(now))
        now += delays[-1] + 0.2
    assert delays[: CRASH_LOOP - 1] == [0.0] * (CRASH_LOOP - 1)
    assert delays[CRASH_LOOP - 1 : CRASH_LOOP + 2] == [0.1, 0.2, 0.4]
    assert delays[-1] == MAX_DELAY
    assert backoff.died(now + 3600) == 0


ORPHAN = """
import asyncio, sys
from reactor.cluster import Cluster
async def main():
    cluster = Cluster(sys.argv[1], [int(c) for c in sys.argv[2:]])
    await cluster.start()
    print(*(r.pid for r in cluster.reactors), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def has_exited(process: psutil.Process) -> bool:
    """Return whether it has: as an orphan it is for process 1 to reap, whenever that does."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_no_reactor_outlives_a_killed_control_process(run_dir: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(run_dir), *map(str, CPUS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as control:
        assert control.stdout is not None
        reactors = [psutil.Process(int(pid)) for pid in control.stdout.readline().split()]
        assert len(reactors) == len(CPUS)
        assert not any(map(has_exited, reactors))
        control.kill()
    wait_until(lambda: all(map(has_exited, reactors)))


async def test_the_blocking_client_reaches_reactors(run_dir: Path) -> None:
    def use() -> None:
        with Client(run_dir) as client:
            target = f"reactor-{CPUS[0]}"
            assert client.call(target, "event_ping", payload=[1]) == [1]
            for _ in range(3):
                client.send(target, "event_count")
            assert client.call(target, "event_count") == 3
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                client.request(target, "test_hang", timeout=0.05)
            assert time.monotonic() - started < 4
            assert client.call(target, "event_ping", payload=2) == 2

    async with running(run_dir):
        await asyncio.to_thread(use)
