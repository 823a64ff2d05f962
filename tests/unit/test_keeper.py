"""The keeper process: what it keeps, hands over, commits, and when it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec
import pytest

from reactor.frames import Frames
from reactor.keeper import SOCKET, Answer, Request
from reactor.operations import FileDescriptors
from reactor.vault import Vault
from tests.support.waiting import PATIENCE


class Control:
    """A control process, as the keeper sees it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self._frames = Frames(sock)

    def send(self, request: Request, fds: list[int] | None = None) -> None:
        """Send a request, and wait for nothing."""
        self._frames.send(msgspec.msgpack.encode(request), fds or [])

    def receive(self) -> tuple[Answer, FileDescriptors]:
        """Return the next answer."""
        message = None
        while message is None:
            message = self._frames.receive()
        return msgspec.msgpack.decode(message[0], type=Answer), message[1]

    def ask(self, request: Request, fds: list[int] | None = None) -> int:
        """Send a request and return the errno of its answer."""
        self.send(request, fds)
        return self.receive()[0].error

    def die(self) -> None:
        """End, as the kernel ends it."""
        self._frames.close()


class Keeper:
    """A keeper in a directory of its own."""

    def __init__(self, folder: str, timeout: float) -> None:
        self.folder = folder
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "reactor.keeper", "--run-dir", folder]
        command += ["--channel", str(theirs.fileno()), "--timeout", str(timeout)]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self.control = Control(ours)

    def successor(self) -> tuple[Control, dict[str, tuple[bytes, FileDescriptors]]]:
        """Return the next control process, and what it was handed over."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(os.path.join(self.folder, SOCKET))
        control, found = Control(sock), {}
        try:
            while (answer := control.receive())[0].key:
                found[answer[0].key] = (answer[0].data, answer[1])
        except BaseException:
            control.die()
            raise
        return control, found


@contextmanager
def keeping(timeout: float = 60.0) -> Iterator[Keeper]:
    with tempfile.TemporaryDirectory(prefix="vr-") as folder:
        keeper = Keeper(folder, timeout)
        try:
            yield keeper
        finally:
            keeper.control.die()
            keeper.process.terminate()
            assert keeper.process.wait(PATIENCE) == 0
            assert os.listdir(folder) == []


def memory(text: bytes) -> int:
    fd = os.memfd_create("kept")
    os.write(fd, text)
    return fd


def test_what_was_put_is_handed_over_to_the_next_control_process() -> None:
    with keeping() as keeper:
        fd = memory(b"contents")
        assert keeper.control.ask(Request("put", "a", b"one"), [fd]) == 0
        assert keeper.control.ask(Request("put", "b", b"two")) == 0
        assert keeper.control.ask(Request("put", "b", b"three")) == 0
        assert keeper.control.ask(Request("put", "c", b"four")) == 0
        assert keeper.control.ask(Request("drop", "c")) == 0
        os.close(fd)
        keeper.control.die()
        keeper.control, found = keeper.successor()
        assert {key: data for key, (data, _) in found.items()} == {"a": b"one", "b": b"three"}
        with found["a"][1] as fds:
            assert os.pread(fds[0], 100, 0) == b"contents"


def test_an_entry_may_have_any_size_and_any_number_of_descriptors() -> None:
    with keeping() as keeper:
        data, fd = os.urandom(300_000), memory(b"")
        assert keeper.control.ask(Request("put", "a", data), [fd] * 700) == 0
        os.close(fd)
        keeper.control.die()
        keeper.control, found = keeper.successor()
        with found["a"][1] as fds:
            assert (found["a"][0], len(fds)) == (data, 700)


def test_what_a_control_process_sent_before_it_died_is_carried_out() -> None:
    with keeping() as keeper:
        for number in range(100):
            keeper.control.send(Request("put", "a", b"%d" % number))
        keeper.control.die()
        keeper.control, found = keeper.successor()
        assert found["a"][0] == b"99"


def test_it_is_carried_out_also_if_answers_were_not_read() -> None:
    with keeping() as keeper:
        assert keeper.control.ask(Request("put", "a", b"0")) == 0
        os.kill(keeper.process.pid, signal.SIGSTOP)
        for number in range(1, 50):
            keeper.control.send(Request("put", "a", b"%d" % number))
        os.kill(keeper.process.pid, signal.SIGCONT)
        keeper.control.receive()  # others are on their way, or will be
        keeper.control.die()
        keeper.control, found = keeper.successor()
        assert found["a"][0] == b"49"


def test_half_a_request_is_none() -> None:
    with keeping() as keeper:
        assert keeper.control.ask(Request("put", "a", b"whole")) == 0
        frame = b"\1" + msgspec.msgpack.encode(Request("put", "a", b"half"))
        keeper.control._frames.socket.send(frame)  # says that more of it follows
        keeper.control.die()
        keeper.control, found = keeper.successor()
        assert found["a"][0] == b"whole"


def test_nothing_is_handed_over_while_a_control_process_lives() -> None:
    with keeping() as keeper:
        assert keeper.control.ask(Request("put", "a", b"one")) == 0
        with pytest.raises((EOFError, ConnectionError)):
            keeper.successor()
        assert keeper.control.ask(Request("put", "a", b"two")) == 0


def test_a_message_is_answered_taken_out_and_noted_at_once() -> None:
    with keeping() as keeper:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert keeper.control.ask(Request("put", "s", b"before"), [ours.fileno()]) == 0
            fd = memory(b"answer")
            socket.send_fds(theirs, [b"first"], [fd])
            theirs.send(b"second")
            finish = Request("finish", "s", b"after", consume=8, reply=b"reply", reply_fds=1)
            assert keeper.control.ask(finish, [ours.fileno(), fd]) == 0
            os.close(fd)
            data, fds, _, _ = socket.recv_fds(theirs, 100, 1)
            assert (data, os.pread(fds[0], 100, 0)) == (b"reply", b"answer")
            os.close(fds[0])
            assert ours.recv(100) == b"ond"
            keeper.control.die()
            keeper.control, found = keeper.successor()
            assert (found["s"][0], len(found["s"][1])) == (b"after", 1)
            found["s"][1].close()


def test_nothing_is_done_of_a_message_whose_answer_cannot_be_sent_yet() -> None:
    with keeping() as keeper:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert keeper.control.ask(Request("put", "s", b"before"), [ours.fileno()]) == 0
            theirs.send(b"message")
            ours.setblocking(False)
            with suppress(BlockingIOError):
                while ours.send(bytes(4096)):
                    pass
            finish = Request("finish", "s", b"after", consume=7, reply=b"reply")
            assert keeper.control.ask(finish, [ours.fileno()]) == errno.EAGAIN
            assert ours.recv(100, socket.MSG_PEEK) == b"message"
            keeper.control.die()
            keeper.control, found = keeper.successor()
            assert found["s"][0] == b"before"
            found["s"][1].close()


def test_it_ends_when_nobody_comes_in_time() -> None:
    with keeping(timeout=0.05) as keeper:
        assert keeper.control.ask(Request("put", "a", b"one")) == 0
        keeper.control.die()
        assert keeper.process.wait(PATIENCE) == 0


def test_it_ends_when_it_is_told_to() -> None:
    with keeping() as keeper:
        assert keeper.control.ask(Request("end")) == 0
        assert keeper.process.wait(PATIENCE) == 0


def test_a_signal_does_not_end_it_while_there_is_a_control_process() -> None:
    with keeping() as keeper:
        assert keeper.control.ask(Request("put", "a", b"one")) == 0
        keeper.process.terminate()
        assert keeper.control.ask(Request("put", "a", b"two")) == 0


PREDECESSOR = """
import asyncio, os, signal, sys
from reactor.vault import Vault

