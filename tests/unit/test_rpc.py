"""The JSON-RPC server, spoken to over its socket."""

import asyncio
import json
import os
import socket
import stat
from contextlib import asynccontextmanager

import pytest

from reactor.errors import OperationError
from reactor.lockfile import InUse
from reactor.operations import Operations, operation
from reactor.rpc import PATH_MAX, RpcServer
from tests.support.waiting import PATIENCE, until


class Provider:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started = 0
        self.finished = 0
        self.cancelled = 0

    @operation
    def echo(self, value: object = None) -> object:
        return value

    @operation(aliases=["old_wait"])
    async def wait(self) -> str:
        self.started += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.finished += 1
        return "waited"

    @operation
    async def open_gate(self) -> bool:
        self.gate.set()
        return True

    @operation
    def refuse(self) -> None:
        raise OperationError(-19, "disk none: no such device", {"name": "none"})

    @operation
    def missing_file(self) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/nowhere")

    @operation
    def crash(self) -> None:
        raise RuntimeError("a bug")

    @operation
    def not_json(self) -> float:
        return float("nan")


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def write(self, *requests: object) -> None:
        for request in requests:
            raw = request if isinstance(request, bytes) else json.dumps(request, indent=2).encode()
            self.writer.write(raw)

    async def read(self):
        return json.loads(await asyncio.wait_for(self.reader.readline(), PATIENCE))

    async def ask(self, *requests: object):
        self.write(*requests)
        return await self.read()

    async def at_end(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), PATIENCE) == b""


@asynccontextmanager
async def serving(path, **limits):
    provider, operations = Provider(), Operations()
    operations.add(provider)
    server = RpcServer(path, operations, **limits)
    server.bind()
    await server.start()
    try:
        yield provider
    finally:
        provider.gate.set()
        await server.close()


@asynccontextmanager
async def connected(path):
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def request(method, identifier=1, **params):
    return {"jsonrpc": "2.0", "method": method, "id": identifier, "params": params}


