"""The control process dies while another bdev takes the place of one that a guest writes to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from spdk.rpc.client import JSONRPCException  # type: ignore[import-untyped]

from tests.support.adoption import PATIENCE, cluster
from tests.support.cluster import Cluster
from vhost.frontend import BlkFrontend

BLOCK = 512
BLOCKS = 1 << 17
SWAP = {"ctrlr": "b0", "dev_name": "new"}


def stamp(block: int) -> bytes:
    return block.to_bytes(8, "little") * (BLOCK // 8)


class Writer:
    """A guest that writes each block once; ``written`` of them have been answered.

    Both bdevs are empty in the beginning, so the blocks of one tell which writes went to it.
    """

    def __init__(self, front: BlkFrontend) -> None:
        self.written = 0
        self._front = front
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for block in range(1, BLOCKS):
            if self._ended.is_set():
                return
            self._front.write(block * BLOCK, stamp(block), queue=0)
            self.written = block

    def progress(self, count: int, patience: float = PATIENCE) -> bool:
        """Wait until so many more have been written; tell whether they were, in time."""
        wanted, deadline = self.written + count, time.monotonic() + patience
        while self.written < wanted and time.monotonic() < deadline:
            assert self._thread.is_alive()
            time.sleep(0.002)
        return self.written >= wanted

    def end(self) -> int:
        """Stop, and return how many blocks were written."""
        self._ended.set()
        self._thread.join()
        return self.written

    def found(self) -> list[int]:
        """Return the blocks that can be read back."""
        asked = range(1, self.written + 1)
        return [
            block
            for block in asked
            if self._front.read(block * BLOCK, BLOCK, queue=1) == stamp(block)
        ]


@contextmanager
def writing(target: Cluster) -> Iterator[Writer]:
    for name in ("old", "new"):
        target.rpc("bdev_malloc_create", name=name, num_blocks=BLOCKS, block_size=BLOCK)
    target.rpc("vhost_create_blk_controller", ctrlr="b0", dev_name="old")
    socket = str(target.socket("b0"))
    with BlkFrontend.connect(socket, queues=2, timeout=PATIENCE) as front:
        writer = Writer(front)
        try:
            assert writer.progress(10)
            yield writer
        finally:
            writer.end()


@contextmanager
def swapping(target: Cluster) -> Iterator[None]:
    """Ask for the new bdev, of a control process that will not live to answer."""

    def ask() -> None:
        with suppress(JSONRPCException):  # it may be quick
            target.rpc("vhost_blk_controller_set_bdev", **SWAP)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        asking.join()


def served(target: Cluster) -> str:
    (controller,) = target.rpc("vhost_get_controllers")
    name: str = controller["backend_specific"]["block"]["bdev"]
    return name


def test_nothing_is_written_to_the_new_bdev_while_another_queue_still_has_the_old() -> None:
    with cluster("0x3") as target, writing(target) as writer:
        (controller,) = target.rpc("vhost_get_controllers")
        (session,) = controller["sessions"]
        places = [queue["cpu"] for queue in session["queues"]]
        assert places[0] != places[1]
        stuck = psutil.Process(target.reactors()[places[1]])
        stuck.suspend()  # the last queue cannot be stopped
        try:
            with swapping(target):
                # Answered after the swap has begun. It stops the first queue, and waits.
                assert served(target) == "old"
                assert not writer.progress(2000, patience=2.0)
                target.kill_control()
        finally:
            stuck.resume()
        target.restart()
        assert served(target) == "old"
        assert writer.progress(10)
        written = writer.end()
        assert writer.found() == list(range(1, written + 1))
        target.stop()


def test_what_was_written_to_the_new_bdev_is_there_when_the_control_process_dies_at_once() -> None:
    with cluster("0x3") as target, writing(target) as writer:
        config = target.run_dir / "config.json"
        with swapping(target):
            while '"dev_name":"new"' not in config.read_text():
                time.sleep(0)
            target.kill_control()
        target.restart()
        assert served(target) == "new"
        assert writer.progress(10)
        written = writer.end()
        found = writer.found()
        # Those before went to the old one, and all since then are there.
        assert found == list(range(found[0], written + 1))
        assert found[0] > 10
        target.stop()
