"""The I/O queue pairs of one controller: made for reactors, lent to them, deleted and remade."""

import asyncio
import contextlib
import itertools
import os
from dataclasses import dataclass, field
from typing import Any, Protocol

from bdev.nvme_admin import AdminQueue, CommandError
from bdev.nvme_transport import PAGE, ControllerError, DmaMemory, Transport
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib

DEPTH = 256  # entries, where the controller takes that many
BOUNCES = 32
FEATURE_NUMBER_OF_QUEUES = 0x07
_INTERRUPTS_ENABLED, _CONTIGUOUS = 0x2, 0x1

_keys = itertools.count(1)


class Cluster(Protocol):
    """What is needed of the cluster; see ``reactor.cluster``."""

    async def call(self, reactor: Any, op: str, args: dict[str, Any] | None = None) -> Any:
        """Run an operation in a reactor."""


@dataclass
class QueuePair:
    """One pair, and the reactor that has it."""

    qid: int
    reactor: Any
    depth: int
    memory: DmaMemory
    layout: CData
    interrupt: int  # eventfd, or -1
    vector: int
    key: int = field(default_factory=lambda: next(_keys))
    users: int = 0  # handles in the reactor
    exists: bool = False  # in the controller
    aborted: dict[int, int] = field(default_factory=dict)  # cid: start of a command being aborted

    @property
    def watch(self) -> CData:
        """``struct nvme_watch *``, written by the reactor."""
        return self.memory.at("struct nvme_watch *", self.layout.watch)

    def started(self) -> memoryview:
        """Return when each command in flight was submitted, in ticks; 0 for those that are not."""
        offset = self.layout.watch + ffi.offsetof("struct nvme_watch", "started")
        return self.memory.words(offset, self.depth)

    def close(self) -> None:
        """Give the memory back; the controller and the reactor use it no more."""
        self.memory.close()
        if self.interrupt >= 0:
            os.close(self.interrupt)
            self.interrupt = -1


