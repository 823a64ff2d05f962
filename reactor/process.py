"""The reactor process: one event loop on the C poll loop, pinned on one CPU.

    python -m reactor.process --run-dir DIR --channel FD --load MODULE

It is started by reactor/cluster.py, as a standby (reactor/standby.py) that becomes a reactor once
it is told which one. A loaded module may have ``setup(reactor: ReactorContext)``, which adds the
module's operations, and ``prepare()`` for what the standby can do already. When the channel to the
control process ends, so does the reactor; the keeper has a duplicate of its other end, so that it
lives on while the next control process is awaited (reactor/vault.py).
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psutil

from reactor.events import Node
from reactor.fdpass import READY, FdChannel
from reactor.likeness import likeness
from reactor.loop import DEFAULT_SPIN_US, MODES, PollSelector, ReactorLoop
from reactor.native import CData, lib
from reactor.operations import FileDescriptors, Operations, operation
from reactor.standby import Assignment, await_assignment
from reactor.stats import StatsArea

DRAIN_TIMEOUT = 5.0  # seconds for what modules have to finish at an orderly stop
ORPHAN_TIMEOUT = 0.5  # ... when the control process is gone
ANSWER_TIMEOUT = 0.1  # seconds for the last answers to leave

log = logging.getLogger(__name__)


class ReactorContext:
    """What a module that is loaded into a reactor may use."""

    def __init__(
        self, cpu: int, loop: ReactorLoop, operations: Operations, node: Node, stats: StatsArea
    ) -> None:
        self.cpu = cpu
        self.loop = loop
        self.operations = operations
        self.node = node
        self.stats = stats
        self.channel: FdChannel | None = None
        self.presence = -1  # see reactor/presence.py
        self._on_stop: list[Callable[[], Awaitable[None]]] = []

    @property
    def native(self) -> CData:
        """The ``struct reactor *``."""
        return self.loop.native

    def send_fds(self, tag: int, fds: Sequence[int]) -> None:
        """Send duplicates of descriptors to the control process, which waits for ``tag``."""
        if self.channel is None:
            raise OSError(errno.ENOTCONN, "there is no channel to the control process")
        self.channel.send(tag, fds)

    def on_stop(self, fn: Callable[[], Awaitable[None]]) -> None:
        """Run ``fn`` before the reactor ends or begins anew; the last added first.

        It finishes what is in flight, and leaves nothing that a control process has asked for.
        """
        self._on_stop.append(fn)

    async def drain(self) -> None:
        """Run what on_stop() collected; one that fails does not keep the others from running."""
        for fn in reversed(self._on_stop):
            try:
                await fn()
            except Exception:
                log.exception("could not drain")


class ReactorOperations:
    """Operations of every reactor."""

    def __init__(self, context: ReactorContext, stop: Callable[[], None]) -> None:
        self._context = context
        self._stop = stop

    @operation
    def reactor_get_stats(self) -> dict[str, Any]:
        """Return the counters of the poll loop (times in ticks) and of events."""
        return {
            "name": self._context.node.name,
            "cpu": self._context.cpu,
            "pid": os.getpid(),
            **self._context.stats.counters,
            "events": self._context.node.counters.to_dict(),
        }

    @operation
    def reactor_stop(self) -> None:
        """Finish what is in flight, then end. The control process starts another one."""
        self._stop()


class ReactorProcess:
    """Everything that one reactor process consists of."""

    def __init__(
        self,
        options: argparse.Namespace,
        channel: socket.socket,
        assignment: Assignment,
        stats: StatsArea,
    ) -> None:
        self._options = options
        self._channel = channel
        self._stopping = asyncio.Event()
        self._orphaned = False
        self._renewing = asyncio.Lock()
        self._renewals: set[asyncio.Task[None]] = set()
        # The node first: ZeroMQ's threads inherit the affinity, and must not share the reactor's
        # CPU with a poller that never sleeps.
        operations = Operations()
        node = Node(options.run_dir, assignment.name, operations)
        psutil.Process().cpu_affinity([assignment.cpu])
        selector = PollSelector(options.mode, options.spin_us, stats.address, stats.slots)
        self.loop = ReactorLoop(selector)
        self.context = ReactorContext(assignment.cpu, self.loop, operations, node, stats)
        self.context.presence = options.presence
        operations.add(ReactorOperations(self.context, self._stopping.set))

    async def run(self) -> None:
        """Serve until told to stop."""
        node = self.context.node
        channel = FdChannel(self._channel, self.loop, on_closed=self._lost_control)
        self.loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        for module in self._options.load:
            loaded = importlib.import_module(module)
            if hasattr(loaded, "setup"):
                loaded.setup(self.context)
        node.fd_source = self.context.channel = channel
        node.start(self.loop)
        channel.on_renew = self._renewal_asked
        gc.freeze()  # what has been made since prepare() stays, too
        channel.send(READY, ())
        await self._stopping.wait()
        for task in self._renewals:
            task.cancel()
        await self._drain()
        node.close(linger=ANSWER_TIMEOUT)
        channel.close()

    def _renewal_asked(self, tag: int, fds: FileDescriptors) -> None:
        """Begin anew for a control process that takes over from one that died, and tell it so.

        The descriptor that comes along is where that writes its log.
        """
        with fds:
            for fd in fds[:1]:
                os.dup2(fd, sys.stdout.fileno())
                os.dup2(fd, sys.stderr.fileno())
        task = self.loop.create_task(self._renew(tag))
        self._renewals.add(task)
        task.add_done_callback(self._renewals.discard)

    async def _renew(self, tag: int) -> None:
        """Finish what is in flight and forget what was asked for, then be there as at the start.

        So what the dead process did by halves is of no consequence, and nothing that it has sent
        can come any more.
        """
        async with self._renewing:
            await self.context.node.retire(DRAIN_TIMEOUT)
            await self.context.drain()
            self.context.node.rebind()
            self.context.send_fds(tag, ())

    def _lost_control(self) -> None:
        self._orphaned = True
        self._stopping.set()

    async def _drain(self) -> None:
        limit = ORPHAN_TIMEOUT if self._orphaned else DRAIN_TIMEOUT
        try:
            async with asyncio.timeout(limit):
                await self.context.drain()
        except TimeoutError:
            log.error("not everything in flight was finished within %g s", limit)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="reactor.process", description="One reactor process.")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the channel")
    parser.add_argument("--presence", type=int, default=-1, help="see reactor/presence.py")
    parser.add_argument("--mode", choices=MODES, default="adaptive")
    parser.add_argument("--spin-us", type=float, default=DEFAULT_SPIN_US)
    parser.add_argument("--load", action="append", default=[], metavar="MODULE")
    return parser.parse_args(arguments)


def set_process_name(name: str) -> None:
    """Show ``name`` in top and ps; the kernel keeps 15 bytes of it."""
    with open("/proc/self/comm", "w") as comm:
        comm.write(name)


def set_up_logging(assignment: Assignment) -> None:
    """Log to standard error, under the reactor's name."""
    form = f"%(asctime)s %(levelname)-7s {assignment.name}: %(message)s"
    logging.basicConfig(level=assignment.log_level.upper(), format=form, stream=sys.stderr)


def prepare(options: argparse.Namespace) -> None:
    """Do everything slow that is the same for every reactor."""
    for name in options.load:
        module = importlib.import_module(name)
        if hasattr(module, "prepare"):
            module.prepare()
    lib.reactor_tick_rate()  # is measured once, for some milliseconds
    gc.collect()
    gc.freeze()  # all that has been made so far stays: never look at it again


def main(arguments: Sequence[str]) -> int:
    """Run a reactor process; return its exit status."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a standby ends when its channel does
    for fd in (options.channel, options.presence):
        if fd >= 0:
            os.set_inheritable(fd, False)
    channel = socket.socket(fileno=options.channel)
    try:
        prepare(options)
        set_process_name("reactor-standby")
        channel.send(likeness().encode())
        told = await_assignment(channel)
        if told is None:
            return 0  # the control process has ended
        assignment, stats = told
        set_up_logging(assignment)
        set_process_name(assignment.name)
        process = ReactorProcess(options, channel, assignment, StatsArea(stats))
        with asyncio.Runner(loop_factory=lambda: process.loop) as runner:
            runner.run(process.run())
    except ConnectionError:
        return 0  # the control process has ended, and nobody has the other end of the channel
    except Exception:
        log.exception("cannot run")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
