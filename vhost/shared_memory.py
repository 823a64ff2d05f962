"""The memory that a front-end shares with a session: regions of the guest's, the dirty log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from reactor.operations import FileDescriptors
from vhost.descriptors import check_eventfd, check_file, check_memory
from vhost.interfaces import QueueHost
from vhost.messages import (
    U64,
    Log,
    MemoryTable,
    ProtocolError,
    Region,
    SingleRegion,
    check_overlap,
)
from vhost.record import (
    DirtyLog,
    MappedRegion,
    Migration,
    QueueRecord,
    SessionRecord,
    close_fds,
    in_table,
)

MAX_MEM_SLOTS = 509  # what the kernel's vhost and rust-vmm allow

NO_FDS = FileDescriptors()

# Keeps queues from running while what they depend on is changed: vhost.rings.
Changing = Callable[
    [Iterable[QueueRecord], Iterable[QueueRecord]], AbstractAsyncContextManager[None]
]


class SharedMemory:
    """A session's memory, with a method for each message about it."""

    def __init__(self, record: SessionRecord, host: QueueHost, changing: Changing) -> None:
        self._record = record
        self._host = host
        self._changing = changing

    async def _set_memory(
        self, kept: list[MappedRegion], added: Iterable[Region] = (), fds: FileDescriptors = NO_FDS
    ) -> None:
        """Use the regions ``kept`` and ``added``, whose descriptors are ``fds``, and no others.

        The descriptors of the others are closed when nobody has them mapped any more.
        """
        record, former = self._record, self._record.memory
        table = MemoryTable((*(entry.region for entry in kept), *added))
        if record.logging is not None:
            check_dirty_log(record.logging, table.regions, "memory")
        listening = record.migration is Migration.LISTENING
        moved = [
            queue
            for queue in record.queues.values()
            if listening
            or not in_table(
                queue.ring if record.translated else queue.addr,
                queue.size,
                table,
                packed=record.packed,
            )
        ]
        async with self._changing(moved, record.queues.values()):
            new = [MappedRegion(region, fds.take(i)) for i, region in enumerate(added)]
            record.memory, record.unconfirmed = kept + new, listening
            record.iotlb.keep(table.regions)
            try:
                await self._host.set_memory()
            finally:
                still_used = {entry.fd for entry in kept}
                close_fds([entry.fd for entry in former if entry.fd not in still_used])

    # --- messages

    async def _get_max_mem_slots(self) -> U64:
        return U64(MAX_MEM_SLOTS)

    async def _set_mem_table(self, payload: MemoryTable, fds: FileDescriptors) -> None:
        for region, fd in zip(payload.regions, fds, strict=True):
            check_memory(fd, region, "SET_MEM_TABLE")
        await self._set_memory([], payload.regions, fds)

    async def _add_mem_reg(self, payload: SingleRegion, fds: FileDescriptors) -> None:
        name, memory, region = "ADD_MEM_REG", self._record.memory, payload.region
        if len(memory) >= MAX_MEM_SLOTS:
            raise ProtocolError(name, "number of regions", len(memory) + 1, f"<= {MAX_MEM_SLOTS}")
        check_overlap(region, self._record.table().regions, name, "region")
        check_memory(fds[0], region, name)
        await self._set_memory(memory, [region], fds)

    async def _rem_mem_reg(self, payload: SingleRegion, _: FileDescriptors) -> None:
        """Remove the region with the same addresses and size; the offset is ignored."""
        asked = payload.region
        kept = [
            entry
            for entry in self._record.memory
            if replace(entry.region, offset=asked.offset) != asked
        ]
        if len(kept) == len(self._record.memory):
            where = f"{asked.guest:#x} + {asked.size:#x}"
            raise ProtocolError("REM_MEM_REG", "region", where, "one that was added")
        await self._set_memory(kept)

    async def _set_log_base(self, payload: Log, fds: FileDescriptors) -> U64:
        """Log to other memory from now on; answers when nothing is logged to the former."""
        check_file(fds[0], payload.offset, payload.size, "SET_LOG_BASE")
        dirty_log = DirtyLog(fds[0], payload.offset, payload.size)
        check_dirty_log(dirty_log, self._record.table().regions, "SET_LOG_BASE")
        fds.take(0)
        former, self._record.dirty_log = self._record.dirty_log, dirty_log
        try:
            await self._host.set_memory()
        finally:
            close_fds(() if former is None else (former.fd,))
        return U64(0)

    async def _set_log_fd(self, fds: FileDescriptors) -> None:
        check_eventfd(fds[0], "SET_LOG_FD")
        former, self._record.log_event = self._record.log_event, fds.take(0)
        try:
            await self._host.set_memory()
        finally:
            close_fds((former,))


def check_dirty_log(dirty_log: DirtyLog, regions: Iterable[Region], message: str) -> None:
    """Raise ProtocolError unless a dirty log has a bit for each page of some regions."""
    for region in regions:
        check_log_end(dirty_log, region.guest + region.size, message)


def check_log_end(dirty_log: DirtyLog, end: int, message: str) -> None:
    """Raise ProtocolError unless a dirty log has bits up to guest-physical address ``end``."""
    if end > dirty_log.end:
        allowed = f"a bit for each {DirtyLog.PAGE} bytes up to guest address {end:#x}"
        raise ProtocolError(message, "log size", dirty_log.size, allowed)
