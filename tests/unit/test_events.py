from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reactor.envelope import (
    MAX_MESSAGE,
    CallTimeoutError,
    PeerLostError,
    decode_request,
    encode_request,
    salvage_id,
)
from reactor.errors import INVALID_PARAMS, INVALID_REQUEST, METHOD_NOT_FOUND, OperationError
from reactor.events import MAX_IN_FLIGHT, Node
from reactor.fdpass import FdChannel, channel_pair
from reactor.operations import FileDescriptors, Operations, operation
from reactor.sockets import BATCH, HIGH_WATER_MARK
from tests.support.descriptors import open_fds
from tests.support.waiting import PATIENCE, until


class Provider:
    """Operations of the process that the tests call."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.seen: list[Any] = []

    @operation
    def note(self, value: Any = None) -> None:
        self.seen.append(value)

    @operation
    def divide(self, a: int, b: int) -> float:
        return a / b

    @operation
    def refuse(self) -> None:
        raise OperationError(-errno.ENODEV, "No such device", {"name": "Malloc0"})

    @operation
    def unspeakable(self) -> Any:
        return object()

    @operation
    def huge(self) -> str:
        return "x" * (MAX_MESSAGE + 1)

    @operation
    async def wait(self) -> str:
        await self.gate.wait()
        return "opened"

    @operation
    def sizes(self, fds: FileDescriptors) -> list[int]:
        return [os.fstat(fd).st_size for fd in fds]


@contextlib.contextmanager
def make_node(run_dir: Path, name: str, *providers: object) -> Iterator[Node]:
    operations = Operations()
    operations.add(*providers)
    node = Node(run_dir, name, operations)
    node.start()
    try:
        yield node
    finally:
        node.close()


@contextlib.contextmanager
def two_nodes(run_dir: Path) -> Iterator[tuple[Node, Node, Provider]]:
    """A node ``near``, and a node ``far`` that has the operations of the Provider."""
    provider = Provider()
    with make_node(run_dir, "near") as near, make_node(run_dir, "far", provider) as far:
        yield near, far, provider


class RawPeer:
    """A client that says whatever it likes."""

    def __init__(self, run_dir: Path, target: str = "far") -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"ipc://{run_dir}/{target}")

    async def ask(self, *frames: bytes) -> Any:
        self.socket.send_multipart(frames)
        return await self.answer()

    async def answer(self) -> Any:
        received = await asyncio.to_thread(self._receive)
        return msgpack.unpackb(received)

    def _receive(self) -> bytes:
        assert self.socket.poll(5000), "no answer"
        return self.socket.recv()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        self._context.term()


async def test_a_call_returns_the_result(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        assert await near.call("far", "divide", {"a": 6, "b": 4}) == 1.5


async def test_every_process_answers_pings(run_dir: Path) -> None:
    payload = {"n": [1, 2.5, None, True, b"\x00", "é"]}
    with two_nodes(run_dir) as (near, far, _):
        assert await near.call("far", "event_ping", {"payload": payload}) == payload
        assert await far.call("near", "event_ping", {"payload": payload}) == payload


async def test_a_node_can_call_itself(run_dir: Path) -> None:
    with make_node(run_dir, "alone") as node:
        assert await node.call("alone", "event_ping", {"payload": 1}) == 1


async def test_events_without_id_are_not_answered_and_keep_their_order(run_dir: Path) -> None:
    count = 3 * BATCH  # more than one turn of the loop takes
    with two_nodes(run_dir) as (near, far, provider):
        for n in range(count):
            near.send("far", "note", {"value": n})
        await near.call("far", "event_ping")
        assert provider.seen == list(range(count))
        assert far.counters.received == count + 1
        assert near.counters.late == 0


async def test_calls_run_concurrently(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, provider):
        waiting = asyncio.ensure_future(near.call("far", "wait"))
        assert await near.call("far", "event_ping", {"payload": 1}) == 1
        assert not waiting.done()
        provider.gate.set()
        assert await waiting == "opened"


async def test_no_message_is_left_behind_when_sends_and_receives_interleave(run_dir: Path) -> None:
    # Each send may consume the edge that announced an answer: without another look at EVENTS
    # some of these calls would only time out.
    async def caller(node: Node, target: str) -> None:
        for n in range(200):
            assert await node.call(target, "event_ping", {"payload": n}, timeout=PATIENCE) == n

    with two_nodes(run_dir) as (near, far, _):
        calls = [caller(near, "far") for _ in range(5)] + [caller(far, "near") for _ in range(5)]
        await asyncio.gather(*calls)
        assert near.counters.timeouts == far.counters.timeouts == 0


async def test_an_error_has_the_code_message_and_data_of_the_operation(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        with pytest.raises(OperationError, match="No such device") as caught:
            await near.call("far", "refuse")
        assert (caught.value.code, caught.value.data) == (-errno.ENODEV, {"name": "Malloc0"})


async def test_unknown_operation(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, _):
        with pytest.raises(OperationError, match="nonsense") as caught:
            await near.call("far", "nonsense")
        assert caught.value.code == METHOD_NOT_FOUND
        assert far.counters.failed == 1


async def test_a_wrong_argument_is_named(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        with pytest.raises(OperationError, match="b: Expected `int`, got `str`") as caught:
            await near.call("far", "divide", {"a": 1, "b": "2"})
        assert caught.value.code == INVALID_PARAMS


async def test_an_operation_that_raises_does_no_other_harm(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with two_nodes(run_dir) as (near, _, _):
        with pytest.raises(OperationError, match="ZeroDivisionError"):
            await near.call("far", "divide", {"a": 1, "b": 0})
        assert "ZeroDivisionError" in caplog.text
        assert await near.call("far", "divide", {"a": 1, "b": 1}) == 1


async def test_a_result_that_cannot_be_sent_is_an_error(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        with pytest.raises(OperationError, match="cannot be sent"):
            await near.call("far", "unspeakable")
        with pytest.raises(OperationError, match="limit") as caught:
            await near.call("far", "huge")
        assert caught.value.code == -errno.EMSGSIZE


async def test_arguments_that_are_too_large_are_not_sent(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, _):
        with pytest.raises(OperationError) as caught:
            await near.call("far", "event_ping", {"payload": "x" * MAX_MESSAGE})
        assert caught.value.code == -errno.EMSGSIZE
        assert await near.call("far", "event_ping") is None
        assert far.counters.received == 1


async def test_a_call_times_out_and_its_late_answer_is_dropped(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, provider):
        with pytest.raises(CallTimeoutError, match="far did not answer wait") as caught:
            await near.call("far", "wait", timeout=0.02)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, OperationError)
        assert caught.value.code == -errno.ETIMEDOUT
        provider.gate.set()
        await until(lambda: near.counters.late == 1)
        assert near.counters.timeouts == 1
        assert await near.call("far", "event_ping", {"payload": 2}) == 2


async def test_each_call_has_a_time_out_of_its_own(run_dir: Path) -> None:
    ended: list[float] = []

    async def wait(node: Node, timeout: float) -> None:
        with pytest.raises(CallTimeoutError, match=f"within {timeout:g} s"):
            await node.call("far", "wait", timeout=timeout)
        ended.append(timeout)

    with two_nodes(run_dir) as (near, _, _):
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(wait(near, t) for t in (0.09, 0.03, 0.12, 0.06)))
        assert ended == [0.03, 0.06, 0.09, 0.12]
        assert near.counters.timeouts == 4


async def test_a_caller_that_raises_or_leaves_on_its_answer_harms_no_other(run_dir: Path) -> None:
    # A task runs inside the callback that received its answer: what it does must stay its own.
    with two_nodes(run_dir) as (near, _, _), make_node(run_dir, "third") as third:

        async def ping(then: Any) -> Any:
            return then(await near.call("far", "event_ping", {"payload": 1}))

        async def leave() -> None:
            await third.call("far", "event_ping")
            third.forget("far")
            assert await third.call("far", "event_ping", {"payload": 4}) == 4

        results = await asyncio.gather(
            ping(lambda n: n / 0), ping(lambda n: n + 1), leave(), return_exceptions=True
        )
        assert isinstance(results[0], ZeroDivisionError)
        assert results[1:] == [2, None]


async def test_a_call_made_as_soon_as_an_answer_comes_is_answered(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, _):
        for n in range(3 * BATCH):  # each from within the callback of the one before
            assert await near.call("far", "event_ping", {"payload": n}, timeout=PATIENCE) == n
        assert far.counters.received == 3 * BATCH


async def test_a_call_can_be_given_up_by_asyncio(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await near.call("far", "wait", timeout=None)
        assert near.counters.timeouts == 0
        assert await near.call("far", "event_ping", {"payload": 1}) == 1


async def test_a_cancelled_call_leaves_nothing_behind(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        waiting = asyncio.ensure_future(near.call("far", "wait"))
        await near.call("far", "event_ping")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert near._peers.get("far").waiting == 0


async def test_calls_to_a_forgotten_peer_fail_at_once(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        waiting = asyncio.ensure_future(near.call("far", "wait", timeout=None))
        await near.call("far", "event_ping")
        near.forget("far")
        with pytest.raises(PeerLostError, match="far went away before it answered wait") as caught:
            await waiting
        assert caught.value.code == -errno.ECONNRESET
        assert near.counters.lost == 1
        assert await near.call("far", "event_ping", {"payload": 3}) == 3


async def test_a_peer_that_comes_back_under_its_name_is_found_again(run_dir: Path) -> None:
    with make_node(run_dir, "near") as near:
        for generation in range(3):
            with make_node(run_dir, "far"):
                assert await near.call("far", "event_ping", {"payload": generation}) == generation


async def test_a_process_that_never_ran_is_no_target(run_dir: Path) -> None:
    with make_node(run_dir, "near") as near:
        with pytest.raises(FileNotFoundError, match="no process of this name"):
            await near.call("far", "event_ping")
        for name in ("../far", "", "a" * 65, "@thread-0"):
            with pytest.raises(OSError, match="process name"):
                near.send(name, "event_ping")


async def test_a_full_queue_is_an_error_to_the_sender_and_blocks_nobody(run_dir: Path) -> None:
    stuck = zmq.Context()
    listener = stuck.socket(zmq.ROUTER)  # never read
    listener.rcvhwm = 1
    listener.bind(f"ipc://{run_dir}/far")
    payload = {"value": "x" * 60_000}
    try:
        with make_node(run_dir, "near") as near:
            with pytest.raises(OSError, match="events is full") as caught:  # noqa: PT012
                for _ in range(3 * HIGH_WATER_MARK):
                    near.send("far", "note", payload)
            assert caught.value.errno == errno.EAGAIN
            assert near.counters.rejected == 1
    finally:
        stuck.destroy(linger=0)


async def test_operations_in_flight_are_bounded_for_each_sender(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, provider), make_node(run_dir, "other") as other:
        waiting = [asyncio.ensure_future(near.call("far", "wait")) for _ in range(MAX_IN_FLIGHT)]
        await near.call("far", "event_ping")
        with pytest.raises(OperationError, match="busy") as caught:
            await near.call("far", "wait")
        assert caught.value.code == -errno.EAGAIN
        assert far.counters.busy == 1
        others = asyncio.ensure_future(other.call("far", "wait"))
        await other.call("far", "event_ping")
        assert not others.done()
        provider.gate.set()
        assert await asyncio.gather(*waiting, others) == ["opened"] * (MAX_IN_FLIGHT + 1)
        assert await near.call("far", "wait") == "opened"


async def test_an_answer_to_somebody_who_left_is_counted(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, provider):
        with make_node(run_dir, "brief") as brief:
            leaving = asyncio.ensure_future(brief.call("far", "wait"))
            await brief.call("far", "event_ping")
        with pytest.raises(PeerLostError):
            await leaving
        await near.call("far", "event_ping")
        await asyncio.sleep(0.05)  # for the disconnection, which nothing announces
        provider.gate.set()
        await until(lambda: far.counters.undelivered == 1)


MALFORMED = {
    "empty": b"",
    "not a map": msgpack.packb([1, 2]),
    "garbage": b"\xc1\xc1",
    "cut short": encode_request(None, "event_ping", {"payload": "x" * 99})[:-1],
    "two objects": msgpack.packb({"op": "event_ping"}) * 2,
    "no operation": msgpack.packb({}),
    "id of a wrong type": msgpack.packb({"id": 1.5, "op": "event_ping"}),
    "id that is too long": msgpack.packb({"id": "x" * 65, "op": "event_ping"}),
    "not UTF-8": b"\x81\xa2op\xa2\xff\xfe",
    "integer key": b"\x81\x01\xa2op",
    "bottomless": b"\x91" * 100_000,
    "enormous array": b"\x81\xa1x\xdd\xff\xff\xff\xff",
    "nest of large arrays": b"\xdd\x00\x00\xff\xff" * 10_000,
}


async def test_malformed_messages_are_counted_and_nothing_else_happens(run_dir: Path) -> None:
    with two_nodes(run_dir) as (_, far, _), RawPeer(run_dir) as raw:
        for message in MALFORMED.values():
            raw.socket.send(message)
        assert await raw.ask(encode_request(1, "event_ping", {"payload": 1})) == {
            "id": 1,
            "result": 1,
        }
        assert far.counters.malformed == len(MALFORMED)
        assert far.counters.failed == 0


MALFORMED_WITH_ID = {
    "operation is no string": {"id": 7, "op": 1},
    "arguments are no map": {"id": 7, "op": "event_ping", "args": [1]},
    "member that does not exist": {"id": 7, "op": "event_ping", "arg": {}},
    "negative descriptors": {"id": 7, "op": "event_ping", "fds": -1},
    "descriptors are no count": {"id": 7, "op": "event_ping", "fds": [1]},
    "deep arguments": {"id": 7, "op": "event_ping", "args": [[[[]]]]},
}


async def test_malformed_messages_with_an_id_are_answered(run_dir: Path) -> None:
    with two_nodes(run_dir), RawPeer(run_dir) as raw:
        for message in MALFORMED_WITH_ID.values():
            answer = await raw.ask(msgpack.packb(message))
            assert answer["id"] == 7
            assert answer["error"]["code"] == INVALID_REQUEST


async def test_an_id_is_found_in_a_message_whose_rest_is_broken(run_dir: Path) -> None:
    with two_nodes(run_dir), RawPeer(run_dir) as raw:
        nested = b"\x82\xa2id\x09\xa2op" + b"\x91" * 2000
        assert (await raw.ask(nested))["id"] == 9
        oversized = b"\x82\xa2id\x0a\xa2op" + b"x" * MAX_MESSAGE
        assert (await raw.ask(oversized))["error"]["code"] == -errno.EMSGSIZE


async def test_what_can_be_decoded_can_be_answered_however_deep(run_dir: Path) -> None:
    head = b"\x83\xa2id\x01\xa2op\xaaevent_ping\xa4args\x81\xa7payload"
    with two_nodes(run_dir), RawPeer(run_dir) as raw:
        answers = [await raw.ask(head + b"\x91" * n + b"\x90") for n in range(1000, 1040)]
        assert "result" in answers[0]
        assert "error" in answers[-1]


async def test_a_message_of_several_frames_is_malformed(run_dir: Path) -> None:
    with two_nodes(run_dir) as (_, far, _), RawPeer(run_dir) as raw:
        event = encode_request(1, "event_ping", {"payload": 1})
        raw.socket.send_multipart([event, event, event])
        assert await raw.ask(event) == {"id": 1, "result": 1}
        assert far.counters.malformed == 1


async def test_a_message_far_too_large_costs_its_sender_the_connection(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, _), RawPeer(run_dir) as raw:
        raw.socket.send(b"x" * (3 * MAX_MESSAGE))
        assert await near.call("far", "event_ping", {"payload": 1}) == 1
        assert far.counters.received == 1
        assert await raw.ask(encode_request(2, "event_ping", None)) == {"id": 2, "result": None}


async def test_a_malformed_answer_fails_the_call(run_dir: Path) -> None:
    context = zmq.Context()
    liar = context.socket(zmq.ROUTER)
    liar.bind(f"ipc://{run_dir}/far")
    try:
        with make_node(run_dir, "near") as near:
            call = asyncio.ensure_future(near.call("far", "event_ping"))
            identity, _ = await asyncio.to_thread(liar.recv_multipart)
            liar.send_multipart([identity, b"\x82\xa2id\x01\xa6result\xc1"])
            with pytest.raises(OperationError, match="malformed answer"):
                await call
            assert near.counters.malformed == 1
    finally:
        context.destroy(linger=0)


async def test_descriptors_are_handed_to_the_operation_and_closed_after_it(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, far, _):
        ours, theirs = (FdChannel(end) for end in channel_pair())
        far.fd_source = theirs
        fd = os.memfd_create("sized")
        os.truncate(fd, 12345)
        await near.call("far", "event_ping")
        before = open_fds()
        try:
            assert await near.call("far", "sizes", fds=[fd, fd], channel=ours) == [12345, 12345]
            assert open_fds() == before
            with pytest.raises(OperationError, match="takes no file descriptors"):
                await near.call("far", "divide", {"a": 1, "b": 1}, fds=[fd], channel=ours)
            assert open_fds() == before
        finally:
            os.close(fd)
            ours.close()
            theirs.close()


async def test_descriptors_for_a_process_without_a_channel_are_refused(run_dir: Path) -> None:
    with two_nodes(run_dir), RawPeer(run_dir) as raw:
        answer = await raw.ask(encode_request(1, "sizes", None, fds=1))
        assert "takes no file descriptors" in answer["error"]["message"]


async def test_the_socket_is_private(run_dir: Path) -> None:
    with make_node(run_dir, "near"):
        assert stat.S_IMODE((run_dir / "near").stat().st_mode) == 0o600


async def test_a_name_in_use_is_refused_and_its_owner_unharmed(run_dir: Path) -> None:
    with two_nodes(run_dir) as (near, _, _):
        with pytest.raises(OSError, match="another process serves this socket") as caught:
            Node(run_dir, "far", Operations())
        assert caught.value.errno == errno.EADDRINUSE
        assert await near.call("far", "event_ping", {"payload": 1}) == 1


async def test_the_socket_file_of_a_dead_process_is_replaced(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{run_dir}/near")
    with make_node(run_dir, "near") as near:
        assert await near.call("near", "event_ping", {"payload": 1}) == 1


async def test_a_run_directory_with_too_long_a_name(run_dir: Path) -> None:
    with pytest.raises(OSError, match="shorter run directory") as caught:
        Node(run_dir / ("x" * 100), "near", Operations())
    assert caught.value.errno == errno.ENAMETOOLONG


async def test_a_closed_node_leaves_neither_threads_nor_descriptors(run_dir: Path) -> None:
    def owned() -> tuple[int, int]:
        return open_fds(), len(os.listdir("/proc/self/task"))

    before = owned()
    with two_nodes(run_dir) as (near, far, _):
        await near.call("far", "event_ping")
        await far.call("near", "event_ping")
        await near.run_in_thread(int)
    await until(lambda: owned() == before)  # a thread that was joined is still about to exit
    assert os.listdir(run_dir) == []


async def test_work_in_a_thread_leaves_the_loop_free(run_dir: Path) -> None:
    release = threading.Event()

    def block() -> int:
        assert release.wait(PATIENCE)
        return threading.get_ident()

    with make_node(run_dir, "near") as near:
        running = asyncio.ensure_future(near.run_in_thread(block))
        assert await near.call("near", "event_ping", {"payload": 1}) == 1
        assert not running.done()
        release.set()
        assert await running != threading.get_ident()


async def test_jobs_run_side_by_side_in_a_bounded_number_of_threads(run_dir: Path) -> None:
    together = threading.Barrier(4)

    def meet() -> int:
        together.wait(PATIENCE)
        return threading.get_ident()

    with make_node(run_dir, "near") as near:
        threads = await asyncio.gather(*(near.run_in_thread(meet) for _ in range(8)))
        assert len(threads) == 8
        assert len(set(threads)) == 4


async def test_what_a_thread_raises_reaches_the_caller(run_dir: Path) -> None:
    with make_node(run_dir, "near") as near:
        with pytest.raises(ZeroDivisionError):
            await near.run_in_thread(lambda: 1 // 0)
        assert await near.run_in_thread(lambda: {1: object}) == {1: object}


async def test_helper_threads_are_not_pinned_with_the_process(run_dir: Path) -> None:
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("needs two CPUs")
    with make_node(run_dir, "near") as near:
        await near.call("near", "event_ping")
        os.sched_setaffinity(0, {min(everywhere)})
        try:
            assert await near.run_in_thread(lambda: os.sched_getaffinity(0)) == everywhere
            others = {int(t) for t in os.listdir("/proc/self/task")} - {threading.get_native_id()}
            assert len(others) >= 3  # ZeroMQ's I/O thread and reaper, and ours
            for thread in others:
                assert os.sched_getaffinity(thread) == everywhere
        finally:
            os.sched_setaffinity(0, everywhere)


@given(st.binary(max_size=200))
def test_decoding_raises_nothing_but_operation_errors(payload: bytes) -> None:
    with contextlib.suppress(OperationError):
        _, op, args, fds = decode_request(payload)
        assert isinstance(op, str)
        assert isinstance(args, dict)
        assert fds >= 0
    salvage_id(payload)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["id", "op", "args", "fds", "x"]), VALUES))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_decoding_maps_of_any_shape(message: dict[str, Any]) -> None:
    with contextlib.suppress(OperationError):
        decode_request(msgpack.packb(message))


@given(
    st.integers(0, 2**64 - 1) | st.text(max_size=64), st.text(), st.dictionaries(st.text(), VALUES)
)
def test_what_is_encoded_is_decoded(event_id: int | str, op: str, args: dict[str, Any]) -> None:
    assert decode_request(encode_request(event_id, op, args)) == (event_id, op, args, 0)


@given(st.integers(0, 2**64 - 1), st.binary())
def test_the_id_can_be_salvaged_from_any_beginning(event_id: int, rest: bytes) -> None:
    payload = b"\x84\xa2id" + msgpack.packb(event_id) + rest
    assert salvage_id(payload) == event_id
