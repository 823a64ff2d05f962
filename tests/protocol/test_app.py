"""The application as a whole: starts, says so, serves, and ends with nothing left behind."""

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from spdk.rpc.client import JSONRPCClient
from spdk.rpc.config import load_config, save_config

from reactor import cpumask
from reactor.client import Client
from reactor.control import program_version
from reactor.errors import OperationError
from tests.support.application import Application
from tests.support.waiting import PATIENCE, wait_until

LEFT_BY_US = {"errors", "config.json", "notify"}


@pytest.fixture
def application(tmp_path):
    with Application(tmp_path) as application:
        yield application


def build(application):
    """Make a disk of each kind that needs nothing, and serve one of them."""
    application.rpc("bdev_malloc_create", name="m0", block_size=512, num_blocks=2048)
    application.rpc("bdev_null_create", name="n0", block_size=4096, num_blocks=1 << 20)
    application.rpc("vhost_create_blk_controller", ctrlr="b0", dev_name="m0", readonly=True)


def state(application):
    """Return what a saved configuration has to bring back."""
    return [application.rpc("bdev_get_bdevs"), application.rpc("vhost_get_controllers")]


def left_behind(folder):
    return {entry.name for entry in folder.iterdir()} - LEFT_BY_US


@pytest.fixture
def few_files():
    """Let children begin with the limit of open files that most systems have."""
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


def test_every_process_may_open_as_many_files_as_the_system_allows(few_files, tmp_path):
    with Application(tmp_path) as application:
        (reactor,) = application.rpc("framework_get_reactors")["reactors"]
        for pid in (application.process.pid, reactor["pid"]):
            assert psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE) == (few_files, few_files)


def test_one_line_says_that_it_is_ready_and_where(application):
    cpu = cpumask.available()[0]
    assert application.ready_line == (
        f"vhost-reactor {program_version()} is ready: reactor on CPU {cpu}, "
        f"RPC at {application.rpc_socket}, disks in {application.run_dir}\n"
    )


def test_what_is_in_the_run_directory_is_its_owners_alone(application):
    assert application.run_dir.stat().st_mode & 0o777 == 0o700
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in application.run_dir.iterdir()}
    assert {"control", "rpc.sock"} <= modes.keys()
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(tmp_path, number):
    with Application(tmp_path) as application:
        build(application)
        reactors = psutil.Process(application.process.pid).children()
        assert reactors
        assert application.stop(number) == 0
    assert application.errors() == ""
    assert left_behind(tmp_path) == set()
    assert not any(reactor.is_running() for reactor in reactors)


def test_a_client_can_end_it_and_gets_its_answer(application, tmp_path):
    assert application.rpc("spdk_kill_instance", sig_name="SIGTERM") is True
    assert application.wait() == 0
    assert left_behind(tmp_path) == set()


def test_the_spdk_client_sees_the_reactor(application):
    with JSONRPCClient(str(application.rpc_socket), timeout=PATIENCE) as client:
        shown = client.framework_get_reactors()
        (thread,) = client.thread_get_stats()["threads"]
    (reactor,) = shown["reactors"]
    assert shown["pid"] == application.process.pid
    assert psutil.Process(reactor["pid"]).cpu_affinity() == [reactor["lcore"]]
    assert (reactor["state"], reactor["restarts"]) == ("running", 0)
    assert thread["name"] == f"reactor-{reactor['lcore']}"


