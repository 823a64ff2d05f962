"""A controller: a Unix socket, its device, and the sessions of the front-ends on it."""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import asdict
from typing import Any, Protocol

from bdev.kind import Bdev
from bdev.limits import UNITS, Limits
from bdev.statistics import Totals
from reactor.errors import OperationError
from reactor.notifications import Notify, ignore
from vhost.connection import Connection
from vhost.entrance import SERVER, Endpoint, Entrance
from vhost.host import ReactorHost
from vhost.interfaces import Device, ServedDevice
from vhost.journal import make_journal
from vhost.messages import Feature, ProtocolFeature
from vhost.ratelimit import LimitedLog
from vhost.record import Coalescing, QueueRecord, SessionRecord
from vhost.served_queue import ServedQueue
from vhost.session import Session
from vhost.session_queues import SessionQueues

MAX_SESSIONS = 64  # front-ends on one socket at the same time

Hold = Callable[[Any], AbstractAsyncContextManager[None]]
"""Has something open in a reactor."""

log = logging.getLogger(__name__)


def names_of(value: int, *kinds: type[enum.IntFlag]) -> list[str]:
    """Return the names of the bits in ``value``, lowest first, as far as they have one."""
    bits = [bit for kind in kinds for bit in kind if value & bit]
    return [bit.name or "" for bit in sorted(bits)]


class ControllerDevice(Device, Protocol):
    """What is served on a controller's socket, and where."""

    cpus: Collection[int]

    def bdevs(self) -> Sequence[Bdev]:
        """Return what its guests reach."""
        ...


