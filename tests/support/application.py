"""``vhost-reactor start`` as a process, for tests that need the whole."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reactor.rpc_client import RpcClient

# What a service manager does before it executes a service: sd_listen_fds(3). Arguments: names,
# descriptors, and the command.
_HAND_OVER = """
import fcntl, os, sys
names, rest = sys.argv[1], sys.argv[2:]
count = names.count(":") + 1
spare = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in rest[:count]]
for place, fd in enumerate(spare):
    os.dup2(fd, 3 + place)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}
os.execv(rest[count], rest[count:])
"""


class Application:
    """A cluster in ``folder``, on the first CPU there is, with CPU claims of its own.

    It is ready when the constructor returns; as a context manager it is ended by SIGTERM.
    """

    def __init__(
        self,
        folder: Path,
        *options: object,
        environment: Mapping[str, str] | None = None,
        handed: Mapping[str, socket.socket] | None = None,
    ) -> None:
        """``handed`` are sockets that it gets as from a service manager, by their names."""
        self.run_dir = folder / "run"
        self._errors = folder / "errors"
        command = [sys.executable, "-m", "vhost.cli", "start", "--run-dir", self.run_dir]
        command += ["--lock-dir", folder, *options]
        sockets = handed or {}
        if sockets:
            numbers = [str(each.fileno()) for each in sockets.values()]
            command = [sys.executable, "-c", _HAND_OVER, ":".join(sockets), *numbers, *command]
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                pass_fds=[each.fileno() for each in sockets.values()],
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        if not self.ready_line:
            self.wait()
            raise AssertionError(self.errors())

    @property
    def rpc_socket(self) -> Path:
        """Where JSON-RPC is."""
        return self.run_dir / "rpc.sock"

    def rpc(self, method: str, **params: Any) -> Any:
        """Call a method."""
        with RpcClient(self.rpc_socket, timeout=30) as client:
            return client.call(method, params)

    def errors(self) -> str:
        """Return what was written to standard error."""
        return self._errors.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and return its exit status."""
        try:
            status = self.process.wait(120)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        return status

    def __enter__(self) -> Application:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
