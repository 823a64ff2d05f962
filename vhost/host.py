"""Where queues are served: the control process's view of the reactors' vhost.worker.

The reactors, and the sessions whose queues they serve (vhost.session_queues). One that died is told
all that it has to serve when it is back.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bdev.guest_dma import GuestDma
from bdev.statistics import Totals
from reactor.errors import OperationError
from reactor.interfaces import Cluster, Slots
from reactor.vault import NoVault
from vhost.interfaces import ServedDevice
from vhost.placement import Placement
from vhost.record import SessionRecord
from vhost.served_queue import ServedQueue
from vhost.session_queues import SessionQueues

RESTORE_LIMIT = 30.0  # seconds that somebody waits for a reactor that died to be replaced
_MAX_CALLS = 64  # of ours that one reactor has to carry out at the same time


class ReactorHost:
    """All reactors, and the sessions whose queues they serve."""

    def __init__(
        self,
        cluster: Cluster,
        slots: Slots,
        placement: Placement | None = None,
        guest_dma: GuestDma | None = None,
    ) -> None:
        self.slots = slots
        self.guest_dma = guest_dma
        self.placement = placement or Placement()
        self.cluster = cluster
        self._sessions: dict[int, SessionQueues] = {}
        self._restored: Counter[int] = Counter()  # by CPU: how often a reactor there was told all
        self._news = asyncio.Condition()
        self._room: dict[int, asyncio.Semaphore] = {}
        cluster.on_lost(self._lost)
        cluster.on_started(self._restore)

    @property
    def vault(self) -> NoVault:
        """Where what outlives this process is put."""
        return self.cluster.vault

    def open(self, record: SessionRecord, device: ServedDevice, limits: int = -1) -> SessionQueues:
        """Return the host of a new session, which knows it until it is dropped.

        ``limits``: see SessionQueues.set_limits().
        """
        session = SessionQueues(self, record, device, limits)
        self._sessions[record.id] = session
        return session

    def find(self, session: int) -> SessionQueues | None:
        """Return the host of a session that is open."""
        return self._sessions.get(session)

    def forget(self, session: int) -> None:
        """Forget a session, which is served nowhere any more."""
        self._sessions.pop(session, None)

    def reactor(self, cpu: int) -> Any:
        """Return the reactor on ``cpu``; OperationError(-ENODEV) if there is none."""
        for reactor in self.cluster.everyone:
            if reactor.cpu == cpu:
                return reactor
        raise OperationError(-errno.ENODEV, f"there is no reactor on CPU {cpu}")

    async def call(
        self, cpu: int, op: str, args: Mapping[str, Any], fds: Sequence[int] = ()
    ) -> Any:
        """Run an operation in a reactor, for however long it takes.

        Raises ConnectionResetError when the reactor dies or is dead, OperationError if it refuses.
        """
        room = self._room.setdefault(cpu, asyncio.Semaphore(_MAX_CALLS))
        async with room:
            return await self.cluster.call(self.reactor(cpu), op, dict(args), fds, timeout=None)

    def clear_statistics(self, slot: int) -> None:
        """Begin to count from zero, wherever a queue will be served."""
        for reactor in self.cluster.counting:
            reactor.stats.clear_slot(slot)

    def statistics(self, queue: ServedQueue) -> dict[str, int]:
        """Return what all reactors together have done for a queue: see struct queue_stats."""
        slots = [
            reactor.stats.slot(queue.slot, "struct queue_stats")
            for reactor in self.cluster.counting
        ]
        counted = {
            name: sum(getattr(slot, name) for slot in slots)
            for name in ("requests", "kicks", "calls")
        }
        here = self.reactor(queue.cpu).stats.slot(queue.slot, "struct queue_stats")
        return {**counted, "in_flight": here.in_flight}

    def io_statistics(self, queue: ServedQueue) -> Totals:
        """Return what was asked of bdevs for a queue, in all reactors."""
        totals = Totals()
        for reactor in self.cluster.counting:
            totals.add(reactor.stats.slot(queue.slot, "struct queue_stats").io)
        here = self.reactor(queue.cpu).stats.slot(queue.slot, "struct queue_stats")
        totals.in_flight = here.in_flight
        return totals

    def restored(self, cpu: int) -> int:
        """Return how often a reactor on ``cpu`` was told what it has to serve."""
        return self._restored[cpu]

    async def wait_restored(self, cpu: int, seen: int) -> None:
        """Wait until ``restored`` is no longer ``seen``; OperationError(-ETIMEDOUT)."""
        try:
            async with asyncio.timeout(RESTORE_LIMIT), self._news:
                await self._news.wait_for(lambda: self._restored[cpu] != seen)
        except TimeoutError:
            text = f"the reactor on CPU {cpu} was not replaced within {RESTORE_LIMIT:g} s"
            raise OperationError(-errno.ETIMEDOUT, text) from None

    async def _lost(self, reactor: Any) -> None:
        for session in self._sessions.values():
            session.lost(reactor.cpu)

    async def _restore(self, reactor: Any) -> None:
        """Tell a reactor that has just started what it has to serve."""
        cpu: int = reactor.cpu
        sessions = list(self._sessions.values())
        await asyncio.gather(*(session.restore(cpu) for session in sessions))
        async with self._news:
            self._restored[cpu] += 1
            self._news.notify_all()
