"""Loaded into the reactors of tests: operations that show, or break, what a reactor is."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from reactor.operations import FileDescriptors, operation
from reactor.process import ReactorContext


class TestOperations:
    def __init__(self, reactor: ReactorContext) -> None:
        self._reactor = reactor
        self._gate = asyncio.Event()
        self._drained: str | None = None

    @operation
    def test_whoami(self) -> dict[str, Any]:
        tasks = Path("/proc/self/task")
        return {
            "cpu": self._reactor.cpu,
            "pid": os.getpid(),
            "affinity": {
                (task / "stat").read_text().split()[0]: sorted(os.sched_getaffinity(int(task.name)))
                for task in tasks.iterdir()
            },
            "comm": Path("/proc/self/comm").read_text().strip(),
            "fds": sorted(
                os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()
            ),
            "rss": int(Path("/proc/self/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE"),
        }

    @operation
    def test_read(self, fds: FileDescriptors) -> list[bytes]:
        return [os.pread(fd, 100, 0) for fd in fds]

    @operation
    async def test_hang(self) -> None:
        await self._gate.wait()

    @operation
    def test_block(self) -> None:
        """Be a reactor that answers nobody, not even the control process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.pause()

    @operation
    def test_spin(self) -> None:
        """Be a reactor that is caught in a loop."""
        while True:
            pass

    @operation
    def test_die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @operation
    def test_drain_into(self, path: str) -> None:
        self._drained = path

    async def drain(self) -> None:
        if self._drained is not None:
            await asyncio.sleep(0)
            Path(self._drained).write_text("drained")  # noqa: ASYNC240


def setup(reactor: ReactorContext) -> None:
    operations = TestOperations(reactor)
    reactor.operations.add(operations)
    reactor.on_stop(operations.drain)
    if reactor.node.name == f"reactor-{os.environ.get('TEST_FAIL_CPU')}":
        raise RuntimeError("told to fail")
