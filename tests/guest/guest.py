"""A virtual machine under QEMU's software emulation, and a shell in it."""

from __future__ import annotations

import base64
import itertools
import selectors
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.guest import initramfs, kernel
from tests.guest.monitor import Monitor

# Seconds that end a hang, of whatever a guest is asked for. With the machine to itself it boots in
# about five; on a loaded one an emulated processor takes a large multiple of that.
PATIENCE = 180.0
_PANIC = "Kernel panic"
# Where the size of memory is a multiple of 64 pages, QEMU looks for dirty ones 64 at a time, and
# before version 9.0 it forgot to tell its emulated processor when it took them for clean: what that
# wrote next was lost in a migration ("physmem: Fix migration dirty bitmap coherency with TCG memory
# access"; a guest without a disk shows it, too). Any other size goes the careful way.
_ODD_KIB = 8


class GuestError(AssertionError):
    """The guest did not do as it was told; the message ends with its console."""


class EmulatorError(GuestError):
    """QEMU died of SIGSEGV, which is its own fault whatever a guest asks for."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest wrote, to standard output or error, and its exit status."""

    command: str
    status: int
    output: str


class Guest:
    """A running guest; ``with`` ends it, whatever happened.

    ``disks`` are sockets of vhost-user-blk devices, in the order of the guest's names: vda, vdb,
    ... ``queues`` is the number of queues of each (one number for all of them), ``device_options``
    properties of QEMU's for all of them; the driver may use ``packed`` rings. ``hosts`` are sockets
    of vhost-user-scsi devices: the guest's SCSI hosts 0, 1, ... ``machine`` and ``devices`` are
    QEMU's, ``parameters`` the kernel's; ``root`` makes another root file system. With ``incoming``,
    a socket's path, the guest is one that ``migrate`` of another will bring. ``chardev_options``
    are added to those of the disks' sockets.
    """

    def __init__(
        self,
        directory: Path,
        disks: Sequence[Path] = (),
        *,
        hosts: Sequence[Path] = (),
        queues: Sequence[int] | int = 1,
        cpus: int = 1,
        memory_mib: int = 256,
        packed: bool = False,
        device_options: str = "",
        machine: str = "pc",
        devices: Sequence[str] = (),
        parameters: str = "",
        root: Callable[[kernel.Kernel], bytes] | None = None,
        incoming: Path | None = None,
        chardev_options: str = "",
    ) -> None:
        self._tokens = itertools.count(1)
        self._received = b""
        self._stuck_in: str | None = None
        self._console = directory / "console.log"
        self._qemu_log = directory / "qemu.log"
        counts = [queues] * len(disks) if isinstance(queues, int) else list(queues)
        if len(counts) != len(disks):
            raise ValueError(f"{len(disks)} disks, but {len(counts)} numbers of queues")

        used = kernel.get()
        archive = directory / "initramfs"
        archive.write_bytes(root(used) if root else initramfs.build(used, scsi=bool(hosts)))
        command = _machine(
            used.image, archive, self._console, cpus, memory_mib, machine, parameters
        )
        command += devices
        for index, (path, count) in enumerate(zip(disks, counts, strict=True)):
            chardev = f"socket,id=disk{index},path={_escape(path)}{chardev_options}"
            command += ["-chardev", chardev]
            # The PCI address decides which disk becomes vda; all else on the bus has lower ones.
            device = f"vhost-user-blk-pci,chardev=disk{index},num-queues={count}"
            ring = f"packed={'on' if packed else 'off'}"
            options = [f"addr={16 + index:#x}", ring, device_options]
            command += ["-device", ",".join([device, *filter(None, options)])]
        for index, path in enumerate(hosts):
            command += ["-chardev", f"socket,id=host{index},path={_escape(path)}"]
            device = f"vhost-user-scsi-pci,chardev=host{index},num_queues={cpus}"
            command += ["-device", f"{device},addr={8 + index:#x}"]
        if incoming is not None:
            command += ["-incoming", f"unix:{_escape(incoming)}"]
        # A socket pair needs no name, so that none is left behind.
        self._agent, theirs = socket.socketpair()
        self.monitor, monitors = Monitor.create()
        with theirs, monitors, self._qemu_log.open("wb") as log:
            command += [
                "-chardev",
                f"socket,id=agent,fd={theirs.fileno()}",
                "-serial",
                "chardev:agent",
                "-chardev",
                f"socket,id=monitor,fd={monitors.fileno()}",
                "-mon",
                "chardev=monitor,mode=control",
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno(), monitors.fileno()],
            )
        self.boot_id = ""
        try:
            if not self.monitor.begin():
                raise self._error("QEMU ended before it began")
            if incoming is None:
                self.boot_id = self._wait_ready()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """Whether QEMU runs."""
        return self._process.poll() is None

    @property
    def console(self) -> str:
        """What the kernel has written so far."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def run(self, command: str, timeout: float = PATIENCE, *, status: int | None = 0) -> Result:
        """Run a shell command in the guest and return what came of it.

        GuestError if it takes longer than ``timeout`` seconds, or if it ends with another exit
        status than ``status`` (None: any will do).
        """
        if self._stuck_in is not None:
            raise self._error(f"cannot run {command!r}: still busy with {self._stuck_in!r}")
        token = f"t{next(self._tokens)}"
        request = f"{token} {base64.b64encode(command.encode()).decode()}\n"
        if len(request) > 4096:
            raise ValueError("the guest's terminal takes commands of up to 3000 characters")
        try:
            self._agent.sendall(request.encode())
        except BrokenPipeError:
            raise self._ended(command) from None
        answer = self._read_line(time.monotonic() + timeout, command)
        fields = answer.split()
        if len(fields) != 3 or fields[0] != token:
            raise self._error(f"unexpected answer {answer!r:.200} to {command!r}")
        output = "" if fields[2] == "-" else base64.b64decode(fields[2]).decode(errors="replace")
        result = Result(command, int(fields[1]), output)
        if status is not None and result.status != status:
            raise self._error(f"{command!r} ended with {result.status}, not {status}:\n{output}")
        return result

    def start(self, command: str, output: str) -> None:
        """Start a shell command in the background, its output to a file of the guest.

        The exit status is written to the file ``output``.status when it ends.
        """
        inner = f"{command}; echo $? >{output}.new; mv {output}.new {output}.status"
        self.run(f"setsid sh -c {shlex.quote(inner)} >{output} 2>&1 </dev/null &")

    def wait(self, output: str, timeout: float = PATIENCE) -> Result:
        """Wait for a command that start() started, and return what came of it."""
        script = (
            f"while [ ! -e {output}.status ]; do usleep 50000; done; cat {output}.status {output}"
        )
        status, _, text = self.run(script, timeout).output.partition("\n")
        return Result(output, int(status), text)

    def migrate(
        self, target: Guest, path: Path, timeout: float = PATIENCE, *, postcopy: bool = False
    ) -> dict[str, Any]:
        """Move to ``target``, which waits at ``path``, and return what QEMU says of it in the end.

        With ``postcopy`` it runs there before its memory has come. This guest is stopped then;
        commands go to ``target``. GuestError if it fails.
        """
        if postcopy:
            wanted = [{"capability": "postcopy-ram", "state": True}]
            for monitor in (target.monitor, self.monitor):
                monitor.execute("migrate-set-capabilities", capabilities=wanted)
            # So little that most of the memory is still to come when it runs there.
            self.monitor.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        self.monitor.execute("migrate", uri=f"unix:{path}")
        if postcopy:
            while self.monitor.execute("query-migrate")["status"] != "active":
                time.sleep(0.01)
            self.monitor.execute("migrate-start-postcopy")
        deadline = time.monotonic() + timeout
        while (info := self.monitor.execute("query-migrate"))["status"] != "completed":
            if info["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise self._error(f"the guest did not move: {info}\n{target._error('').args[0]}")
            time.sleep(0.05)
        target.boot_id, target._tokens = self.boot_id, self._tokens
        return info

    def reboot(self) -> None:
        """Restart the guest at once, without unmounting, in the same QEMU process."""
        old = self.boot_id
        self._agent.sendall(f"reboot {base64.b64encode(b'reboot -f').decode()}\n".encode())
        self.boot_id = self._wait_ready()
        if self.boot_id == old:
            raise self._error("the guest did not reboot: its boot id is the same")

    def shutdown(self, timeout: float = PATIENCE) -> None:
        """Switch the guest off as its kernel does it; GuestError if QEMU fails or stays."""
        self._agent.sendall(f"off {base64.b64encode(b'sync; poweroff -f').decode()}\n".encode())
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._error(f"the guest is not off after {timeout} s") from None
        if status:
            raise self._error(f"QEMU ended with status {status}")

    def kill(self) -> None:
        """End QEMU with SIGKILL, as if the host's process had crashed."""
        if self.running:
            self._process.kill()
        self._process.wait()
        self._agent.close()
        self.monitor.close()

    def _wait_ready(self) -> str:
        self._stuck_in = None
        deadline = time.monotonic() + PATIENCE
        while True:
            # Before that there may be remains of an answer that a reboot cut off.
            _, found, boot_id = self._read_line(deadline, "boot").rpartition("ready ")
            if found:
                return boot_id

    def _read_line(self, deadline: float, doing: str) -> str:
        """Return the agent's next line; GuestError at ``deadline``, on a panic, or if QEMU ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._agent, selectors.EVENT_READ)
            while b"\n" not in self._received:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._stuck_in = doing
                    raise self._error(f"no answer in time to {doing!r}")
                # Wake up now and then to look for a panic, which makes the guest silent for good.
                if selector.select(min(left, 0.5)):
                    block = self._agent.recv(65536)
                    if not block:
                        raise self._ended(doing)
                    self._received += block
                elif _PANIC in self.console:
                    raise self._error(f"the guest's kernel panicked during {doing!r}")
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()

    def _ended(self, doing: str) -> GuestError:
        status = self._process.wait(PATIENCE)
        kind = EmulatorError if status == -signal.SIGSEGV else GuestError
        return self._error(f"QEMU ended with status {status} during {doing!r}", kind)

    def _error(self, message: str, kind: type[GuestError] = GuestError) -> GuestError:
        log = self._qemu_log.read_text(errors="replace")
        return kind(f"{message}\n--- QEMU ---\n{log}--- console ---\n{self.console}")


def _machine(
    image: Path,
    root: Path,
    console: Path,
    cpus: int,
    memory_mib: int,
    machine: str,
    more_parameters: str,
) -> list[str]:
    memory = f"{memory_mib * 1024 + _ODD_KIB}k"
    parameters = "console=ttyS0 quiet loglevel=5 mitigations=off tsc=reliable no_timer_check "
    parameters += more_parameters
    return [
        *[str(initramfs.find_tool("qemu-system-x86_64")), "-no-user-config", "-nodefaults"],
        *["-display", "none", "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"],
        *["-machine", f"{machine},memory-backend=mem", "-m", memory, "-smp", str(cpus)],
        # The disk's server maps this memory: it must be shared, and a descriptor.
        *["-object", f"memory-backend-memfd,id=mem,size={memory},share=on"],
        *["-kernel", str(image), "-initrd", str(root), "-append", parameters],
        *["-chardev", f"file,id=console,path={_escape(console)}", "-serial", "chardev:console"],
    ]


def _escape(path: Path) -> str:
    # QEMU's option parser ends a value at a comma, unless there are two.
    return str(path).replace(",", ",,")