async def main():
    vault = Vault(sys.argv[1])
    await vault.open()
    fd = os.memfd_create("kept")
    os.write(fd, b"contents")
    await vault.put("a", lambda: (b"one", [fd]))
    former = vault.pid
    if sys.argv[2] == "die":
        os.kill(former, signal.SIGKILL)
    else:
        await vault.renew()
    await vault.put("b", lambda: (b"two", []))  # waits for the next one
    assert vault.pid != former
    os._exit(0)

asyncio.run(main())
"""


def run_predecessor(folder: str, how: str) -> None:
    subprocess.run([sys.executable, "-c", PREDECESSOR, folder, how], check=True)


@pytest.mark.parametrize("how", ["die", "renew"])
async def test_a_keeper_is_replaced_by_one_that_has_everything(how: str) -> None:
    with tempfile.TemporaryDirectory(prefix="vr-") as folder:
        run_predecessor(folder, how)
        heir = Vault(folder)
        await heir.open()
        assert heir.adopted
        a, b = heir.inherit("a"), heir.inherit("b")
        assert a is not None
        assert b is not None
        with a.fds:
            assert (a.data, b.data, os.pread(a.fds[0], 100, 0)) == (b"one", b"two", b"contents")
        await heir.close()
        assert os.listdir(folder) == []
