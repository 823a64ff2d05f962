"""qemu-storage-daemon with a vhost-user-blk export: a server that is not ours."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.support.waiting import PATIENCE
from vhost.frontend_link import FrontendError, Link

DAEMON = shutil.which("qemu-storage-daemon")
SIZE = 16 << 20


class StorageDaemon:
    """A running daemon that exports ``file``, which it makes unless it is there."""

    def __init__(
        self, folder: Path, *, writable: bool = True, queues: int = 2, size: int = SIZE
    ) -> None:
        self.file = folder / "disk.raw"
        if not self.file.exists():
            self.file.write_bytes(bytes(size))
        self.socket = str(folder / "disk.sock")
        self.options = f"writable={'on' if writable else 'off'},num-queues={queues}"
        self.start()

    def start(self) -> None:
        """Start the process, after kill() or stop(), too."""
        assert DAEMON is not None
        disk = f"driver=file,node-name=disk,filename={self.file},discard=unmap"
        export = f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={self.socket}"
        command = [DAEMON, "--blockdev", disk, "--export", f"{export},{self.options}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                Link(self.socket).close()
            except FrontendError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    raise
                time.sleep(0.01)
            else:
                return

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(PATIENCE)
        Path(self.socket).unlink(missing_ok=True)

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()
        self.process.wait(PATIENCE)
