"""The control side of reactors: starts them, talks to them, replaces those that die.

When the control process dies, reactors live on: the keeper has what is needed to take them over
(reactor/vault.py). The next control process has each begin anew, which is to finish what is in
flight and to forget everything that it was told; then they are as those that have just started.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from reactor.child import Process, describe_exit
from reactor.envelope import PeerLostError, socket_path
from reactor.errors import OperationError
from reactor.fdpass import READY, RENEW, FdChannel
from reactor.former import KEY, Former, Kept
from reactor.loop import DEFAULT_SPIN_US
from reactor.operations import FileDescriptors
from reactor.peers import Counters, Peers
from reactor.sockets import make_context
from reactor.standby import Assignment, Standby
from reactor.stats import DEFAULT_SLOTS, StatsArea
from reactor.vault import NoVault

READY_TIMEOUT = 30.0  # seconds from starting a reactor to its being ready: machines may be loaded
EXIT_TIMEOUT = 1.0  # seconds from the end of its channel to that of the process
STANDBY_DELAY = 1.0  # seconds from the death of a standby to the next one
STOP_TIMEOUT = 8.0  # seconds from asking a reactor to end to killing it; longer than its own limit

LENT = 1 << 16  # what lent reactors are known by begins here, past all CPUs

CRASH_LOOP = 5  # deaths ...
CRASH_WINDOW = 10.0  # ... within so many seconds: from then on restarts are delayed
MIN_DELAY = 0.1  # seconds, doubled with each further death
MAX_DELAY = 10.0

log = logging.getLogger(__name__)


class Reactor:
    """A CPU's reactor: one process after the other, with the same name and the same statistics.

    ``state`` is "starting", "running", "dead" (to be replaced at once), "waiting" (to be replaced
    after a delay, because of a crash loop), "stopping" or "stopped".
    """

    def __init__(self, cpu: int, number: int, stats: StatsArea) -> None:
        self.cpu = cpu
        self.number = number  # among all that run
        self.pin = cpu  # the CPU that it runs on; ``cpu`` is what it is known by
        self.name = f"reactor-{cpu}"
        self.stats = stats
        self.state = "stopped"
        self.restarts = 0
        self.child: Process | None = None
        self.channel: FdChannel | None = None
        self.program = ""  # of its process, with its options
        self.likeness = ""  # of its process, see reactor/likeness.py
        self.running = asyncio.Event()  # it serves all that it has to

    @property
    def key(self) -> str:
        """Its key in the vault."""
        return f"{KEY}{self.cpu}"

    @property
    def pid(self) -> int | None:
        """The process that runs, None while there is none."""
        return None if self.child is None else self.child.pid

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        return self.channel is not None

    def inherit(self, former: Former) -> None:
        """Have the statistics of a process of the same name, which lives on."""
        self.stats.close()
        self.stats = StatsArea(former.fds.take(Former.STATS))
        self.restarts = former.restarts

    def __repr__(self) -> str:
        return f"<Reactor {self.name} pid={self.pid} {self.state}>"


Callback = Callable[[Reactor], Awaitable[None]]


class Backoff:
    """How long to wait before the next restart, from the times of past deaths."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=CRASH_LOOP)
        self._delay = 0.0

    def died(self, now: float) -> float:
        """Return the delay in seconds: 0 unless there were CRASH_LOOP deaths in CRASH_WINDOW.

        Once delayed, the window grows with the delay, which alone would thin out the deaths.
        """
        self._deaths.append(now)
        window = CRASH_WINDOW + self._delay * CRASH_LOOP
        if len(self._deaths) < CRASH_LOOP or now - self._deaths[0] > window:
            self._delay = 0.0
        else:
            self._delay = min(max(MIN_DELAY, 2 * self._delay), MAX_DELAY)
        return self._delay


