"""Verified load on disks of a running cluster, and what must not disturb it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from tests.conftest import StartCluster
from tests.support.cluster import Cluster
from tests.support.waiting import PATIENCE, wait_until
from vhost.frontend import BlkFrontend
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.frontend_link import FrontendError
from vhost.io import io_command
from vhost.messages import ProtocolFeature
from vhost.results import Results
from vhost.workload import Runner, Workload, run

SIZE = 16 << 20


@pytest.fixture
def disk_socket(start_cluster: StartCluster) -> tuple[Cluster, str]:
    cluster = start_cluster()
    cluster.rpc("bdev_malloc_create", name="m", num_blocks=SIZE // 512, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="m", dev_name="m", packed_ring=True)
    return cluster, str(cluster.socket("m"))


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    """Whether the queues have the packed format."""
    return bool(request.param)


def load_while(disk: BlkFrontend, act: Callable[[Runner], None]) -> Results:
    """Write and verify on all queues of the disk until ``act`` is done."""
    work = Workload(
        size=disk.size, mode="randrw", depth=16, verify=True, runtime=PATIENCE, seed=7, stall=20
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
    wait_until(
        lambda: runner.ops() >= wanted, lambda: f"{wanted - runner.ops()} requests are missing"
    )


def check(results: Results) -> None:
    assert results.errors == 0, results.first_error
    assert results.mismatches == 0, results.mismatch
    assert results.verified > 0


def test_data_are_right_on_every_queue(disk_socket: tuple[Cluster, str], packed: bool) -> None:
    _, path = disk_socket
    with BlkFrontend.connect(path, queues=4, packed=packed) as disk:
        check(load_while(disk, wait_for_more))


def test_a_killed_reactor_loses_and_changes_nothing(
    disk_socket: tuple[Cluster, str], packed: bool
) -> None:
    cluster, path = disk_socket
    (cpu,) = cluster.reactors()

    def kill(runner: Runner) -> None:
        for _ in range(3):
            wait_for_more(runner)
            cluster.kill_reactor(cpu)
            wait_for_more(runner)

    with BlkFrontend.connect(path, queues=2, packed=packed) as disk:
        check(load_while(disk, kill))


def test_coalescing_may_change_under_load(disk_socket: tuple[Cluster, str]) -> None:
    cluster, path = disk_socket
    (cpu,) = cluster.reactors()

    def change(runner: Runner) -> None:
        for delay in (100, 0, 1000, 1):
            args = {"ctrlr": "m", "delay_base_us": delay, "iops_threshold": 1000}
            cluster.rpc("vhost_controller_set_coalescing", **args)
            wait_for_more(runner)
        cluster.kill_reactor(cpu)
        wait_for_more(runner)

    with BlkFrontend.connect(path, queues=2) as disk:
        check(load_while(disk, change))


def test_a_front_end_may_reconnect_in_the_middle_of_requests(
    disk_socket: tuple[Cluster, str], packed: bool
) -> None:
    _, path = disk_socket
    with BlkFrontend.connect(path, queues=2, packed=packed) as disk:

        def reconnect(runner: Runner) -> None:
            for _ in range(10):
                wait_for_more(runner, 200)
                disk.reconnect()
            wait_for_more(runner)

        check(load_while(disk, reconnect))


def test_stopping_queues_in_the_middle_of_requests_drains_them(
    disk_socket: tuple[Cluster, str], packed: bool
) -> None:
    _, path = disk_socket
    with BlkFrontend.connect(path, queues=2, packed=packed) as disk:

        def pause(runner: Runner) -> None:
            for _ in range(10):
                wait_for_more(runner, 200)
                for queue, base in zip(disk.queues, disk.stop(), strict=True):
                    # Drained: whatever was taken was used.
                    assert base >> 16 == base & 0xFFFF if packed else base == queue.used_idx
                disk.start()
            wait_for_more(runner)

        check(load_while(disk, pause))


@pytest.mark.parametrize(
    "options",
    [
        ["--iodepth", "32"],
        ["--iodepth", "32", "--indirect", "--bs", "64k"],
        ["--iodepth", "8", "--interrupt"],
        ["--iodepth", "8", "--interrupt", "--no-event-idx"],
        ["--iodepth", "16", "--queue-size", "50", "--queues", "2", "--threads", "2"],
    ],
    ids=" ".join,
)
def test_the_command_drives_packed_rings(
    disk_socket: tuple[Cluster, str], options: list[str]
) -> None:
    _, path = disk_socket
    fixed = ["--packed", "--rw", "randrw", "--verify", "--number-ios", "3000", "--json"]
    ran = CliRunner().invoke(io_command, [path, *fixed, *options])
    assert ran.exit_code == 0, ran.output
    results = json.loads(ran.stdout)
    assert results["read"]["ops"] + results["write"]["ops"] >= 3000
    assert results["verified_blocks"] > 0


def test_packed_rings_cannot_go_on_without_a_log(disk_socket: tuple[Cluster, str]) -> None:
    _, path = disk_socket
    wanted = WANTED_PROTOCOL & ~ProtocolFeature.INFLIGHT_SHMFD
    with BlkFrontend.connect(path, packed=True, protocol_features=wanted) as disk:
        disk.write(0, b"x" * 512)
        with pytest.raises(FrontendError, match="without an in-flight log"):
            disk.reconnect()
        disk.stop()
        disk.reconnect()
        assert disk.read(0, 512) == b"x" * 512
