"""The command line: what it makes of its words, and how it fails."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from reactor import cpumask
from reactor.control import program_version
from reactor.rpc_client import RpcClient
from tests.support.waiting import PATIENCE
from vhost.cli import cli, parse_arguments, parse_value


def vhost_reactor(*arguments, **options):
    command = [sys.executable, "-m", "vhost.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


class OneAnswer:
    """A peer that takes one connection, keeps what it reads and answers what it is told to."""

    def __init__(self, path: str, answer: bytes) -> None:
        self.received = b""
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(1)
        self._socket.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(PATIENCE)
            self.received = connection.recv(65536)
            connection.sendall(self._answer)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-1.5", -1.5),
        ("true", True),
        ("null", None),
        ('"12"', "12"),
        ('["a", 1]', ["a", 1]),
        ('{"a": {}}', {"a": {}}),
        ("disk0", "disk0"),
        ("/dev/sda", "/dev/sda"),
        ("True", "True"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("[1, NaN]", "[1, NaN]"),
        ("0x10", "0x10"),
        ("", ""),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_value_is_json_where_it_is_json(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values | st.text())
def test_any_value_can_be_written_as_json(value):
    assert parse_value(json.dumps(value)) == value


def test_words_become_a_map_and_a_value_may_hold_equals_signs():
    assert parse_arguments(("a=1", "b=x=y", "c=")) == {"a": 1, "b": "x=y", "c": ""}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["novalue"], "expected KEY=VALUE"),
        (["=1"], "expected KEY=VALUE"),
        (["a=1", "a=2"], "twice"),
    ],
)
def test_words_that_are_no_map_are_a_usage_error(words, reason):
    done = CliRunner().invoke(cli, ["rpc", "method", *words])
    assert done.exit_code == 2
    assert reason in done.output


def test_rpc_sends_the_arguments_and_prints_the_result(tmp_path):
    path = str(tmp_path / "rpc.sock")
    answer = b'{"jsonrpc": "2.0", "id": 1, "result": {"a": [1]}}'
    with OneAnswer(path, answer) as peer:
        done = CliRunner().invoke(cli, ["rpc", "-s", path, "some_method", "name=x", "count=2"])
    assert done.exit_code == 0
    assert json.loads(done.output) == {"a": [1]}
    assert json.loads(peer.received) == {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "some_method",
        "params": {"name": "x", "count": 2},
    }


def test_rpc_finds_the_socket_in_the_run_directory_and_prints_strings_bare(tmp_path):
    with OneAnswer(str(tmp_path / "rpc.sock"), b'{"id": 1, "result": "Malloc0"}'):
        done = CliRunner().invoke(cli, ["rpc", "--run-dir", str(tmp_path), "m"])
    assert done.output == "Malloc0\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"id": 1, "error": {"code": -17, "message": "x exists"}}', "x exists (code -17)"),
        (b'{"id": null, "error": {"code": -32700, "message": "bad"}}', "bad (code -32700)"),
        (b"", "connection closed without an answer"),
        (b"[]", "not a reply"),
        (b"}", "not a reply"),
    ],
)
def test_rpc_that_fails_says_why_in_one_line(tmp_path, answer, said):
    path = str(tmp_path / "rpc.sock")
    with OneAnswer(path, answer):
        done = CliRunner().invoke(cli, ["rpc", "-s", path, "m"])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("vhost-reactor: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_rpc_without_a_server_names_the_socket(tmp_path):
    done = vhost_reactor("rpc", "--run-dir", tmp_path, "rpc_get_methods")
    assert done.returncode == 1
    assert done.stderr == (
        f"vhost-reactor: nobody listens at {tmp_path}/rpc.sock: No such file or directory; "
        "is a cluster running there?\n"
    )


@pytest.mark.parametrize(
    "command",
    [
        ["io", "nobody.sock"],
        ["scsi", "nobody.sock", "inquiry"],
        ["nvme", "bind", "ffff:ff:1f.7"],
        ["nvme", "unbind", "ffff:ff:1f.7"],
        ["rpc", "-s", "nobody.sock", "method"],
        ["upgrade", "-s", "nobody.sock"],
        ["events", "--run-dir", "nowhere"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_fails_in_one_form(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 1
    assert done.output.startswith("vhost-reactor: ")
    assert done.output.count("\n") == 1


def test_rpc_that_is_not_answered_times_out(tmp_path):
    path = str(tmp_path / "rpc.sock")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen(1)
        with (
            RpcClient(path, timeout=0.01) as client,
            pytest.raises(TimeoutError, match=r"no answer to m within 0\.01 s"),
        ):
            client.call("m")


def test_version_and_help():
    assert vhost_reactor("--version").stdout == f"vhost-reactor {program_version()}\n"
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert all(command in shown for command in ("start", "rpc", "event", "io"))


def test_rpc_imports_nothing_that_start_needs():
    script = (
        "import sys; from vhost.cli import cli; import reactor.rpc_client\n"
        "print(*({'zmq', 'asyncio', 'rich', 'psutil', 'reactor._native'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.fixture
def cannot_start(tmp_path):
    """Start with the given options, and return the one line that says why it cannot."""
    (tmp_path / "locks").mkdir()

    def attempt(*options):
        before = sorted(os.walk(tmp_path))
        done = vhost_reactor(
            "start", "--run-dir", tmp_path / "run", "--lock-dir", tmp_path / "locks", *options
        )
        assert done.returncode == 1
        assert done.stdout == ""
        assert sorted(os.walk(tmp_path)) == before, "something was left behind"
        (line,) = done.stderr.splitlines()
        return line.removeprefix("vhost-reactor: cannot start: ")

    return attempt


@pytest.mark.parametrize("mask", ["zz", "0", "[", "3-1"])
def test_start_refuses_a_bad_mask(cannot_start, mask):
    assert mask in cannot_start("-m", mask)


def test_start_names_a_cpu_that_is_not_available(cannot_start):
    line = cannot_start("-m", "[60000]")
    assert line.startswith("CPU 60000 of '[60000]' not available")
    assert cpumask.format_list(cpumask.available()) in line


def test_start_names_a_directory_that_is_missing(cannot_start, tmp_path):
    missing = tmp_path / "none"
    assert cannot_start("-S", missing) == f"No such file or directory: {missing}"
    assert cannot_start("--run-dir", missing / "run") == f"No such file or directory: {missing}/run"
    assert cannot_start("-r", missing / "x").endswith(f"{missing}/x.lock")
    assert cannot_start("-c", missing) == f"No such file or directory: {missing}"


def test_start_refuses_a_configuration_that_is_not_json(cannot_start, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in cannot_start("-c", tmp_path / "config.json")


def test_start_refuses_a_socket_in_use(cannot_start, tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "rpc.sock"))
        other.listen(1)
        line = cannot_start("-r", tmp_path / "rpc.sock")
    assert line == f"RPC socket {tmp_path}/rpc.sock is in use: a server listens on it"


def test_start_names_a_cpu_of_another_cluster_and_its_pid(cannot_start, tmp_path):
    cpu = cpumask.available()[0]
    with cpumask.claim([cpu], "another cluster", tmp_path / "locks"):
        line = cannot_start("-m", f"[{cpu}]")
    assert line.startswith(f"CPU {cpu} is in use by pid {os.getpid()} (another cluster)")
