"""A child process, watched through a pidfd: reaped when it exits, never signalled after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence


class Child:
    """A Python module run as a program by a process of its own.

    It inherits standard output and error and ``pass_fds``, and finds the same packages as this
    process. ``exited`` is set to its return code (negative: the signal that killed it).
    """

    def __init__(self, module: str, arguments: Sequence[str], pass_fds: Sequence[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=pass_fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            process_group=0,  # a Ctrl-C at the terminal is the parent's to handle
        )
        self.pid = self._process.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self._loop.add_reader(self._pidfd, self._reap)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not exited."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int:
        """Return the return code, once it has exited."""
        return await asyncio.shield(self.exited)

    async def kill(self) -> int:
        """Kill it, and return the return code."""
        self.send_signal(signal.SIGKILL)
        return await self.wait()

    def end_blocking(self, patience: float) -> None:
        """Wait for its exit, kill it after ``patience`` seconds: for when no loop will run."""
        if not self.exited.done():
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(patience * 1000):
                self.send_signal(signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(self._process.wait())


def describe_exit(code: int) -> str:
    """Return what a return code means, to follow a name: "was killed by SIGKILL"."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