async def settle() -> None:
    """Let the loop do whatever it can do without news from outside."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "rpc.sock")


@pytest.fixture
def talk(path):
    """Run a coroutine function with a client, and the provider behind the server."""

    def run(conversation, **limits):
        async def main():
            async with serving(path, **limits) as provider, connected(path) as client:
                return await conversation(client, provider)

        return asyncio.run(main())

    return run


@pytest.mark.parametrize("identifier", [0, -7, 1.5, "seven", "", None, 2**70])
def test_a_reply_carries_the_id_of_its_request(talk, identifier):
    async def conversation(client, _):
        return await client.ask(request("echo", identifier, value=[1, {"a": None}]))

    assert talk(conversation) == {"jsonrpc": "2.0", "id": identifier, "result": [1, {"a": None}]}


@pytest.mark.parametrize("params", ["absent", None, {}])
def test_params_may_be_absent_null_or_empty(talk, params):
    async def conversation(client, _):
        asked = {"jsonrpc": "2.0", "method": "echo", "id": 1, "params": params}
        if params == "absent":
            del asked["params"]
        return await client.ask(asked)

    assert talk(conversation)["result"] is None


@pytest.mark.parametrize(
    ("asked", "identifier", "code", "reason"),
    [
        (request("nosuch"), 1, -32601, "Method not found: nosuch"),
        ({"method": "echo", "id": 6, "params": [1]}, 6, -32602, "not an array"),
        (request("echo", bogus=1), 1, -32602, "bogus"),
        (request("refuse"), 1, -19, "disk none: no such device"),
        (request("missing_file"), 1, -2, "No such file or directory: /nowhere"),
        (request("crash"), 1, -32603, "RuntimeError: a bug"),
        (request("not_json"), 1, -32603, "internal error"),
        ({"jsonrpc": "2.0", "id": 5}, None, -32600, "method is missing"),
        ({"method": 5, "id": 5}, None, -32600, "method must be a string"),
        ({"jsonrpc": "1.0", "method": "echo", "id": 5}, None, -32600, "jsonrpc"),
        ({"method": "echo", "id": True}, None, -32600, "not boolean"),
        ({"method": "echo", "id": {}}, None, -32600, "not object"),
        ({"method": "echo", "id": 5, "params": "x"}, None, -32600, "not string"),
        ({"method": "echo", "id": 5, "parms": {}}, None, -32600, "unknown member 'parms'"),
        ([], None, -32600, "batch is empty"),
        (b'"text" ', None, -32600, "expected an object, got string"),
        (b"12 ", None, -32600, "expected an object, got number"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_the_connection_goes_on(
    talk, asked, identifier, code, reason
):
    async def conversation(client, _):
        return await client.ask(asked), await client.ask(request("echo", "next", value=1))

    refused, following = talk(conversation)
    assert (refused["id"], refused["error"]["code"]) == (identifier, code)
    assert reason in refused["error"]["message"]
    assert following == {"jsonrpc": "2.0", "id": "next", "result": 1}


def test_data_of_an_error_is_passed_on(talk):
    async def conversation(client, _):
        return await client.ask(request("refuse"))

    assert talk(conversation)["error"]["data"] == {"name": "none"}


@pytest.mark.parametrize(
    "text", [b'{"method" "echo"}', b"]", b"nonsense ", b'{"a":1]', b'{"a":"\xff"}', b"[" * 5000]
)
def test_what_is_not_json_is_refused_and_ends_the_connection(talk, text):
    async def conversation(client, _):
        refused = await client.ask(text)
        return refused, await client.at_end()

    refused, ended = talk(conversation)
    assert (refused["id"], refused["error"]["code"]) == (None, -32700)
    assert ended


def test_requests_before_malformed_text_are_answered(talk):
    async def conversation(client, _):
        client.write(request("echo", 1, value="kept"), b"}")
        return [await client.read(), await client.read()], await client.at_end()

    replies, _ = talk(conversation)
    assert {reply["id"] for reply in replies} == {1, None}


def test_a_request_that_is_too_large_is_refused(talk):
    async def conversation(client, _):
        fits = await client.ask(request("echo", value="x" * 100))
        return fits, await client.ask(request("echo", value="x" * 1000))

    fits, refused = talk(conversation, max_request=512)
    assert "result" in fits
    assert "more than 512 bytes" in refused["error"]["message"]


def test_a_notification_is_carried_out_and_not_answered(talk):
    async def conversation(client, provider):
        client.write({"method": "open_gate"}, {"method": "nosuch"}, {"method": "crash"})
        reply = await client.ask(request("echo", 9))
        return reply["id"], provider.gate.is_set()

    assert talk(conversation) == (9, True)


def test_pipelined_requests_run_concurrently(talk):
    async def conversation(client, _):
        client.write(request("wait", "slow"), request("open_gate", "fast"))
        return [(await client.read())["id"] for _ in range(2)]

    assert talk(conversation) == ["fast", "slow"]


def test_a_request_may_arrive_in_any_pieces(talk):
    async def conversation(client, _):
        raw = json.dumps(request("echo", value='a "quoted" \u20ac'), ensure_ascii=False).encode()
        for i in range(len(raw)):
            client.write(raw[i : i + 1])
            await client.writer.drain()
            await asyncio.sleep(0)
        return await client.read()

    assert talk(conversation)["result"] == 'a "quoted" \u20ac'


def test_replies_are_ascii(talk):
    async def conversation(client, _):
        client.write(request("echo", value="\u20ac"))
        return await client.reader.readline()

    assert b"\\u20ac" in talk(conversation)


def test_a_batch_is_answered_as_one_array_in_order(talk):
    async def conversation(client, _):
        batch = [request("echo", 7, value=1), request("nosuch", 8), {"method": "echo"}, 5]
        return await client.ask(batch)

    first, second, third = talk(conversation)
    assert (first["id"], first["result"]) == (7, 1)
    assert (second["id"], second["error"]["code"]) == (8, -32601)
    assert (third["id"], third["error"]["code"]) == (None, -32600)


def test_a_batch_runs_in_order(talk):
    async def conversation(client, provider):
        client.write([request("wait", 1), request("open_gate", 2)])
        await until(lambda: provider.started)
        reply = await client.ask(request("echo", "aside"))
        gate_was_closed = not provider.gate.is_set()
        provider.gate.set()
        return reply["id"], gate_was_closed, [one["id"] for one in await client.read()]

    assert talk(conversation) == ("aside", True, [1, 2])


def test_a_batch_of_notifications_is_not_answered(talk):
    async def conversation(client, _):
        return await client.ask([{"method": "echo"}, {"method": "echo"}], request("echo", 3))

    assert talk(conversation)["id"] == 3


def test_a_connection_has_a_bounded_number_of_requests_running(talk):
    async def conversation(client, provider):
        client.write(*(request("wait", i) for i in range(10)))
        await client.writer.drain()
        await until(lambda: provider.started == 4)
        await settle()
        running = provider.started
        provider.gate.set()
        return running, {(await client.read())["id"] for _ in range(10)}

    assert talk(conversation, max_pending=4) == (4, set(range(10)))


def test_a_client_that_leaves_mid_call_harms_nobody(path):
    async def main():
        async with serving(path) as provider:
            async with connected(path) as leaving:
                leaving.write(request("wait"))
                await until(lambda: provider.started)
            async with connected(path) as other:
                answered = await other.ask(request("open_gate"))
                await until(lambda: provider.finished)
            return answered["result"]

    assert asyncio.run(main()) is True


def test_replies_to_a_client_that_has_left_are_dropped_in_silence(path, caplog):
    async def main():
        async with serving(path) as provider:
            async with connected(path) as leaving:
                leaving.write(*(request("wait", i) for i in range(20)))
                await until(lambda: provider.started == 20)
            provider.gate.set()
            await until(lambda: provider.finished == 20)
            await settle()

    asyncio.run(main())
    assert caplog.messages == []


def test_a_client_that_shuts_its_sending_side_gets_its_replies(talk):
    async def conversation(client, provider):
        client.write(request("wait"))
        client.writer.write_eof()
        await until(lambda: provider.started)
        await settle()
        provider.gate.set()
        return await client.read(), await client.at_end()

    reply, ended = talk(conversation)
    assert reply["result"] == "waited"
    assert ended


async def send_until_stuck(client: socket.socket, raw: bytes, most: int) -> int:
    """Return how many bytes could be sent, in whole requests, before sending got stuck."""
    sent = 0
    while sent < most:
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(client, raw), 0.3)
        except TimeoutError:
            break
        sent += len(raw)
    return sent


def test_a_client_that_does_not_read_stops_being_read(path):
    async def main():
        async with serving(path, max_pending=2), connected(path) as other:
            with socket.socket(socket.AF_UNIX) as slow:
                slow.setblocking(False)
                slow.connect(path)
                raw = json.dumps(request("echo", value="x" * 4000)).encode()
                sent = await send_until_stuck(slow, raw, 64 << 20)
                return sent, (await other.ask(request("echo", 1)))["id"]

    sent, answered = asyncio.run(main())
    assert sent < 8 << 20
    assert answered == 1


def test_the_socket_is_its_owners_alone_whatever_the_umask(path):
    async def main():
        before = os.umask(0)
        try:
            async with serving(path):
                return stat.S_IMODE(os.stat(path).st_mode)
        finally:
            os.umask(before)

    assert asyncio.run(main()) == 0o600


def test_closing_leaves_nothing_behind(path, tmp_path):
    async def main():
        async with serving(path), connected(path) as client:
            await client.ask(request("echo"))

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_a_second_server_is_refused_and_the_first_goes_on(path):
    async def main():
        async with serving(path), connected(path) as client:
            with pytest.raises(InUse, match=f"{path} is in use by pid {os.getpid()}"):
                RpcServer(path, Operations()).bind()
            return await client.ask(request("echo", 4))

    assert asyncio.run(main())["id"] == 4


def test_a_socket_of_another_program_that_listens_is_left_alone(path, tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen(1)
        with pytest.raises(InUse, match="a server listens on it"):
            RpcServer(path, Operations()).bind()
    assert [entry.name for entry in tmp_path.iterdir()] == ["rpc.sock"]


def test_a_stale_socket_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)

    async def main():
        async with serving(path), connected(path) as client:
            return await client.ask(request("echo", 4))

    assert asyncio.run(main())["id"] == 4


def test_a_file_is_not_replaced(path, tmp_path):
    (tmp_path / "rpc.sock").write_text("precious")
    with pytest.raises(InUse, match="not a socket"):
        RpcServer(path, Operations()).bind()
    assert (tmp_path / "rpc.sock").read_text() == "precious"


def test_no_such_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RpcServer(str(tmp_path / "nowhere" / "rpc.sock"), Operations()).bind()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path):
    with pytest.raises(OSError, match=str(PATH_MAX)):
        RpcServer(str(tmp_path / ("x" * 120)), Operations()).bind()


def test_clients_that_connect_before_the_start_are_served_after_it(path):
    async def main():
        operations = Operations()
        operations.add(Provider())
        server = RpcServer(path, operations)
        server.bind()
        async with connected(path) as early:
            early.write(request("echo", "early"))
            await server.start()
            reply = await early.read()
        await server.close()
        return reply["id"]

    assert asyncio.run(main()) == "early"


def test_replies_that_are_due_leave_before_the_server_closes(path):
    async def main():
        operations, provider = Operations(), Provider()
        operations.add(provider)
        server = RpcServer(path, operations)
        await server.start()
        async with connected(path) as client:
            client.write(request("wait", "due"))
            await until(lambda: provider.started)
            closing = asyncio.create_task(server.close())
            await until(lambda: not os.path.exists(path))
            await settle()
            provider.gate.set()
            reply = await client.read()
            await closing
            return reply["id"], await client.at_end()

    assert asyncio.run(main()) == ("due", True)


def test_a_request_that_never_ends_does_not_keep_the_server_from_closing(path, tmp_path):
    async def main():
        operations, provider = Operations(), Provider()
        operations.add(provider)
        server = RpcServer(path, operations)
        await server.start()
        async with connected(path) as client:
            client.write(request("wait"))
            await until(lambda: provider.started)
            await server.close(grace=0.01)
            with pytest.raises((ConnectionResetError, json.JSONDecodeError)):
                await client.read()
            await settle()
        return provider.finished, provider.cancelled

    assert asyncio.run(main()) == (0, 1)
    assert list(tmp_path.iterdir()) == []
