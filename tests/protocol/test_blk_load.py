"""Verified load on disks of a running cluster, and what must not disturb it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.conftest import StartCluster
from tests.support.cluster import Cluster
from vhost.frontend import BlkFrontend
from vhost.results import Results
from vhost.workload import Runner, Workload, run

SIZE = 16 << 20
DEADLINE = 60.0  # seconds in which whatever a test waits for must have happened


@pytest.fixture
def disk_socket(start_cluster: StartCluster) -> tuple[Cluster, str]:
    cluster = start_cluster()
    cluster.rpc("bdev_malloc_create", name="m", num_blocks=SIZE // 512, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="m", dev_name="m")
    return cluster, str(cluster.socket("m"))


def load_while(disk: BlkFrontend, act: Callable[[Runner], None]) -> Results:
    """Write and verify on all queues of the disk until ``act`` is done."""
    work = Workload(
        size=disk.size, mode="randrw", depth=16, verify=True, runtime=DEADLINE, seed=7, stall=20
    )
    runner = Runner(work, disk.queues, disk.memory)
    failures: list[BaseException] = []

    def play() -> None:
        try:
            act(runner)
        except BaseException as error:
            failures.append(error)
        finally:
            runner.stop()

    thread = threading.Thread(target=play)
    thread.start()
    try:
        results = run(runner)
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return results


def wait_for_more(runner: Runner, requests: int = 1000) -> None:
    """Wait until so many more requests have been answered."""
    wanted = runner.ops() + requests
    end = time.monotonic() + DEADLINE
    while runner.ops() < wanted:
        assert time.monotonic() < end, f"{wanted - runner.ops()} requests are missing"
        time.sleep(0.005)


def check(results: Results) -> None:
    assert results.errors == 0, results.first_error
    assert results.mismatches == 0, results.mismatch
    assert results.verified > 0


def test_data_are_right_on_every_queue(disk_socket: tuple[Cluster, str]) -> None:
    _, path = disk_socket
    with BlkFrontend.connect(path, queues=4) as disk:
        check(load_while(disk, wait_for_more))


def test_a_killed_reactor_loses_and_changes_nothing(disk_socket: tuple[Cluster, str]) -> None:
    cluster, path = disk_socket
    (cpu,) = cluster.reactors()

    def kill(runner: Runner) -> None:
        for _ in range(3):
            wait_for_more(runner)
            cluster.kill_reactor(cpu)
            wait_for_more(runner)

    with BlkFrontend.connect(path, queues=2) as disk:
        check(load_while(disk, kill))


def test_a_front_end_may_reconnect_in_the_middle_of_requests(
    disk_socket: tuple[Cluster, str],
) -> None:
    _, path = disk_socket
    with BlkFrontend.connect(path, queues=2) as disk:

        def reconnect(runner: Runner) -> None:
            for _ in range(10):
                wait_for_more(runner, 200)
                disk.reconnect()
            wait_for_more(runner)

        check(load_while(disk, reconnect))


def test_stopping_queues_in_the_middle_of_requests_drains_them(
    disk_socket: tuple[Cluster, str],
) -> None:
    _, path = disk_socket
    with BlkFrontend.connect(path, queues=2) as disk:

        def pause(runner: Runner) -> None:
            for _ in range(10):
                wait_for_more(runner, 200)
                assert disk.stop() == [queue.used_idx for queue in disk.queues]
                disk.start()
            wait_for_more(runner)

        check(load_while(disk, pause))
