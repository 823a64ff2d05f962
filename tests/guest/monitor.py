"""QEMU's monitor: the QEMU Machine Protocol over a socket pair."""

from __future__ import annotations

import json
import socket
from typing import Any, Self

from tests.support.waiting import PATIENCE


class Monitor:
    """Our end of a monitor's socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._file = sock.makefile("rb")

    @classmethod
    def create(cls) -> tuple[Self, socket.socket]:
        """Return a monitor, and QEMU's end of its socket."""
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        return cls(ours), theirs

    def begin(self) -> bool:
        """Take QEMU's greeting; False if it says nothing, since it has ended."""
        if not self._file.readline():
            return False
        self.execute("qmp_capabilities")
        return True

    def execute(self, command: str, **arguments: Any) -> Any:
        """Carry out a command and return its result; AssertionError if QEMU refuses."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._file.readline())
            assert "error" not in answer, f"{command}: {answer['error']}"
            if "return" in answer:  # and no event
                return answer["return"]

    def close(self) -> None:
        """Close the socket."""
        self._file.close()
        self._socket.close()
