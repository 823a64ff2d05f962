"""Guest memory as a target of DMA.

Every region of guest memory gets device addresses of its own when its session starts, and keeps
them: reactors know them whether or not there is a drive. It is mapped, and so locked in memory,
while a controller that was attached with ``dma=guest`` is there. A region that cannot be mapped
has no device addresses, and its data goes by way of bounce buffers.
"""

import asyncio
import logging
import os
from dataclasses import dataclass

from bdev.nvme_transport import PAGE, DmaSpace
from bdev.pci import Sysfs
from bdev.vfio_space import GUEST_WINDOW, Addresses
from reactor.errors import OperationError

log = logging.getLogger(__name__)

_Key = tuple[int, int, int, int]  # device, inode, offset, size: the same memory sent twice is one


@dataclass(eq=False)
class Lease:
    """Device addresses of a part of a file, for as long as anyone uses it."""

    key: _Key
    fd: int  # ours
    offset: int  # whole pages
    size: int
    address: int  # of the first page
    skipped: int  # bytes of it before what was asked for
    mapped: bool = False
    users: int = 1

    @property
    def iova(self) -> int:
        """Where devices see the first byte that was asked for."""
        return self.address + self.skipped


class GuestDma:
    """All leases, and the address space in which they are mapped, if there is one."""

    def __init__(self) -> None:
        self._addresses = Addresses([GUEST_WINDOW], Sysfs().bus_addresses)
        self._leases: dict[_Key, Lease] = {}
        self._space: DmaSpace | None = None
        self._users = 0
        self._lock = asyncio.Lock()

    async def lease(self, fd: int, offset: int, size: int) -> Lease | None:
        """Return device addresses of a part of a file; None if it cannot have any."""
        async with self._lock:
            stat = os.fstat(fd)
            key = (stat.st_dev, stat.st_ino, offset, size)
            if key in self._leases:
                self._leases[key].users += 1
                return self._leases[key]
            try:
                lease = self._make(key, fd, max(stat.st_blksize, PAGE))
            except OSError as error:
                log.warning("guest memory of %d bytes is not for DMA: %s", size, error)
                return None
            if self._space is not None and not await self._try_to_map(self._space, lease):
                self._forget(lease)
                return None
            self._leases[key] = lease
            return lease

    def _make(self, key: _Key, fd: int, page: int) -> Lease:
        """Reserve addresses; ``page`` is the file's own, of hugetlbfs more than 4096 bytes."""
        _, _, offset, size = key
        start = offset // page * page
        length = -(-(offset + size - start) // page) * page
        address = self._addresses.allocate(length)
        try:
            ours = os.dup(fd)
        except OSError:
            self._addresses.free(address)
            raise
        return Lease(key, ours, start, length, address, offset - start)

    async def _try_to_map(self, space: DmaSpace, lease: Lease) -> bool:
        try:
            await self._map(space, lease)
        except OSError as error:
            log.warning("guest memory goes by way of bounce buffers: %s", error)
            return False
        return True

    async def _map(self, space: DmaSpace, lease: Lease) -> None:
        """Map it; a thread waits, for locking much memory takes its time."""
        await asyncio.to_thread(space.map, lease.fd, lease.offset, lease.size, lease.address)
        lease.mapped = True

    def _forget(self, lease: Lease) -> None:
        self._addresses.free(lease.address)
        os.close(lease.fd)

    async def release(self, lease: Lease) -> None:
        """Give a lease back; with its last user the memory is unmapped."""
        async with self._lock:
            lease.users -= 1
            if lease.users:
                return
            del self._leases[lease.key]
            if lease.mapped and self._space is not None:
                await asyncio.to_thread(self._space.unmap, lease.address)
            self._forget(lease)

    async def use(self, space: DmaSpace) -> None:
        """Map all there is, for one controller more; OperationError, and nothing has changed."""
        async with self._lock:
            if self._users == 0:
                for lease in self._leases.values():
                    try:
                        await self._map(space, lease)
                    except OSError as error:
                        self._unmap_all(space)
                        text = f"{error.strerror}; attach with dma=bounce, or allow more"
                        raise OperationError(-(error.errno or 12), text) from None
                self._space = space
            self._users += 1

    async def drop(self) -> None:
        """Count one controller less; without any, nothing stays mapped."""
        async with self._lock:
            self._users -= 1
            if self._users == 0 and self._space is not None:
                self._unmap_all(self._space)
                self._space = None

    def _unmap_all(self, space: DmaSpace) -> None:
        for lease in self._leases.values():
            if lease.mapped:
                space.unmap(lease.address)
                lease.mapped = False
