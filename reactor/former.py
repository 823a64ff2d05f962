"""A reactor of the control process before, as the vault has it."""

from __future__ import annotations

import socket

import msgspec

from reactor.child import Process
from reactor.vault import Inherited

KEY = "reactor/"  # with a CPU: where the vault has what is kept of a reactor


class Kept(msgspec.Struct):
    """What the vault has of a reactor, beside its channel, its statistics, and its pidfd."""

    pid: int
    program: str
    restarts: int
    likeness: str = ""  # see reactor/likeness.py


class Former:
    """A reactor of the control process before: what the vault has of it."""

    CHANNEL, STATS, PIDFD = range(3)  # places of its descriptors

    def __init__(self, kept: Inherited, cpu: int, program: str) -> None:
        known = msgspec.msgpack.decode(kept.data, type=Kept)
        self.cpu = cpu
        self.fds = kept.fds
        self.restarts = known.restarts
        self.likeness = known.likeness
        self.program = known.program
        self.compatible = known.program == program
        self._pid = known.pid
        self._process: Process | None = None

    def process(self) -> Process:
        """Return the process, dead or alive."""
        if self._process is None:
            self._process = Process(self._pid, self.fds.take(self.PIDFD))
        return self._process

    def channel(self) -> socket.socket:
        """Return our end of the channel to it, once."""
        return socket.socket(fileno=self.fds.take(self.CHANNEL))
