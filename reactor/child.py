"""Processes that we started or took over, watched through pidfds: never signalled after the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

_STDERR = 2


class Process:
    """A process behind a pidfd, which becomes ours to close when the process has ended.

    ``exited`` is set to its return code (negative: the signal that killed it), or to None if it is
    not our child: then nobody tells us.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self.pid = pid
        self.pidfd = pidfd
        self._loop.add_reader(pidfd, self._ended)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not exited."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> int | None:
        """Return the return code, once it has exited."""
        return await asyncio.shield(self.exited)

    async def kill(self) -> int | None:
        """Kill it, and return the return code."""
        self.send_signal(signal.SIGKILL)
        return await self.wait()

    def end_blocking(self, patience: float) -> None:
        """Wait for its exit, kill it after ``patience`` seconds: for when no loop will run."""
        if not self.exited.done():
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if not poll.poll(patience * 1000):
                self.send_signal(signal.SIGKILL)
                poll.poll()
            self._ended()

    def _ended(self) -> None:
        self._loop.remove_reader(self.pidfd)
        code = self._reap()
        os.close(self.pidfd)
        self.pidfd = -1
        self.exited.set_result(code)

    def _reap(self) -> int | None:
        """Return the return code of a child of ours, as it is after an upgrade."""
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        except ChildProcessError:
            return None
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


class Child(Process):
    """A Python module run as a program by a process of its own.

    It inherits standard error, which is its standard output too, and ``pass_fds``, and finds the
    same packages as this process.
    """

    def __init__(self, module: str, arguments: Sequence[str], pass_fds: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,  # ours may be a pipe, whose reader waits for our end
            pass_fds=pass_fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            process_group=0,  # a Ctrl-C at the terminal is the parent's to handle
        )
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        super().__init__(self._process.pid, pidfd)

    def _reap(self) -> int:
        return self._process.wait()


def describe_exit(code: int | None) -> str:
    """Return what a return code means, to follow a name: "was killed by SIGKILL"."""
    if code is None:
        return "has ended"
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