class QueuePairs:
    """Those of one controller."""

    def __init__(
        self,
        transport: Transport,
        admin: AdminQueue,
        cluster: Cluster,
        *,
        wanted: int,
        interrupts: bool,
    ) -> None:
        self._transport = transport
        self._admin = admin
        self._cluster = cluster
        self._lock = asyncio.Lock()
        self._by_reactor: dict[str, QueuePair] = {}
        self._stale: list[QueuePair] = []  # of reactors that died
        self._dead = False  # the controller does no DMA, and may not answer
        self._wanted = wanted
        self.admin_interrupt = _eventfd() if transport.vectors else -1  # vector 0
        # How many there are is settled once: kernels before 6.5 cannot add any later.
        self._vectors = min(transport.vectors, wanted + 1) if interrupts else 1
        self.depth = 2
        self.limit = 0  # how many the controller gives us
        self.timeout = 5.0  # seconds for an admin command
        self.stride = 4  # bytes between doorbells
        self.shadow: DmaMemory | None = None  # shadow doorbells and event indices, a page each
        self._set_interrupts()

    def __iter__(self) -> Any:
        """Iterate over the pairs that reactors have."""
        return iter(list(self._by_reactor.values()))

    async def negotiate(self, max_entries: int) -> None:
        """Agree with the controller on how many there may be (Base 5.27.1.5)."""
        what = "setting the number of queues"
        value = (self._wanted - 1) << 16 | (self._wanted - 1)
        fields = {"opcode": lib.NVME_ADMIN_SET_FEATURES, "cdw11": value}
        granted = await self._admin.run(
            what, self.timeout, cdw10=FEATURE_NUMBER_OF_QUEUES, **fields
        )
        self.limit = min(granted & 0xFFFF, granted >> 16) + 1
        if self.limit > 0xFFFF:
            raise ControllerError(
                f"{what}: the controller answered {granted:#x}, which is reserved"
            )
        self.limit = min(self.limit, self._wanted)
        self.depth = min(DEPTH, max_entries)

    async def lend(self, reactor: Any) -> QueuePair:
        """Return the reactor's pair, made if it has none, with one more user."""
        async with self._lock:
            await self._delete_stale()
            pair = self._by_reactor.get(reactor.name)
            if pair is None:
                pair = self._allocate(reactor)
                try:
                    await self._create(pair)
                except BaseException:
                    if pair.exists:
                        self._stale.append(pair)  # it may be in use, so its memory is as well
                    else:
                        pair.close()
                    raise
                self._by_reactor[reactor.name] = pair
            pair.users += 1
            return pair

    def _allocate(self, reactor: Any) -> QueuePair:
        used = {pair.qid for pair in [*self._by_reactor.values(), *self._stale]}
        qid = next(i for i in itertools.count(1) if i not in used)
        if qid > self.limit:
            raise OperationError(
                -16, f"{self._transport.address}: all of its {self.limit} queue pairs are in use"
            )
        layout: CData = ffi.new("struct nvme_queue_layout *")
        lib.nvme_queue_layout(self.depth, BOUNCES, layout)
        name = f"nvme-{self._transport.address}-{qid}"
        memory = DmaMemory(self._transport.dma, name, layout.size, layout.shared)
        interrupt, vector = (_eventfd(), qid) if qid < self._vectors else (-1, 0)
        return QueuePair(qid, reactor, self.depth, memory, layout, interrupt, vector)

    async def _create(self, pair: QueuePair) -> None:
        """Create both queues in the controller (Base 5.4, 5.5)."""
        if pair.interrupt >= 0:
            self._set_interrupts(pair)
        size = (pair.depth - 1) << 16 | pair.qid
        flags = pair.vector << 16 | _INTERRUPTS_ENABLED if pair.interrupt >= 0 else 0
        if self.shadow is not None:
            # What the last queue pair of this number left there is not where this one begins.
            for page in (0, PAGE):
                self.shadow.clear(page + 2 * pair.qid * self.stride, 2 * self.stride)
        pair.exists = True  # as far as anyone knows, from here on
        try:
            await self._admin.run(
                f"creating completion queue {pair.qid}",
                self.timeout,
                opcode=lib.NVME_ADMIN_CREATE_CQ,
                prp1=pair.memory.iova + pair.layout.completion,
                cdw10=size,
                cdw11=flags | _CONTIGUOUS,
            )
        except CommandError:
            pair.exists = False  # it was refused
            raise
        await self._admin.run(
            f"creating submission queue {pair.qid}",
            self.timeout,
            opcode=lib.NVME_ADMIN_CREATE_SQ,
            prp1=pair.memory.iova + pair.layout.submission,
            cdw10=size,
            cdw11=pair.qid << 16 | _CONTIGUOUS,
        )

    def _set_interrupts(self, *more: QueuePair) -> None:
        """Attach the eventfds of all pairs to the interrupts; a pair's vector is its number."""
        if self.admin_interrupt < 0:
            return
        fds = [self.admin_interrupt] + [-1] * (self._vectors - 1)
        for pair in (*self, *more):
            if pair.interrupt >= 0:
                fds[pair.vector] = pair.interrupt
        self._transport.set_interrupts(fds)

    async def give_back(self, reactor: Any) -> None:
        """Count one user of the reactor's pair less; without users it is deleted."""
        async with self._lock:
            pair = self._by_reactor.get(reactor.name)
            if pair is None:
                return
            pair.users -= 1
            if pair.users <= 0:
                del self._by_reactor[reactor.name]
                self._stale.append(pair)
                await self._delete_stale()

    async def fence(self, reactor: Any) -> None:
        """Delete the pair of a reactor that died: after it its commands do nothing any more."""
        async with self._lock:
            self._abandon(reactor)
            await self._delete_stale()

    def _abandon(self, reactor: Any) -> None:
        pair = self._by_reactor.pop(reactor.name, None)
        if pair is not None:
            self._stale.append(pair)

    async def _delete_stale(self) -> None:
        while self._stale:
            pair = self._stale[0]
            if pair.exists and not self._dead:
                await self._delete(pair)
            self._stale.pop(0).close()

    async def _delete(self, pair: QueuePair) -> None:
        """Delete both queues; commands in flight are aborted, and are over when this returns."""
        for opcode, which in (
            (lib.NVME_ADMIN_DELETE_SQ, "submission"),
            (lib.NVME_ADMIN_DELETE_CQ, "completion"),
        ):
            what = f"deleting {which} queue {pair.qid}"
            with contextlib.suppress(CommandError):  # refused: it was not there
                await self._admin.run(what, self.timeout, opcode=opcode, cdw10=pair.qid)
        pair.exists = False

    # --- reset, removal

    async def pause(self) -> None:
        """Have the reactors leave their queues alone: the controller is about to be reset.

        A reactor that cannot be reached would go on where it was, in a queue that begins anew, and
        the controller would carry out old commands again: its pair is not made again.
        """
        for pair in await self._tell("bdev_nvme_queue_pause"):
            self._abandon(pair.reactor)

    async def remake(self) -> None:
        """Create the pairs again in a controller that was reset, and have the reactors go on."""
        async with self._lock:
            self._dead = False
            for pair in [*self._by_reactor.values(), *self._stale]:
                pair.exists = False  # none is left
            await self._delete_stale()
            for pair in self:
                await self._create(pair)
                pair.aborted.clear()
        await self._tell("bdev_nvme_queue_resume")

    async def fail(self) -> None:
        """Have the reactors fail every request: the controller does no DMA any more."""
        self._dead = True
        await self._tell("bdev_nvme_queue_fail")

    async def detach(self) -> None:
        """Have the reactors let go of the controller for good, and give all memory back."""
        await self._tell("bdev_nvme_queue_detach")
        async with self._lock:
            self.release()

    def release(self) -> None:
        """Give all memory back, where no reactor is left."""
        for pair in [*self._by_reactor.values(), *self._stale]:
            pair.close()
        self._by_reactor.clear()
        self._stale.clear()
        if self.shadow is not None:
            self.shadow.close()
            self.shadow = None
        if self.admin_interrupt >= 0:
            os.close(self.admin_interrupt)
            self.admin_interrupt = -1

    async def _tell(self, op: str) -> list[QueuePair]:
        """Tell every reactor that has a pair; return the pairs of those that did not obey."""
        pairs = list(self)
        calls = [self._cluster.call(pair.reactor, op, {"key": pair.key}) for pair in pairs]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, OperationError):
                raise result
        return [pair for pair, r in zip(pairs, results, strict=True) if r is not True]


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
