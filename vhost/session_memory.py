"""A session's memory: in the reactors that map it, and where devices that do DMA see it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from bdev.guest_dma import Lease
from vhost.interfaces import ServedDevice
from vhost.record import MappedRegion, Migration, SessionRecord

if TYPE_CHECKING:
    from vhost.host import ReactorHost


class SessionMemory:
    """The memory that a session's record has; whoever calls holds the lock of its queues."""

    def __init__(self, host: ReactorHost, record: SessionRecord, device: ServedDevice) -> None:
        # CPUs whose reactors have it mapped, and how many bytes of it registered.
        self.mapped: dict[int, int] = {}
        # During post-copy: where the reactor that was lent has it, by address of the guest.
        self.addresses: dict[int, int] = {}
        self._told: list[MappedRegion] = []  # with their addresses, during post-copy
        self._leases: dict[int, Lease | None] = {}  # by descriptor
        self._host = host
        self._record = record
        self._device = device

    async def unmap(self, cpu: int) -> None:
        """Have a reactor map nothing of it any more."""
        await self._host.call(cpu, "vhost_memory_drop", {"session": self._record.id})
        self.mapped.pop(cpu, None)

    async def map(self, cpu: int, *, lent: bool) -> None:
        """Have a reactor map it as it is now; one that was ``lent`` serves post-copy."""
        regions = [
            [
                entry.region.guest,
                entry.region.size,
                entry.region.user,
                entry.region.offset,
                # To pin a page is to access it.
                0 if lent else await self._device_address(entry),
            ]
            for entry in self._record.memory
        ]
        fds = [entry.fd for entry in self._record.memory]
        args: dict[str, Any] = {
            "session": self._record.id,
            "regions": regions,
            "register": self._device.registered_buffers and not lent,
        }
        if lent and self._record.migration is Migration.LISTENING:
            args["postcopy"] = [
                any(entry is told for told in self._told) for entry in self._record.memory
            ]
            self._told = list(self._record.memory)
        dirty_log = self._record.dirty_log
        if dirty_log is not None:
            event = self._record.log_event
            fds += [dirty_log.fd] if event < 0 else [dirty_log.fd, event]
            args["log"] = {"offset": dirty_log.offset, "size": dirty_log.size, "event": event >= 0}
        if self._record.translated:
            args["iotlb"] = [entry.as_list() for entry in self._record.iotlb.entries()]
        self.mapped[cpu] = 0
        answer = await self._host.call(cpu, "vhost_memory_set", args, fds)
        self.mapped[cpu] = answer["registered"]
        if lent:
            guests = [entry.region.guest for entry in self._record.memory]
            self.addresses = dict(zip(guests, answer["addresses"], strict=True))

    async def _device_address(self, entry: MappedRegion) -> int:
        """Return where devices see a region of guest memory, 0 if nowhere."""
        if self._host.guest_dma is None:
            return 0
        if entry.fd not in self._leases:
            region = entry.region
            lease = await self._host.guest_dma.lease(entry.fd, region.offset, region.size)
            self._leases[entry.fd] = lease
        lease = self._leases[entry.fd]
        return 0 if lease is None else lease.iova

    async def release(self, kept: Collection[int] = ()) -> None:
        """Give back the device addresses of memory that no reactor uses any more."""
        for fd in [fd for fd in self._leases if fd not in kept]:
            lease = self._leases.pop(fd)
            if lease is not None and self._host.guest_dma is not None:
                await self._host.guest_dma.release(lease)
