"""The control process dies, and no front-end notices: the next one takes everything over."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from reactor.errors import OperationError
from reactor.rpc_client import RpcClient
from tests.support.adoption import DISKS, Disk, cluster, load, messages, saved, serve
from tests.support.cluster import ROOT, Cluster
from tests.support.waiting import PATIENCE, wait_until
from vhost.frontend import BlkFrontend
from vhost.frontend_scsi import ScsiFrontend
from vhost.messages import VERSION, Header, Request

POWER_ON = 0x29  # additional sense code, SPC-5 table 49


MALLOC = Disk("malloc", packed=False)

# Every kind of disk and of ring; tests/soak has all of them together.
SOME = pytest.mark.parametrize("disk", [DISKS[0], DISKS[3]], ids=str)
OTHERS = pytest.mark.parametrize("disk", [DISKS[1], DISKS[2]], ids=str)


@SOME
def test_a_load_goes_on_without_a_control_process_and_with_the_next_one(disk: Disk) -> None:
    with cluster() as target:
        serve(target, disk)
        with load(target, disk) as running:
            before, reactors = saved(target), target.reactors()
            target.kill_control()
            running.progress()
            target.restart()
            running.progress()
            assert target.reactors() == reactors
            assert saved(target) == before
        target.stop()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_queues_that_start_and_stop_when_the_control_process_dies_lose_nothing(
    packed: bool,
) -> None:
    disk, chance = Disk("malloc", packed), random.Random(1)
    with cluster() as target:
        serve(target, disk)
        with load(target, disk) as running, messages(running.front):
            for _ in range(2):
                running.progress(chance.randrange(1, 100))
                target.kill_control()
                target.restart()
        target.stop()


@OTHERS
def test_a_reactor_that_dies_while_there_is_no_control_process_is_replaced_by_the_next(
    disk: Disk,
) -> None:
    with cluster("0x3") as target:
        serve(target, disk)
        with load(target, disk, queues=4) as running:
            before = target.reactors()
            target.kill_control()
            psutil.Process(before[0]).kill()
            target.restart()
            running.progress()
            now = target.reactors()
            assert now[1] == before[1]
            assert now[0] != before[0]
        target.stop()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_when_everything_dies_a_front_end_that_reconnects_goes_on_with_the_saved_configuration(
    packed: bool,
) -> None:
    with cluster() as target:
        serve(target, Disk("file", packed))
        before = saved(target)
        with load(target, Disk("file", packed)) as running:
            target.kill()
            target.restart()
            assert saved(target) == before
            running.front.reconnect()
            running.progress()
        target.stop()


@OTHERS
def test_an_upgrade_under_load_replaces_every_process_and_nobody_notices(disk: Disk) -> None:
    with cluster("0x3") as target:
        serve(target, disk)
        with load(target, disk, queues=4) as running:
            before, reactors = saved(target), target.reactors()
            keeper = target.process("reactor-keeper").pid
            assert target.upgrade().startswith("upgraded to vhost-reactor")
            running.progress()
            assert not set(target.reactors().values()) & set(reactors.values())
            assert target.process("reactor-keeper").pid != keeper
            assert target.rpc("framework_get_reactors")["pid"] == target.pid
            assert saved(target) == before
        target.stop()


def test_a_second_upgrade_is_refused_from_the_moment_that_the_first_is_accepted() -> None:
    with cluster() as target:
        before = set(target.reactors().values())

        def is_over() -> bool:
            with contextlib.suppress(OSError, OperationError), RpcClient(target.rpc_socket) as it:
                it.call("framework_wait_upgrade")
                return not before & set(target.reactors().values())
            return False

        with (
            RpcClient(target.rpc_socket) as first,
            RpcClient(target.rpc_socket) as second,
            ThreadPoolExecutor(2) as threads,
        ):
            calls = [threads.submit(one.call, "framework_upgrade") for one in (first, second)]
            (refusal,) = [error for call in calls if (error := call.exception()) is not None]
        assert isinstance(refusal, OperationError)
        assert refusal.code == -errno.EBUSY
        assert "under way" in refusal.message
        wait_until(is_over)
        target.stop()


def told_of_reactors(target: Cluster) -> list[tuple[str, int]]:
    """Return what the control process has told of reactors, with their CPUs."""
    return [
        (one["type"], one["details"]["cpu"])
        for one in target.rpc("notify_get_notifications")
        if one["type"].startswith("reactor_")
    ]


ONE_BY_ONE = [
    ("reactor_lost", 0),
    ("reactor_recovered", 0),  # that is, its queues are served again
    ("reactor_lost", 1),
    ("reactor_recovered", 1),
]


def test_an_upgrade_replaces_one_reactor_after_the_other() -> None:
    with cluster("0x3") as target:
        serve(target, MALLOC)
        with load(target, MALLOC, queues=4):
            target.upgrade()
            assert told_of_reactors(target) == ONE_BY_ONE
        target.stop()


def test_reactors_with_other_options_are_replaced_one_after_the_other_after_a_takeover() -> None:
    with cluster("0x3") as target:
        serve(target, MALLOC)
        with load(target, MALLOC, queues=4):
            before = target.reactors()
            target.kill_control()
            target.add_arguments("--poll", "never")
            target.restart()
            target.rpc("framework_wait_upgrade")
            assert told_of_reactors(target) == ONE_BY_ONE
            assert not set(target.reactors().values()) & set(before.values())
        target.stop()


def test_reactors_that_are_told_other_things_are_replaced_before_they_are_told_any(
    tmp_path: Path,
) -> None:
    for package in ("reactor", "bdev", "scsi", "vhost"):
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with cluster("0x3", root=tmp_path) as target:
        serve(target, MALLOC)
        with load(target, MALLOC, queues=4):
            before = target.reactors()
            with (tmp_path / "vhost" / "worker.py").open("a") as worker:
                worker.write("# another program\n")
            target.upgrade()
            assert not set(target.reactors().values()) & set(before.values())
            assert "is taken over" not in target.log
        target.stop()


def test_an_explicit_configuration_wins_when_nothing_is_left() -> None:
    with cluster() as target:
        target.rpc("bdev_null_create", name="n0", num_blocks=8, block_size=512)
        target.kill()
        path = target.run_dir.parent / "config.json"
        path.write_text('{"subsystems": []}')
        target.add_arguments("-c", str(path))
        target.restart()
        assert target.rpc("bdev_get_bdevs") == []
        target.rpc("bdev_null_create", name="n1", num_blocks=8, block_size=512)
        target.kill_control()
        target.restart()  # a cluster that lives is as it is
        assert [one["name"] for one in target.rpc("bdev_get_bdevs")] == ["n1"]
        target.stop()


def test_messages_wait_for_the_next_control_process_and_are_answered_once() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        with load(target, MALLOC) as running:
            target.kill_control()
            answers: list[int] = []
            link = running.front.raw
            asking = threading.Thread(
                target=lambda: answers.extend(
                    link.number(request)
                    for request in (Request.GET_FEATURES, Request.GET_QUEUE_NUM)
                )
            )
            asking.start()
            running.progress()
            assert answers == []
            target.restart()
            asking.join()
            assert len(answers) == 2
            assert link.number(Request.GET_QUEUE_NUM) == answers[1]
        target.stop()


def test_half_a_message_is_completed_with_the_next_control_process() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(str(target.socket("b0")))
            message = Header(Request.GET_FEATURES, VERSION, 0).to_bytes()
            front.send(message[:5])
            # It has been looked at when what came before on another connection is answered.
            BlkFrontend.connect(str(target.socket("b0"))).close()
            target.kill_control()
            target.restart()
            front.send(message[5:])
            front.settimeout(PATIENCE)
            reply = Header.from_bytes(front.recv(Header.WIRE.size))
            assert reply.request == Request.GET_FEATURES
        target.stop()


def test_a_front_end_that_connects_meanwhile_is_served_by_the_next_control_process() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        target.kill_control()
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(str(target.socket("b0")))
            front.send(Header(Request.GET_FEATURES, VERSION, 0).to_bytes())
            target.restart()
            front.settimeout(PATIENCE)
            assert len(front.recv(Header.WIRE.size)) == Header.WIRE.size
        target.stop()


def test_devices_can_be_made_and_deleted_after_a_takeover() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        target.kill_control()
        target.restart()
        target.rpc("bdev_malloc_create", name="e", num_blocks=2048, block_size=512)
        target.rpc("vhost_create_blk_controller", ctrlr="b1", dev_name="e")
        with BlkFrontend.connect(str(target.socket("b1"))) as front:
            front.write(0, b"x" * 4096)
            assert front.read(0, 4096) == b"x" * 4096
        for name in ("b0", "b1"):
            target.rpc("vhost_delete_controller", ctrlr=name, force=True)
        for name in ("d", "e"):
            target.rpc("bdev_malloc_delete", name=name)
        assert not target.socket("b0").exists()
        target.stop()


def test_a_scsi_unit_is_taken_over_with_its_contents_and_tells_of_it_once() -> None:
    write = bytes.fromhex("2a 00 00000007 00 0001 00")  # WRITE(10) of block 7
    read = bytes.fromhex("28 00 00000007 00 0001 00")
    data = os.urandom(512)
    with cluster() as target:
        target.rpc("bdev_malloc_create", name="d", num_blocks=2048, block_size=512)
        target.rpc("vhost_create_scsi_controller", ctrlr="s0")
        target.rpc("vhost_scsi_controller_add_target", ctrlr="s0", scsi_target_num=0, bdev_name="d")
        with ScsiFrontend.connect(str(target.socket("s0")), timeout=PATIENCE) as front:
            assert front.command(0, 0, bytes(6)).sense[12] == POWER_ON
            assert front.command(0, 0, write, out=data).status == 0
            target.kill_control()
            assert front.command(0, 0, read, into=512).data == data
            target.restart()
            assert front.command(0, 0, read, into=512).sense[12] == POWER_ON
            assert front.command(0, 0, read, into=512).data == data
        target.stop()


def test_the_death_of_the_keeper_alone_costs_nothing() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        with load(target, MALLOC) as running:
            reactors = target.reactors()
            keeper = target.process("reactor-keeper")
            keeper.kill()
            running.front.raw.number(Request.GET_QUEUE_NUM)
            assert target.process("reactor-keeper").pid != keeper.pid
            target.kill_control()
            target.restart()
            assert target.reactors() == reactors
        target.stop()


def test_without_a_next_control_process_all_ends_when_the_time_is_over() -> None:
    with cluster(arguments=["--orphan-timeout", "0.2"]) as target:
        serve(target, MALLOC)
        target.kill_control()
        target.wait_gone(10)


def test_what_is_left_of_a_cluster_ends_with_its_keeper() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        target.kill_control()
        target.process("reactor-keeper").terminate()
        target.wait_gone(10)


def test_no_other_cluster_gets_the_cpus_of_reactors_that_live() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        former = target.pid
        target.kill_control()
        other = [*target.command, "--run-dir", str(target.run_dir.parent / "other")]
        other += ["-r", str(target.run_dir.parent / "other.sock")]
        refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert f"CPU 0 is in use by pid {former} (vhost-reactor in {target.run_dir}" in (
            refused.stderr
        )
        target.restart()
        refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert f"CPU 0 is in use by pid {target.pid}" in refused.stderr
        target.stop()
        assert not list(target.run_dir.parent.glob("*cpu*"))


def test_an_rpc_socket_elsewhere_is_found_by_the_run_directory() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        for command in (["rpc", "vhost_get_controllers"], ["upgrade"]):
            where = ["--run-dir", str(target.run_dir)]
            asked = [sys.executable, "-m", "vhost.cli", *command, *where]
            done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        target.kill_control()
        target.restart()
        assert os.readlink(target.run_dir / "rpc.sock") == str(target.rpc_socket)
        target.stop()
        assert not (target.run_dir / "rpc.sock").is_symlink()


def test_two_control_processes_never_serve_at_once() -> None:
    with cluster() as target:
        serve(target, MALLOC)
        keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with keeper:
            keeper.connect(str(target.run_dir / "keeper"))
            keeper.settimeout(PATIENCE)
            assert keeper.recv(1) == b""  # it hands nothing over while somebody has it
        second = subprocess.run(
            target.command, cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        assert second.returncode == 1
        assert f"is in use by pid {target.pid}" in second.stderr
