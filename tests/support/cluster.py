"""A cluster as its user runs it: the real command and processes, driven by SPDK's client."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from spdk.rpc.client import JSONRPCClient  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 90.0  # seconds: machines may be loaded
STOP_TIMEOUT = 30.0


class Cluster:
    """``vhost-reactor start`` in a directory of its own, ready when the constructor returns.

    ``directory`` must have a short path: a Unix socket's name has room for 107 bytes. The packages
    of ``root`` are run.
    """

    def __init__(
        self, directory: Path, cpumask: str, arguments: Sequence[str] = (), root: Path = ROOT
    ) -> None:
        self._root = root
        self.run_dir = directory / "run"
        self.socket_dir = directory / "sockets"
        self.rpc_socket = directory / "rpc.sock"
        self.socket_dir.mkdir()
        self._log = directory / "log"
        self._stdout: list[str] = []
        command = [sys.executable, "-m", "vhost.cli", "start", "--run-dir", str(self.run_dir)]
        command += ["-S", str(self.socket_dir), "-r", str(self.rpc_socket), "-m", cpumask]
        # Locks of its own: other tests and clusters of this machine may use the same CPUs.
        command += ["--lock-dir", str(directory), "--state-dir", str(directory / "state")]
        self.command = [*command, *arguments]
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The control process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the control process runs."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """What the processes have written to standard output and error so far."""
        return "".join(self._stdout) + self._log.read_text(errors="replace")

    def rpc(self, method: str, **parameters: Any) -> Any:
        """Call a JSON-RPC method; spdk's JSONRPCException if it answers with an error."""
        with JSONRPCClient(str(self.rpc_socket), timeout=30.0) as client:
            return client.call(method, parameters)

    def socket(self, controller: str) -> Path:
        """Return the vhost-user socket of a controller."""
        return self.socket_dir / controller

    def reactors(self) -> dict[int, int]:
        """Return the pid of each reactor, by CPU."""
        listed = self.rpc("framework_get_reactors")["reactors"]
        return {reactor["lcore"]: reactor["pid"] for reactor in listed}

    def kill_reactor(self, cpu: int) -> int:
        """Kill the reactor of ``cpu`` with SIGKILL; return the pid of the one that replaces it."""
        old = self.reactors()[cpu]
        psutil.Process(old).kill()
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            new = self.reactors().get(cpu)
            if new and new != old:
                return new
            time.sleep(0.02)
        raise AssertionError(f"reactor {old} on CPU {cpu} was not replaced\n{self.log}")

    def kill_control(self) -> None:
        """Kill the control process with SIGKILL, and nothing else."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start a control process again, in the same way; it is ready when this returns."""
        reader, stdout = self._reader, self._process.stdout
        self._start()
        reader.join()  # whoever is taken over writes elsewhere now
        if stdout is not None:
            stdout.close()

    def upgrade(self) -> str:
        """Run ``vhost-reactor upgrade``; return what it prints, AssertionError if it fails."""
        command = [sys.executable, "-m", "vhost.cli", "upgrade", "-s", str(self.rpc_socket)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + self.log
        return done.stdout

    def add_arguments(self, *arguments: str) -> None:
        """Give these options to the next control process, too."""
        self.command += arguments

    def process(self, name: str) -> psutil.Process:
        """Return the process of this cluster whose name begins so, once there is just one."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            found = [one for one in self._processes() if one.name().startswith(name)]
            if len(found) == 1:
                return found[0]
            assert time.monotonic() < deadline, f"{found} are called {name}\n{self.log}"
            time.sleep(0.02)

    def wait_gone(self, timeout: float) -> None:
        """Return when no process of the cluster is left; AssertionError after ``timeout`` s."""
        _, alive = psutil.wait_procs(self._processes(), timeout=timeout)
        assert not alive, f"{alive} did not end\n{self.log}"

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop the cluster by a signal; AssertionError if it fails or leaves anything behind."""
        processes = self._processes()
        shared = {path for process in processes for path in _shared_memory(process)}
        if self.running:
            self._process.send_signal(how)
        try:
            status = self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            log = self.log
            self.kill()
            raise AssertionError(f"no end {STOP_TIMEOUT} s after {how.name}\n{log}") from None
        _, alive = psutil.wait_procs(processes, timeout=5.0)
        left = [f"process {process.pid}" for process in alive]
        left += [f"socket {path}" for path in self._sockets()]
        left += [f"shared memory {path}" for path in shared if Path(path).exists()]
        self.kill()
        assert status == 0, f"the cluster ended with status {status}\n{self.log}"
        assert not left, f"the cluster left behind: {', '.join(left)}\n{self.log}"

    def kill(self) -> None:
        """End all processes of the cluster, and wait for them."""
        processes = self._processes()
        if self.running:
            self._process.kill()
        for process in processes:
            # A reactor that was adopted by process 1 is not our child any more.
            if process.is_running():
                process.kill()
        psutil.wait_procs(processes, timeout=5.0)
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read_stdout(self) -> None:
        is_ready, stdout = self._is_ready, self._process.stdout
        assert stdout is not None
        for line in stdout:
            self._stdout.append(line)
            if re.search(r"\bready\b", line, re.IGNORECASE):
                is_ready.set()
        is_ready.set()  # nothing more will come

    def _wait_ready(self) -> None:
        in_time = self._is_ready.wait(START_TIMEOUT)
        if not in_time or not self.running or not self.rpc_socket.exists():
            why = "is not ready" if in_time or self.running else "has ended"
            raise AssertionError(f"the cluster {why}: {self._process.args!r}\n{self.log}")

    def _processes(self) -> list[psutil.Process]:
        """Return the processes of this cluster: they have its run directory in their arguments."""
        found = []
        for process in psutil.process_iter():
            try:
                arguments = process.cmdline()
            except psutil.Error:
                continue
            if any(str(self.run_dir) in argument for argument in arguments):
                found.append(process)
        return found

    def _sockets(self) -> list[Path]:
        places = [self.rpc_socket, *self.socket_dir.rglob("*"), *self.run_dir.rglob("*")]
        return [path for path in places if path.exists() and stat.S_ISSOCK(path.stat().st_mode)]


def _shared_memory(process: psutil.Process) -> set[str]:
    try:
        maps = process.memory_maps(grouped=True)
    except psutil.Error:
        return set()
    paths = {str(entry.path) for entry in maps}
    return {path for path in paths if path.startswith(("/dev/shm/", "/dev/hugepages/"))}