def test_a_reactor_that_is_killed_is_replaced_and_shown(application):
    def reactor():
        return application.rpc("framework_get_reactors")["reactors"][0]

    killed = reactor()["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: reactor()["restarts"] == 1 and reactor()["state"] == "running")
    assert reactor()["pid"] not in (None, killed)


def test_events_reach_the_same_operations(application):
    with Client(application.run_dir) as client:
        assert client.call("control", "bdev_null_create", name="n", block_size=512, num_blocks=8)
        with pytest.raises(OperationError, match="no_such_operation"):
            client.call("control", "no_such_operation")
    assert [bdev["name"] for bdev in application.rpc("bdev_get_bdevs")] == ["n"]


def test_a_saved_configuration_comes_back_by_client_and_by_start(tmp_path):
    folders = [tmp_path / name for name in ("first", "by_client", "by_start")]
    for folder in folders:
        folder.mkdir()
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with Application(folders[0], "-S", sockets) as first:
        build(first)
        expected = state(first)
        saved = io.StringIO()
        with JSONRPCClient(str(first.rpc_socket), timeout=PATIENCE) as client:
            save_config(client, saved)
    with Application(folders[1], "-S", sockets) as second:
        saved.seek(0)
        with JSONRPCClient(str(second.rpc_socket), timeout=PATIENCE) as client:
            load_config(client, saved)
        assert state(second) == expected
    config = tmp_path / "config.json"
    config.write_text(saved.getvalue())
    with Application(folders[2], "-S", sockets, "-c", config) as third:
        assert state(third) == expected
    assert list(sockets.iterdir()) == []


def spdk_configuration(folder):
    """Return what SPDK's vhost saves of four kinds of disks and a controller."""
    (folder / "aio").write_bytes(bytes(1 << 20))
    (folder / "uring").write_bytes(bytes(1 << 20))
    no_metadata = {"md_size": 0, "dif_type": 0, "dif_is_head_of_md": False, "dif_pi_format": 0}
    uuid = "9f1edd9f-4c10-4b85-874c-e7d1453677b9"
    malloc = {"name": "M0", "num_blocks": 8, "block_size": 512, "physical_block_size": 512}
    malloc |= {"uuid": uuid, "optimal_io_boundary": 0, "numa_id": -1} | no_metadata
    null = {"name": "N0", "num_blocks": 8, "block_size": 512, "physical_block_size": 512}
    null |= no_metadata | {"preferred_write_granularity": 0, "preferred_write_alignment": 0}
    null |= {"optimal_write_size": 0, "preferred_unmap_granularity": 0}
    null |= {"preferred_unmap_alignment": 0, "uuid": "2eb9f8ed-f61d-4a54-ac85-67885b68b87e"}
    aio = {"name": "A0", "block_size": 512, "filename": str(folder / "aio"), "readonly": False}
    aio |= {"fallocate": False, "uuid": "2eb9f8ed-f61d-4a54-ac85-67885b68b87f", "nowait": False}
    uring = {"name": "U0", "block_size": 512, "filename": str(folder / "uring")}
    pool = {"bdev_io_pool_size": 65535, "bdev_io_cache_size": 256, "bdev_auto_examine": True}
    pool |= {"iobuf_small_cache_size": 128, "iobuf_large_cache_size": 16}
    served = {"ctrlr": "b0", "dev_name": "M0", "cpumask": hex(1 << cpumask.available()[0])[2:]}
    served |= {"readonly": False, "transport": "vhost_user_blk"}
    coalescing = {"ctrlr": "b0", "delay_base_us": 10, "iops_threshold": 100000}
    sections = {
        "keyring": [],
        "iobuf": [("iobuf_set_options", {"small_pool_count": 8192, "large_pool_count": 1024})],
        "sock": [("sock_set_default_impl", {"impl_name": "posix"})],
        "vmd": [],
        "accel": [("accel_set_options", {"small_cache_size": 128})],
        "bdev": [
            ("bdev_set_options", pool),
            ("bdev_raid_set_options", {"process_window_size_kb": 1024}),
            ("bdev_malloc_create", malloc),
            ("bdev_null_create", null),
            ("bdev_aio_create", aio),
            ("bdev_uring_create", uring),
            ("bdev_wait_for_examine", None),
        ],
        "scsi": None,
        "scheduler": [("framework_set_scheduler", {"name": "static"})],
        "vhost_blk": [
            ("vhost_create_blk_controller", served),
            ("vhost_controller_set_coalescing", coalescing),
        ],
        "vhost_scsi": [],
    }

    def call(method, params):
        return {"method": method} if params is None else {"method": method, "params": params}

    return {
        "subsystems": [
            {"subsystem": name, "config": calls and [call(*one) for one in calls]}
            for name, calls in sections.items()
        ]
    }


def test_what_spdk_has_saved_is_loaded_at_start_and_by_its_client(tmp_path):
    config = tmp_path / "spdk.json"
    config.write_text(json.dumps(spdk_configuration(tmp_path)))
    for way in ("start", "client"):
        (tmp_path / way).mkdir()
        with Application(tmp_path / way, *(["-c", config] if way == "start" else [])) as target:
            if way == "client":
                with JSONRPCClient(str(target.rpc_socket), timeout=PATIENCE) as client:
                    load_config(client, io.StringIO(config.read_text()))
            names = {bdev["name"] for bdev in target.rpc("bdev_get_bdevs")}
            (controller,) = target.rpc("vhost_get_controllers")
        assert names == {"M0", "N0", "A0", "U0"}
        assert (controller["ctrlr"], controller["delay_base_us"]) == ("b0", 10)


def test_the_service_manager_is_told(tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE)
        environment = {**os.environ, "NOTIFY_SOCKET": str(path)}
        with Application(tmp_path, environment=environment):
            assert manager.recv(64) == b"READY=1"
        assert manager.recv(64) == b"STOPPING=1"


def cannot_start(folder, *options):
    """Start, and return the one line that says why it cannot; the log's lines aside."""
    words = ["start", "--run-dir", folder / "run", "--lock-dir", folder, *options]
    command = [sys.executable, "-m", "vhost.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line.removeprefix("vhost-reactor: cannot start: ")


def calls(*config):
    return json.dumps({"subsystems": [{"subsystem": "bdev", "config": list(config)}]})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            calls(
                {"method": "bdev_null_create", "params": {"name": "n", "num_blocks": 8}},
            ),
            r"configuration: subsystem bdev: bdev_null_create: .*missing.*block_size",
        ),
        (calls({"method": "nosuch"}), "configuration: subsystem bdev: nosuch: Method not found"),
        ('{"subsystem": []}', "configuration: .*unknown field `subsystem`"),
    ],
)
def test_a_configuration_that_cannot_be_loaded_leaves_nothing(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(config)
    assert re.match(reason, cannot_start(tmp_path, "-c", tmp_path / "config.json"))
    assert left_behind(tmp_path) == set()


def test_a_module_that_is_missing_is_named_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "vhost.cli", "start", "--run-dir", tmp_path / "run"]
    command += ["--lock-dir", tmp_path, "--load", "no_such_module"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "no_such_module" in done.stderr
    assert "cannot start" in done.stderr.splitlines()[-1]
    assert left_behind(tmp_path) == set()


def test_a_second_cluster_is_refused_and_the_first_goes_on(application, tmp_path):
    line = cannot_start(tmp_path)
    assert line.startswith(f"run directory {application.run_dir} is in use by pid")
    line = cannot_start(tmp_path, "--run-dir", tmp_path / "other")
    assert line.startswith(f"CPU {cpumask.available()[0]} is in use by pid")
    assert str(application.run_dir) in line
    assert not (tmp_path / "other").exists()
    assert application.rpc("framework_wait_init") is True


def test_what_a_killed_cluster_leaves_is_no_hindrance(tmp_path):
    with Application(tmp_path, "--orphan-timeout", 0.1) as application:
        build(application)
        before = application.rpc("framework_get_config", name="bdev")
        reactors = psutil.Process(application.process.pid).children()
        assert application.stop(signal.SIGKILL) == -signal.SIGKILL
    assert psutil.wait_procs(reactors, timeout=PATIENCE)[1] == [], "reactors wait for ever"
    with Application(tmp_path) as application:
        assert application.rpc("framework_get_config", name="bdev") == before
    assert left_behind(tmp_path) <= {"run"}


def test_a_signal_during_the_start_ends_it_cleanly(tmp_path):
    """The moment is when the first socket appears: processes are being started then."""
    command = [sys.executable, "-m", "vhost.cli", "start", "--run-dir", tmp_path / "run"]
    command += ["--lock-dir", tmp_path]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "run" / "control").exists)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
    assert left_behind(tmp_path) == set()
