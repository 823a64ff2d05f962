from __future__ import annotations

import asyncio
import errno
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from reactor.client import AsyncClient, Client
from reactor.envelope import CallTimeoutError, PeerLostError
from reactor.errors import METHOD_NOT_FOUND, OperationError
from reactor.events import Node
from reactor.operations import Operations, operation

DOCS = Path(__file__).parents[2] / "docs" / "events.md"


class Provider:
    """Operations of the process that the clients call."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = asyncio.Event()
        self.seen: list[Any] = []

    @operation
    def note(self, value: int) -> None:
        self.seen.append(value)

    @operation
    def echo(self, target: str, op: str) -> list[str]:
        return [target, op]

    @operation
    async def wait(self) -> str:
        self.entered.set()
        await self.gate.wait()
        return "opened"


async def with_client(run_dir: Path, use: Callable[[Client, Provider], None]) -> Node:
    """Serve a Provider as "server" while ``use`` runs with a blocking client in a thread."""
    provider, operations = Provider(), Operations()
    operations.add(provider)
    node = Node(run_dir, "server", operations)
    node.start()

    def run() -> None:
        with Client(run_dir) as client:
            use(client, provider)

    try:
        await asyncio.to_thread(run)
    finally:
        node.close()
    return node


async def test_a_call_returns_the_result(run_dir: Path) -> None:
    def use(client: Client, provider: Provider) -> None:
        assert client.call("server", "event_ping", payload={"a": [1]}) == {"a": [1]}

    await with_client(run_dir, use)


async def test_arguments_may_have_the_names_of_our_own_parameters(run_dir: Path) -> None:
    def use(client: Client, provider: Provider) -> None:
        assert client.call("server", "echo", target="a", op="b") == ["a", "b"]

    await with_client(run_dir, use)


async def test_an_error_is_raised_with_its_code(run_dir: Path) -> None:
    def use(client: Client, provider: Provider) -> None:
        with pytest.raises(OperationError, match="nonsense") as caught:
            client.call("server", "nonsense")
        assert caught.value.code == METHOD_NOT_FOUND

    await with_client(run_dir, use)


async def test_a_call_times_out_and_the_late_answer_is_not_taken_for_another(run_dir: Path) -> None:
    def use(client: Client, provider: Provider) -> None:
        with pytest.raises(CallTimeoutError, match="server did not answer wait"):
            client.request("server", "wait", timeout=0.05)
        assert provider.entered.is_set()
        loop.call_soon_threadsafe(provider.gate.set)
        assert client.call("server", "wait") == "opened"
        assert client.call("server", "event_ping", payload=1) == 1

    loop = asyncio.get_running_loop()
    await with_client(run_dir, use)


async def test_more_events_than_a_queue_holds_arrive_in_order(run_dir: Path) -> None:
    providers: list[Provider] = []

    def use(client: Client, provider: Provider) -> None:
        providers.append(provider)
        for n in range(5000):  # several times what one queue holds
            client.send("server", "note", value=n)
        client.call("server", "event_ping")

    await with_client(run_dir, use)
    assert providers[0].seen == list(range(5000))


async def test_a_target_that_never_ran(run_dir: Path) -> None:
    with Client(run_dir) as client, pytest.raises(FileNotFoundError, match="no process"):
        client.call("server", "event_ping")


async def test_the_asynchronous_client_runs_calls_side_by_side(run_dir: Path) -> None:
    provider, operations = Provider(), Operations()
    operations.add(provider)
    node = Node(run_dir, "server", operations)
    node.start()
    try:
        async with AsyncClient(run_dir) as client:
            waiting = asyncio.ensure_future(client.call("server", "wait"))
            client.send("server", "note", value=1)
            assert await client.call("server", "event_ping", payload=2) == 2
            assert provider.seen == [1]
            with pytest.raises(CallTimeoutError):
                await client.request("server", "wait", timeout=0.01)
        with pytest.raises(PeerLostError) as caught:
            await waiting
        assert caught.value.code == -errno.ECONNRESET
    finally:
        node.close()


def example(language: str) -> str:
    """Return the example of a language in docs/events.md."""
    found = re.search(rf"```{language}\n(.*?)```", DOCS.read_text(), re.S)
    assert found
    return found[1]


async def test_the_documented_python_client_works(run_dir: Path) -> None:
    def run(client: Client, provider: Provider) -> None:
        command = [sys.executable, "-c", example("python"), str(run_dir), "server"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)

    await with_client(run_dir, run)


async def test_the_documented_bytes_of_the_c_client_are_a_request(run_dir: Path) -> None:
    request = b"\x82\xa2id\x01\xa2op\xaaevent_ping"
    written = '"\\x82\\xa2id\\x01\\xa2op\\xaa" "event_ping"'
    answer = bytes.fromhex("82 a2 69 64 01 a6 72 65 73 75 6c 74 c0")
    assert written in example("c")
    assert answer.hex(" ") in example("c")
    assert msgpack.unpackb(request) == {"id": 1, "op": "event_ping"}

    def run(client: Client, provider: Provider) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"ipc://{run_dir}/server")
            socket.send(request)
            assert socket.poll(5000)
            assert socket.recv() == answer

    await with_client(run_dir, run)