class Cluster:
    """One reactor process for each of ``cpus``, each with the modules of ``load``.

    ``mode`` is when a reactor sleeps: "adaptive", "always" (polls) or "never" (polls). What a
    control process before has left in the ``vault`` is taken over if it is the same ``program``,
    and replaced if it is not.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        cpus: Iterable[int],
        mode: str = "adaptive",
        load: Sequence[str] = (),
        *,
        spin_us: float = DEFAULT_SPIN_US,
        slots: int = DEFAULT_SLOTS,
        vault: NoVault | None = None,
        program: str = "",
        presence: int = -1,
        renew: bool = False,
    ) -> None:
        """``presence`` is a descriptor that every reactor inherits: reactor/presence.py.

        ``renew``: replace what is found, even if it is the same program, by renew().
        """
        self.modules = tuple(load)
        self.vault = NoVault() if vault is None else vault
        self.lent: list[Reactor] = []
        self._former: dict[int, Former] = {}
        self.counters = Counters()
        self._lent = itertools.count(LENT)
        self._slots = slots
        self._run_dir = os.path.abspath(run_dir)
        self._options = ["--run-dir", self._run_dir]
        self._options += ["--mode", mode, "--spin-us", str(spin_us)]
        self._options += [option for module in load for option in ("--load", module)]
        self._program = " ".join([program, *self._options])
        self._presence = presence
        for key in self.vault.keys(KEY):
            if kept := self.vault.inherit(key):
                cpu = int(key.removeprefix(KEY))
                self._former[cpu] = Former(kept, cpu, "" if renew else self._program)
        self.reactors = [self._make(cpu, number) for number, cpu in enumerate(cpus)]
        self._context = make_context()
        self._peers = Peers(self._context, run_dir, self.counters)
        self._on_started: list[Callback] = []
        self._on_lost: list[Callback] = []
        # Unlike those of a control process before, whose descriptors may still come.
        self._tags = itertools.count(time.monotonic_ns())
        self._supervisors: list[asyncio.Task[None]] = []
        self._standby: Standby | None = None
        self._restock: asyncio.TimerHandle | None = None
        self._attending: dict[int, asyncio.Task[None]] = {}
        self._outdated: list[tuple[Reactor, Process]] = []  # of another program, for renew()

    @property
    def standby_pid(self) -> int | None:
        """The process that will replace the next reactor that dies; None while there is none."""
        return None if self._standby is None else self._standby.child.pid

    def on_started(self, fn: Callback) -> None:
        """Run ``fn`` after each start and restart of a reactor, before its state is "running"."""
        self._on_started.append(fn)

    def on_lost(self, fn: Callback) -> None:
        """Run ``fn`` when a reactor has died. Its replacement cannot be called before that is over.

        The replacement starts meanwhile, so that what ``fn`` waits for costs no time of its own.
        """
        self._on_lost.append(fn)

    async def start(self) -> None:
        """Start all reactors at once, or take them over, and return when all are ready.

        Raises OSError or OperationError, which name the reactor, if one cannot start; then none is
        left running that was not found running.
        """
        self._peers.start(asyncio.get_running_loop())
        try:
            if any(not former.compatible for former in self._former.values()):
                await self._choose_outdated()
            await _all(self._begin(reactor) for reactor in self.reactors)
            await _all(self._retire(former) for former in self._former.values())
        except BaseException as error:
            # What we have found goes on serving, and is there for whoever tries next.
            if not self.vault.adopted or isinstance(error, asyncio.CancelledError):
                await self.stop()
            raise
        self._supervisors = [asyncio.create_task(self._supervise(r)) for r in self.reactors]
        self._keep_standby()

    async def renew(self) -> None:
        """Replace the reactors that were taken over though they are of another program.

        One after the other, so that never two are missing: the next one ends when the queues of the
        one before are served again, and a process of this program waits to take its place.
        """
        for reactor, process in self._outdated:
            await self._have_standby()
            if reactor.child is process and reactor.alive:
                log.info("%s (pid %d) is replaced by this program", reactor.name, process.pid)
                await self._ask_to_end(reactor, process)
            await reactor.running.wait()
        self._outdated.clear()

    async def _choose_outdated(self) -> None:
        """Take over what is of another program but is told things in the same way: see renew()."""
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                likeness = await self._have_standby()
        except TimeoutError:
            return  # none of this program can start, which is found out when one is to
        for reactor in self.reactors:
            former = self._former.get(reactor.cpu)
            if former is not None and not former.compatible and former.likeness == likeness:
                former.compatible = True
                reactor.inherit(former)
                self._outdated.append((reactor, former.process()))

    async def _have_standby(self) -> str:
        """Return the likeness of the process in reserve once there is one that waits."""
        while True:
            self._keep_standby()
            with contextlib.suppress(ConnectionError):
                if (standby := self._standby) is not None:
                    await standby.prepared()
                    return standby.likeness
            await asyncio.sleep(STANDBY_DELAY)  # it has died, or become a reactor

    async def stop(self) -> None:
        """End all reactors, at first orderly; nothing is left when this returns."""
        for task in self._supervisors:
            task.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        self._supervisors.clear()
        await self.end_standby()
        await _all(self.take_back(reactor, kill=True) for reactor in list(self.lent))
        await _all(self._end(reactor) for reactor in self.reactors)
        self._peers.close()
        self._context.term()
        for reactor in self.reactors:
            reactor.stats.close()
        self.reactors.clear()

    @property
    def everyone(self) -> list[Reactor]:
        """All reactors, also those that are lent."""
        return [*self.reactors, *self.lent]

    async def lend(self, cpu: int, purpose: str) -> Reactor:
        """Start one more reactor on ``cpu``, for one user, which may have it wait or kill it.

        Nobody replaces it when it dies; on_lost() tells. Raises OSError or OperationError.
        """
        used = {each.number for each in self.everyone}
        number = next(number for number in itertools.count() if number not in used)
        reactor = Reactor(next(self._lent), number, StatsArea.create(self._slots))
        reactor.pin, reactor.name = cpu, f"{purpose}-{reactor.cpu - LENT}"
        self.lent.append(reactor)
        try:
            await self._launch(reactor)
        except BaseException:
            self._take_back(reactor)
            raise
        finally:
            self._keep_standby()
        assert reactor.child is not None
        watch = asyncio.create_task(self._attend(reactor, reactor.child))
        self._attending[reactor.cpu] = watch
        return reactor

    async def take_back(self, reactor: Reactor, *, kill: bool = False) -> None:
        """End a reactor that was lent: in order, or at once. Returns when it has ended."""
        if kill and reactor.child is not None:
            await reactor.child.kill()
        else:
            await self._end(reactor)
        await self._attending.pop(reactor.cpu)
        self._take_back(reactor)

    async def _attend(self, reactor: Reactor, process: Process) -> None:
        """Tell when a reactor that is lent has ended."""
        code = await process.wait()
        if code:
            log.warning("%s (pid %d) %s", reactor.name, process.pid, describe_exit(code))
        await self._notify(self._on_lost, reactor)

    def _take_back(self, reactor: Reactor) -> None:
        self.lent.remove(reactor)
        reactor.stats.close()

    async def call(
        self,
        reactor: Reactor,
        op: str,
        args: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        timeout: float | None = 10.0,
    ) -> Any:
        """Run an operation in a reactor, with duplicates of ``fds``; return its result.

        Raises what Node.call() raises; PeerLostError (-104) at once if the reactor is dead or dies.
        """
        if reactor.channel is None:
            raise PeerLostError(reactor.name, op)
        try:
            peer = self._peers.get(reactor.name)
            return await peer.call(op, args, timeout, fds, reactor.channel)
        except (ConnectionError, FileNotFoundError):
            # Its socket or channel is gone: it has died, though we have not been told yet.
            raise PeerLostError(reactor.name, op) from None

    def waiting(self, reactor: Reactor) -> int:
        """Return how many calls a reactor has not answered."""
        try:
            return self._peers.get(reactor.name).waiting
        except OSError:  # there is none
            return 0

    async def call_for_fds(
        self, reactor: Reactor, op: str, count: int, timeout: float = 10.0
    ) -> tuple[Any, FileDescriptors]:
        """Run an operation that sends ``count`` descriptors back under the ``tag`` it is given.

        Return its result, and the descriptors. Raises what call() and FdChannel.take() raise.
        """
        channel, tag = reactor.channel, next(self._tags)
        result = await self.call(reactor, op, {"tag": tag}, timeout=timeout)
        if channel is None:
            raise PeerLostError(reactor.name, op)
        return result, await channel.take(tag, count, timeout)

    def _make(self, cpu: int, number: int) -> Reactor:
        """Return the reactor of a CPU, with the statistics of one that may be taken over."""
        reactor = Reactor(cpu, number, StatsArea.create(self._slots))
        former = self._former.get(cpu)
        if former is None or not former.compatible:
            return reactor
        reactor.inherit(former)
        return reactor

    async def _begin(self, reactor: Reactor) -> None:
        """Take over the process that a control process before has left, or start one."""
        former = self._former.pop(reactor.cpu, None)
        if former is not None and former.compatible:
            try:
                await self._adopt(reactor, former)
            except (OSError, OperationError) as error:
                log.error("%s cannot be taken over: %s", reactor.name, error)
            else:
                return
        if not self.vault.adopted:
            await self._launch(reactor)
            return
        standby = Standby(self._options, self._presence)
        if former is not None:
            with contextlib.suppress(ConnectionError):  # it cannot start, which is found out below
                await standby.prepared()  # what it takes the place of serves meanwhile
            await self._retire(former)
            reactor.restarts = former.restarts + 1
        lost = asyncio.create_task(self._notify(self._on_lost, reactor))
        try:
            await self._launch(reactor, lost, standby)
        finally:
            lost.cancel()

    async def _adopt(self, reactor: Reactor, former: Former) -> None:
        """Have a process that is ``reactor`` already begin anew, for us, and log where we do."""
        reactor.state = "starting"
        reactor.program, reactor.likeness = former.program, former.likeness
        reactor.child = process = former.process()
        process.exited.add_done_callback(lambda _: self._bury(reactor, process))
        channel = FdChannel(former.channel())
        tag = RENEW | time.monotonic_ns()
        try:
            channel.send(tag, [sys.stderr.fileno()])
        except OSError:  # it has died
            channel.close()
            raise
        await self._until_ready(reactor, process, channel, tag)
        log.info("%s (pid %d) is taken over", reactor.name, process.pid)

    async def _retire(self, former: Former) -> None:
        """End a process that is not taken over, once it has finished what is in flight."""
        process = former.process()
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            log.error("reactor-%d (pid %d) did not end, and is killed", former.cpu, process.pid)
            await process.kill()
        former.fds.close()

    async def _launch(
        self,
        reactor: Reactor,
        ready_after: Awaitable[None] | None = None,
        standby: Standby | None = None,
    ) -> None:
        """Make a process ``reactor``, to be called once it is ready and ``ready_after`` done.

        It is ``standby``, else the one in reserve, else a new one.
        """
        reactor.state = "starting"
        if standby is None:
            standby, self._standby = self._standby, None
        if standby is None:
            standby = Standby(self._options, self._presence)
        reactor.child = process = standby.child
        process.exited.add_done_callback(lambda _: self._bury(reactor, process))
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        assignment = Assignment(reactor.name, reactor.pin, level)
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                channel = await standby.assign(assignment, reactor.stats.fd)
        except ConnectionError:
            raise await _died_early(reactor.name, process) from None
        except TimeoutError:
            raise await self._too_late(reactor) from None
        reactor.program, reactor.likeness = self._program, standby.likeness
        await self._until_ready(reactor, process, channel, READY, ready_after)

    async def _until_ready(
        self,
        reactor: Reactor,
        process: Process,
        channel: FdChannel,
        tag: int,
        ready_after: Awaitable[None] | None = None,
    ) -> None:
        """Let ``reactor`` be called once it has sent ``tag``, ``ready_after`` is done, it is kept.

        Raises OperationError, when the process is no more.
        """
        process.exited.add_done_callback(lambda _: channel.close())
        try:
            await channel.take(tag, 0, READY_TIMEOUT)
            if ready_after is not None:
                await ready_after
            if process.exited.done():
                raise ConnectionResetError
        except ConnectionResetError:
            raise await _died_early(reactor.name, process) from None
        except TimeoutError:
            raise await self._too_late(reactor) from None

        def kept() -> tuple[bytes, list[int]]:
            known = Kept(process.pid, reactor.program, reactor.restarts, reactor.likeness)
            data = msgspec.msgpack.encode(known)
            return data, [channel.fileno(), reactor.stats.fd, process.pidfd]

        # Before it serves anything: one that nobody knows of would serve queues beside the next.
        # What is lent ends with this process, as does what it is for.
        if reactor not in self.lent:
            await self.vault.put(reactor.key, kept)
        if process.exited.done():
            self.vault.drop(reactor.key)
            raise await _died_early(reactor.name, process)
        reactor.channel = channel
        await self._notify(self._on_started, reactor)
        if reactor.alive:
            reactor.state = "running"
            reactor.running.set()

    async def _too_late(self, reactor: Reactor) -> OperationError:
        """Kill a process that does not become ready, and return the error that says so."""
        if reactor.child is not None:
            await reactor.child.kill()
        text = f"{reactor.name} was not ready within {READY_TIMEOUT:g} s"
        return OperationError(-errno.ETIMEDOUT, text)

    def _keep_standby(self) -> None:
        """Have a process in reserve for the next reactor that dies."""
        if self._standby is not None:
            return
        try:
            standby = self._standby = Standby(self._options, self._presence)
        except OSError as error:
            log.error("no standby could be started, so the next restart takes longer: %s", error)
            return
        standby.child.exited.add_done_callback(lambda _: self._lost_standby(standby))

    def _lost_standby(self, standby: Standby) -> None:
        """Replace a standby that died as one, after a moment: it may not be able to live at all."""
        if self._standby is not standby:
            return  # a reactor by now, or meant to end
        self._standby = None
        how = describe_exit(standby.child.exited.result())
        log.error("the standby (pid %d) %s", standby.child.pid, how)
        standby.close()
        self._restock = asyncio.get_running_loop().call_later(STANDBY_DELAY, self._keep_standby)

    def _bury(self, reactor: Reactor, process: Process) -> None:
        """Fail whatever waits for a process that has exited, and remove what it left."""
        if reactor.child is not process:
            return
        reactor.child = reactor.channel = None
        reactor.running.clear()
        if reactor.state != "stopping":
            reactor.state = "dead"
        self.vault.drop(reactor.key)
        self._peers.forget(reactor.name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path(self._run_dir, reactor.name))

    async def _supervise(self, reactor: Reactor) -> None:
        """Replace ``reactor`` whenever it dies."""
        loop = asyncio.get_running_loop()
        backoff = Backoff()
        while True:
            planned = False
            if (child := reactor.child) is not None:
                code = await child.wait()
                planned = reactor.state == "stopping"
                level = logging.INFO if planned else logging.ERROR
                log.log(level, "%s (pid %d) %s", reactor.name, child.pid, describe_exit(code))
            await self._replace(reactor, 0.0 if planned else backoff.died(loop.time()))
            self._keep_standby()

    async def _replace(self, reactor: Reactor, delay: float) -> None:
        """Tell that ``reactor`` was lost, and start another one meanwhile, ``delay`` s from now."""
        start = time.monotonic()
        lost = asyncio.create_task(self._notify(self._on_lost, reactor))
        try:
            await asyncio.sleep(0)  # they hear of it before there is another one
            if delay:
                reactor.state = "waiting"
                log.error("%s keeps dying: next start in %.1f s", reactor.name, delay)
                await asyncio.sleep(delay)
            reactor.restarts += 1
            await self._launch(reactor, lost)
            took = time.monotonic() - start
            log.info("%s is back (pid %s) after %.0f ms", reactor.name, reactor.pid, took * 1e3)
        except (OSError, OperationError) as error:
            reactor.state = "dead"
            log.error("%s", error)
            await lost  # or the next one could be called before it is over
        finally:
            lost.cancel()

    async def _notify(self, callbacks: list[Callback], reactor: Reactor) -> None:
        for fn in callbacks:
            try:
                await fn(reactor)
            except PeerLostError as error:  # it died meanwhile, which is noticed elsewhere
                log.warning("%s", error)
            except Exception:
                log.exception("%s: a callback failed", reactor.name)

    async def end_standby(self) -> None:
        """Have no process in reserve any more."""
        if self._restock is not None:
            self._restock.cancel()
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.close()
            await standby.child.kill()

    async def _end(self, reactor: Reactor) -> None:
        """Ask the process to end, kill it if it does not."""
        child = reactor.child
        if child is not None and reactor.alive:
            await self._ask_to_end(reactor, child)
        if child is not None:
            await child.kill()
        reactor.state = "stopped"

    async def _ask_to_end(self, reactor: Reactor, child: Process) -> None:
        """Have a process finish what is in flight and end; one that does not is killed."""
        reactor.state = "stopping"
        try:
            self._peers.get(reactor.name).send("reactor_stop", None)
            async with asyncio.timeout(STOP_TIMEOUT):
                await child.wait()
        except (OSError, TimeoutError) as error:
            log.error("%s did not end, and is killed: %s", reactor.name, error)
            await child.kill()


async def _died_early(name: str, process: Process) -> OperationError:
    """Return what to say of a process that has closed its channel, so is about to exit."""
    try:
        async with asyncio.timeout(EXIT_TIMEOUT):
            code = await process.wait()
    except TimeoutError:
        code = await process.kill()
    return OperationError(-errno.ECHILD, f"{name} {describe_exit(code)} before it was ready")


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all concurrently; on a failure cancel the others, and raise the first one."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
