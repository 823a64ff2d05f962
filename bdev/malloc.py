"""Malloc disks: memfds of the control process, which outlive the reactors that serve them."""

import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

from bdev.collapse import Collapser
from bdev.kind import EINVAL, Bdev, OpenContext, opener, provider
from bdev.parameters import (
    blocks_of,
    check_block_size,
    check_num_blocks,
    check_physical_block_size,
    check_uuid,
    refuse_unsupported,
)
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import CData, lib
from reactor.operations import operation

ENOMEM, ENOTSUP = -12, -95
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL  # what is mapped must stay
_MFD_HUGE_SHIFT = 26


def free_huge_pages(page_size: int) -> int:
    """Return how many huge pages of ``page_size`` bytes nobody uses or has reserved."""
    folder = _HUGE_PAGES / f"hugepages-{page_size // 1024}kB"
    try:
        free = int((folder / "free_hugepages").read_text())
        return free - int((folder / "resv_hugepages").read_text())
    except OSError:
        return 0


def _create(name: str, size: int, flags: int) -> int:
    """Return a sealed memfd of ``size`` bytes."""
    fd = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_memory(name: str, size: int, huge_page: int = 2 << 20) -> tuple[int, int]:
    """Return a memfd for ``size`` bytes, and the size of its huge pages or 0.

    Huge pages are used when enough of them are free. They are reserved here and now: a mapping of a
    shared file reserves them for the file, not for itself.
    """
    pages = -(-size // huge_page)
    if free_huge_pages(huge_page) >= pages:
        flags = os.MFD_HUGETLB | (huge_page.bit_length() - 1) << _MFD_HUGE_SHIFT
        try:
            fd = _create(name, pages * huge_page, flags)
        except OSError:
            return _create(name, size, 0), 0
        try:
            mmap.mmap(fd, pages * huge_page).close()
        except OSError:  # somebody else was faster
            os.close(fd)
        else:
            return fd, huge_page
    page = mmap.PAGESIZE
    return _create(name, -(-size // page) * page, 0), 0


class MallocBdev(Bdev):
    """A disk in memory."""

    kind = "malloc"
    product_name = "Malloc disk"

    def __init__(
        self,
        name: str,
        *,
        block_size: int,
        num_blocks: int,
        uuid: str,
        physical_block_size: int,
        optimal_io_boundary: int,
        collapser: Collapser,
        memory: tuple[int, int] | None = None,
    ) -> None:
        """``memory`` is a memfd, ours to close, and the size of its huge pages or 0: not empty."""
        super().__init__(name, block_size=block_size, num_blocks=num_blocks, uuid=uuid)
        self.physical_block_size = check_physical_block_size(physical_block_size, block_size)
        self.optimal_io_boundary = optimal_io_boundary
        self._fd, self.huge_page = memory or create_memory(name, self.size)
        self._shared = None if self.huge_page else collapser.add(self._fd)
        if memory is not None:
            # A resize may have been cut off, between the memory and the size.
            self.make_room(num_blocks)
            self.forget_beyond()

    def open_args(self) -> dict[str, Any]:
        """Add the size of its pages, for the opener."""
        return {**super().open_args(), "huge_page": self.huge_page}

    def open_fds(self) -> list[int]:
        """Lend the memory."""
        return [self._fd]

    def keepsake(self) -> tuple[dict[str, Any], list[int]]:
        """Keep the contents."""
        return {"uuid": self.uuid, "huge_page": self.huge_page}, [self._fd]

    def close(self) -> None:
        """Give the memory back, although a reactor may still have an empty mapping of it."""
        if self._fd >= 0:
            lib.malloc_bdev_discard(self._fd, 0)
            if self._shared:
                self._shared.close()
            os.close(self._fd)
            self._fd = -1

    def make_room(self, num_blocks: int) -> None:
        """Have memory for another size; OperationError(-95) if huge pages would have to grow."""
        size = num_blocks * self.block_size
        if size <= os.fstat(self._fd).st_size:
            return
        if self.huge_page:
            raise OperationError(
                ENOTSUP,
                f"bdev {self.name} is in {os.fstat(self._fd).st_size} bytes of reserved huge pages,"
                f" and {size} were asked for: it cannot grow, because the kernel"
                " extends no mapping of such pages; create another disk of that size, and copy",
            )
        os.ftruncate(self._fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)

    def forget_beyond(self) -> None:
        """Give back what is beyond the end, so that it reads as zeroes when it is used again."""
        lib.malloc_bdev_discard(self._fd, self.size)

    def describe(self) -> dict[str, Any]:
        """Return the boundary, as SPDK does: only when there is one."""
        boundary = self.optimal_io_boundary
        return {"optimal_io_boundary": boundary} if boundary else {}

    def driver_specific(self) -> dict[str, Any]:
        """Return the size of its reserved huge pages or 0, and how many transparent ones it has."""
        transparent = self._shared.huge_pages if self._shared else 0
        return {
            "malloc": {
                "huge_page_size": self.huge_page,
                "transparent_huge_pages": transparent,
            }
        }

    def config(self) -> dict[str, Any]:
        """Return the call that would create this disk."""
        return {
            "method": "bdev_malloc_create",
            "params": {
                "name": self.name,
                "num_blocks": self.num_blocks,
                "block_size": self.block_size,
                "physical_block_size": self.physical_block_size,
                "uuid": self.uuid,
                "optimal_io_boundary": self.optimal_io_boundary,
            },
        }


def _check_memory(num_blocks: int, block_size: int) -> None:
    size = check_num_blocks(num_blocks, check_block_size(block_size)) * block_size
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise OperationError(
            ENOMEM,
            f"num_blocks {num_blocks}: {size} bytes are more than the {total} of this machine",
        )


@provider
class MallocOperations:
    """``bdev_malloc_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._collapser = Collapser()

    @operation(aliases=["construct_malloc_bdev"], touches=True)
    async def bdev_malloc_create(
        self,
        block_size: int,
        num_blocks: int,
        name: str | None = None,
        uuid: str | None = None,
        optimal_io_boundary: int = 0,
        md_size: int = 0,
        md_interleave: bool = False,
        dif_type: int = 0,
        dif_is_head_of_md: bool = False,
        physical_block_size: int = 0,
        dif_pi_format: int = 0,
        numa_id: int = -1,
    ) -> str:
        """Create a disk in memory and return its name; without one it is Malloc0, Malloc1 ..."""
        refuse_unsupported(
            md_size=md_size,
            md_interleave=md_interleave,
            dif_type=dif_type,
            dif_is_head_of_md=dif_is_head_of_md,
            dif_pi_format=dif_pi_format,
        )
        if numa_id != -1:
            raise OperationError(EINVAL, f"numa_id {numa_id}: not supported; leave it out, or -1")
        if optimal_io_boundary < 0:
            raise OperationError(
                EINVAL, f"optimal_io_boundary {optimal_io_boundary}: must be 0 (none) or more"
            )
        _check_memory(num_blocks, block_size)
        name = self._registry.unused_name("Malloc") if name is None else name
        self._registry.check_unused(name, uuid or "")
        kept, fds = self._registry.inherit("malloc", name, uuid=check_uuid(uuid or ""))
        with fds:
            disk = MallocBdev(
                name,
                block_size=block_size,
                num_blocks=num_blocks,
                uuid=uuid or "",
                physical_block_size=physical_block_size,
                optimal_io_boundary=optimal_io_boundary,
                collapser=self._collapser,
                memory=(fds.take(0), kept["huge_page"]) if fds else None,
            )
        await self._registry.register(disk)
        return name

    @operation
    async def bdev_malloc_resize(self, name: str, new_size: int) -> bool:
        """Give a disk ``new_size`` MiB, and let guests know. What is cut off is lost."""
        disk = self._registry.find_as(name, MallocBdev)
        num_blocks = blocks_of(new_size, disk.block_size)
        _check_memory(num_blocks, disk.block_size)
        disk.make_room(num_blocks)
        await self._registry.resize(disk, num_blocks)
        disk.forget_beyond()
        return True

    @operation(aliases=["delete_malloc_bdev"], touches=True)
    async def bdev_malloc_delete(self, name: str) -> bool:
        """Delete a malloc disk; its contents are lost."""
        await self._registry.remove(name, kind="malloc")
        return True


@opener("malloc")
def open_malloc(context: OpenContext) -> CData:
    """Map a malloc disk in a reactor."""
    return lib.malloc_bdev_open(
        context.reactor,
        context.id,
        context.slot,
        context.args["block_size"],
        context.args["num_blocks"],
        context.fds[0],
        context.args["huge_page"],
    )