class Controller:
    """Serves front-ends from ``open`` to ``close``; there is a subclass for each device."""

    feature_bits: type[enum.IntFlag]  # the device's own

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        device: ControllerDevice,
        host: ReactorHost,
        next_id: Callable[[], int],
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self.device: ControllerDevice = device
        self.coalescing = Coalescing()
        self.limits: Limits | None = None  # while there are any
        self.notify: Notify = ignore
        self.touched: Callable[[], None] = lambda: None  # its configuration has changed
        self.sessions: dict[int, Session] = {}
        self._host = host
        self._next_id = next_id
        self._log = LimitedLog(log)
        self._visitors = LimitedLog(
            log
        )  # of its own: who comes and goes must not hide what is wrong
        self._entrance: Entrance | None = None
        self._connections: dict[int, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Let front-ends come; raises OSError, see vhost.entrance."""
        self._entrance = self.endpoint.entrance(
            self.name,
            self._admit,
            lambda text: self._log.warning(f"{self.name}: {text}"),
            self._host.vault,
        )
        self._entrance.open()

    async def close(self) -> None:
        """Let nobody come any more, end all sessions once their I/O is done; no socket is left."""
        if self._entrance is not None:
            self._entrance.close()
            self._entrance = None
        await self.disconnect()

    async def disconnect(self) -> int:
        """End all sessions once their I/O is done, and return how many they were."""
        ending = set(self._tasks)
        for connection in self._connections.values():
            connection.close()
        if ending:
            await asyncio.wait(ending)
        return len(ending)

    async def move(self, cpus: Collection[int]) -> None:
        """Have all queues, of now and later, served on ``cpus``; an error changes nothing."""
        former, self.device.cpus = self.device.cpus, cpus
        hosts = self._hosts()
        try:
            for host in hosts:
                await host.move(cpus)
        except (OperationError, OSError):
            self.device.cpus = former
            for host in hosts:
                await host.move(former)
            raise

    async def exchange(self, former: Hold, following: Hold, device: Callable[[], None]) -> None:
        """Call ``device``, which changes what is served, while no queue is; then go on with all.

        ``former`` and ``following`` have open in a reactor what is served until then and after it.
        That is so wherever there are queues before one is served again: no reactor can refuse what
        another one serves already. Whatever is raised is raised when all go on as before.
        """
        async with AsyncExitStack() as held:
            known: dict[Hold, set[int]] = {former: set(), following: set()}

            async def open_all(hold: Hold) -> None:
                for cpu in self._cpus() - known[hold]:
                    with suppress(ConnectionResetError):  # has died, and its queues with it
                        await held.enter_async_context(hold(self._host.reactor(cpu)))
                    known[hold].add(cpu)

            try:
                while not (self._cpus() <= known[following] and self._idle):
                    await open_all(former)
                    for host in self._hosts():
                        await host.leave()
                    await open_all(following)
                device()
            finally:
                for host in self._hosts():
                    await host.enter()

    @property
    def _idle(self) -> bool:
        """Whether no queue is served, or about to be, until the event loop runs again."""
        return all(host.idle for host in self._hosts())

    def _cpus(self) -> set[int]:
        """Return where queues are served."""
        return {served.cpu for host in self._hosts() for served in host.queues}

    def places(self) -> list[dict[str, Any]]:
        """Return which reactor serves each queue of each session."""
        hosts = [(session, self._host.find(session)) for session in self.sessions]
        return [
            {"session": session, "queue": served.record.index, "cpu": served.cpu}
            for session, host in hosts
            if host is not None
            for served in host.queues
        ]

    def serve(self, record: SessionRecord) -> ServedDevice:
        """Return what a new session's queues are served from."""
        raise NotImplementedError

    def ended(self, record: SessionRecord) -> None:
        """Take note that a session is served no more."""

    def config(self) -> list[dict[str, Any]]:
        """Return the calls that set it up again, once it is created."""
        calls: list[dict[str, Any]] = []
        if self.coalescing != Coalescing():
            params = {"ctrlr": self.name, **asdict(self.coalescing)}
            calls.append({"method": "vhost_controller_set_coalescing", "params": params})
        if self.limits is not None:
            params = {"ctrlr": self.name, **self.limits.rates.describe()}
            calls.append({"method": "vhost_controller_set_qos_limit", "params": params})
        return calls

    def describe(self) -> dict[str, Any]:
        """Return the controller's entry in vhost_get_controllers."""
        raise NotImplementedError

    def release(self) -> None:
        """Have no more to do with bdevs, and give up limits; nothing is served."""
        if self.limits is not None:
            self.limits.close()
            self.limits = None

    async def lose_device(self) -> None:
        """Serve all queues without the device, which is going away."""
        self.touched()
        self.notify("vhost_bdev_removed", self.name)
        await asyncio.gather(*(host.lose_device() for host in self._hosts()))

    async def set_coalescing(self, coalescing: Coalescing) -> None:
        """Have all queues, of now and later, hold signals back as ``coalescing`` says."""
        self.coalescing = coalescing
        self.touched()
        for session in self.sessions.values():
            session.record.coalescing = coalescing
        await asyncio.gather(*(host.set_coalescing() for host in self._hosts()))

    async def set_limits(self, changes: Mapping[str, int]) -> None:
        """Have all queues, of now and later, together keep to limits; see bdev.limits."""
        limits = self.limits or Limits(self.name)
        limits.rates.change(changes)
        self.limits = limits if any(limits.rates.describe().values()) else None
        self.touched()
        fd = -1 if self.limits is None else limits.fd
        await asyncio.gather(*(host.set_limits(fd) for host in self._hosts()))
        if self.limits is None:
            limits.close()

    def _hosts(self) -> list[SessionQueues]:
        """Return who serves the queues of each session."""
        hosts = [self._host.find(session) for session in self.sessions]
        return [host for host in hosts if host is not None]

    def config_changed(self) -> None:
        """Let every front-end know that the device's configuration space has changed."""
        for session in self.sessions.values():
            session.config_changed()

    def describe_settings(self) -> dict[str, Any]:
        """Return what was set for all queues: when they signal, and how much they may do."""
        limits = dict.fromkeys(UNITS, 0) if self.limits is None else self.limits.rates.describe()
        return {**asdict(self.coalescing), "assigned_rate_limits": limits}

    def describe_socket(self) -> dict[str, Any]:
        """Return the socket, and whether we connect to it, where others connect to ours."""
        path, mode = self.endpoint.path, self.endpoint.mode
        return {"socket": path} if mode == SERVER else {"socket": path, "mode": mode}

    def describe_sessions(self) -> list[dict[str, Any]]:
        """Return SPDK's description of each session, and what it leaves out."""
        return [self._describe(session) for session in self.sessions.values()]

    def _describe(self, session: Session) -> dict[str, Any]:
        record = session.record
        host = self._host.find(record.id)
        places = {} if host is None else {one.record.index: one for one in host.queues}
        known = [queue for _, queue in sorted(record.queues.items()) if queue.size]
        queues = [self._describe_queue(queue, places.get(queue.index)) for queue in known]
        started = any(queue.running for queue in record.queues.values())
        return {
            "vid": record.id,
            "id": record.id,
            "name": f"{self.name}s{record.id}",
            "state": "running" if started else "stopped" if record.features else "negotiating",
            "started": started,
            "max_queues": max((queue.index + 1 for queue in known), default=0),
            "inflight_task_cnt": 0 if host is None else host.in_flight(),
            "peer_pid": session.peer_pid,
            "features": hex(record.features),
            "feature_names": names_of(record.features, Feature, self.feature_bits),
            "protocol_features": hex(record.protocol_features),
            "protocol_feature_names": names_of(record.protocol_features, ProtocolFeature),
            "memory_regions": len(record.memory),
            "registered_bytes": 0 if host is None else host.registered,
            "queues": queues,
        }

    def iostat(self) -> dict[str, Any]:
        """Return what was asked of bdevs for the queues that are served, each and together."""
        total = Totals()
        queues = []
        for session in self.sessions.values():
            host = self._host.find(session.record.id)
            for one in () if host is None else host.queues:
                counted = self._host.io_statistics(one)
                total.add_totals(counted)
                reactor = self._host.reactor(one.cpu).name
                place = {"session": session.record.id, "queue": one.record.index, "thread": reactor}
                queues.append({**place, **counted.to_wire()})
        return {"ctrlr": self.name, **total.to_wire(), "queues": queues}

    def _describe_queue(self, queue: QueueRecord, served: ServedQueue | None) -> dict[str, Any]:
        return {
            "index": queue.index,
            "size": queue.size,
            "running": queue.running,
            "reactor": None if served is None else self._host.reactor(served.cpu).name,
            "cpu": None if served is None else self._host.reactor(served.cpu).pin,
            "broken": queue.broken or None,
            "statistics": None if served is None else self._host.statistics(served),
        }

    def _admit(self, sock: socket.socket) -> asyncio.Task[None] | None:
        """Begin to serve a front-end; None if there are too many."""
        if len(self.sessions) >= MAX_SESSIONS:
            self._log.warning(f"{self.name}: connection refused: {MAX_SESSIONS} are open already")
            sock.close()
            return None
        record = SessionRecord(self._next_id(), self.name, coalescing=self.coalescing)
        session = self._open(sock, record)
        return self._begin(session, session.run())

    def resume(self, sock: socket.socket, record: SessionRecord, *, applied: bool) -> Session:
        """Go on with a session of the control process before; see Session.run()."""
        record.coalescing = self.coalescing
        session = self._open(sock, record)
        task = self._begin(session, session.run(resume=True, applied=applied))
        if self._entrance is not None:
            self._entrance.resumed(task)
        return session

    def _open(self, sock: socket.socket, record: SessionRecord) -> Session:
        connection = Connection(sock, peeks=True)
        journal = make_journal(self._host.vault, connection, record)
        fd = -1 if self.limits is None else self.limits.fd
        queues = self._host.open(record, self.serve(record), fd)
        warn = self._warner(record.id)
        session = Session(connection, record, self.device, queues, warn=warn, journal=journal)
        session.on_features = lambda: self._tell("features", record, features=hex(record.features))
        session.on_reset = lambda by: self._tell("reset", record, by=by)

        def broke(index: int, why: str) -> None:
            session.queue_broke(index, why)
            self._tell("queue_broken", record, queue=index, why=why)

        queues.on_broken = broke
        queues.on_miss = session.queue_waits
        queues.on_postcopy_lost = session.postcopy.lost
        self.sessions[record.id] = session
        self._connections[record.id] = connection
        return session

    def _begin(self, session: Session, life: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        work = self._run(session, life)
        task = asyncio.get_running_loop().create_task(work, name=f"{self.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, session: Session, life: Coroutine[Any, Any, None]) -> None:
        self._visitors.info(f"{self.name}: session {session.record.id}: connected")
        self._tell("connect", session.record, peer_pid=session.peer_pid)
        try:
            await life
        except Exception:
            log.exception("%s: session %d: internal error", self.name, session.record.id)
        finally:
            del self.sessions[session.record.id], self._connections[session.record.id]
            self.ended(session.record)
            self._visitors.info(f"{self.name}: session {session.record.id}: disconnected")
            self._tell("disconnect", session.record)

    def _tell(self, what: str, record: SessionRecord, **details: Any) -> None:
        self.notify(f"vhost_{what}", self.name, session=record.id, **details)

    def _warner(self, session: int) -> Callable[[str], None]:
        return lambda text: self._log.warning(f"{self.name}: session {session}: {text}")
