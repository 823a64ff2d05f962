"""The unmodified ``spdk`` client package and its ``spdk-rpc`` command drive our JSON-RPC server."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from spdk.rpc.client import JSONRPCClient, JSONRPCException
from spdk.rpc.config import load_config, load_subsystem_config, save_config

from reactor.control import Framework, program_version
from reactor.errors import OperationError
from reactor.operations import Operations, operation
from reactor.rpc import RpcServer
from tests.support.waiting import PATIENCE

SPDK_RPC = Path(sys.executable).parent / "spdk-rpc"


class Shelf:
    """A subsystem with a state worth saving."""

    name = "shelf"
    depends_on = ()

    def __init__(self) -> None:
        self.books: dict[str, int] = {}

    @operation
    async def book_add(self, title: str, pages: int = 1) -> str:
        if title in self.books:
            raise OperationError(-17, f"book {title} is there already")
        self.books[title] = pages
        return title

    def config(self):
        return [
            {"method": "book_add", "params": {"title": title, "pages": pages}}
            for title, pages in self.books.items()
        ]


class NoReactors:
    reactors = ()
    everyone = ()
    counting = ()


class Server:
    """A server on a loop in a thread of its own, for clients that block."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shelf = Shelf()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        operations = Operations()
        framework = Framework(operations, NoReactors())
        operations.add(framework, self.shelf)
        framework.add_subsystem(self.shelf)
        framework.initialised()
        self._server = RpcServer(path, operations)

    def __enter__(self):
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(10)
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server(tmp_path):
    with Server(str(tmp_path / "spdk.sock")) as server:
        yield server


@pytest.fixture
def client(server):
    with JSONRPCClient(server.path, timeout=PATIENCE) as client:
        yield client


def spdk_rpc(server, *arguments, stdin=None):
    command = [SPDK_RPC, "-s", server.path, "-t", "10", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE)


def test_version(client):
    major = int(program_version().split(".")[0])
    assert client.spdk_get_version()["fields"]["major"] == major


def test_an_error_carries_code_and_reason(client):
    client.book_add(title="a")
    with pytest.raises(JSONRPCException) as refused:
        client.book_add(title="a")
    assert '"code": -17' in refused.value.message
    assert "book a is there already" in refused.value.message


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [("nosuch_method", {}, -32601), ("book_add", {}, -32602), ("book_add", {"title": 1}, -32602)],
)
def test_codes_are_those_of_json_rpc(client, method, params, code):
    with pytest.raises(JSONRPCException) as refused:
        client.call(method, params)
    assert f'"code": {code}' in refused.value.message


def test_several_calls_share_a_connection(client):
    assert [client.book_add(title=title) for title in "abc"] == ["a", "b", "c"]


def test_requests_can_be_pipelined(client):
    identifiers = {client.add_request("book_add", {"title": title}) for title in "abc"}
    client.flush()
    assert {client.recv()["id"] for _ in range(3)} == identifiers


def test_a_batch_is_answered_as_one(server):
    with JSONRPCClient(server.path, timeout=PATIENCE, batch_mode=True) as client:
        calls = [{"method": "book_add", "params": {"title": title}} for title in "aab"]
        results, errors = client.call_batch(calls)
    assert results == ["a", "b"]
    assert [error["code"] for error in errors] == [-17]


def test_a_large_reply_with_many_languages_arrives_whole(client):
    title = "\u00e4\u20ac\U0001f4d6" * 10_000
    assert client.book_add(title=title) == title


def test_a_saved_configuration_loads_into_another_server(server, client, tmp_path):
    client.book_add(title="a", pages=3)
    client.book_add(title="b")
    saved = io.StringIO()
    save_config(client, saved)
    assert json.loads(saved.getvalue())["subsystems"] == [
        {"subsystem": "shelf", "config": server.shelf.config()}
    ]
    saved.seek(0)
    with Server(str(tmp_path / "other.sock")) as other:
        with JSONRPCClient(other.path, timeout=PATIENCE) as other_client:
            load_config(other_client, saved)
        assert other.shelf.books == server.shelf.books == {"a": 3, "b": 1}


def test_an_empty_configuration_loads(client):
    load_config(client, io.StringIO('{"subsystems": [{"subsystem": "shelf", "config": []}]}'))


def test_a_subsystem_loads_alone(server, client):
    config = [{"method": "book_add", "params": {"title": "a"}}]
    load_subsystem_config(client, io.StringIO(json.dumps({"subsystem": "x", "config": config})))
    assert server.shelf.books == {"a": 1}


def test_the_command_shows_methods(server):
    done = spdk_rpc(server, "rpc_get_methods", "--include-aliases")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"book_add", "get_rpc_methods"} <= set(json.loads(done.stdout))


def test_the_command_shows_reactors_and_threads(server):
    for method, member in (("framework_get_reactors", "reactors"), ("thread_get_stats", "threads")):
        done = spdk_rpc(server, method)
        assert json.loads(done.stdout)[member] == []


def test_the_command_saves_and_loads(server):
    server.shelf.books["a"] = 7
    saved = spdk_rpc(server, "save_config").stdout
    server.shelf.books.clear()
    loaded = spdk_rpc(server, "load_config", stdin=saved)
    assert loaded.returncode == 0, loaded.stdout + loaded.stderr
    assert server.shelf.books == {"a": 7}


def test_the_command_fails_with_the_reason(server):
    done = spdk_rpc(server, "framework_get_config", "none")
    assert done.returncode == 1
    assert "Subsystem 'none' not found" in done.stdout


def test_the_command_runs_a_script_as_a_batch(server):
    done = spdk_rpc(server, "--batch-mode", stdin="framework_wait_init\nspdk_get_version\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert program_version() in done.stdout


def test_a_client_that_finds_no_server_says_so(tmp_path):
    with pytest.raises(JSONRPCException, match="non-existing"):
        JSONRPCClient(str(tmp_path / "none.sock"))
    assert os.listdir(tmp_path) == []
