"""File disks: regular files and block devices, by the best way to the kernel that there is.

One kind under two of SPDK's names, ``bdev_uring_*`` and ``bdev_aio_*``, whose parameters differ.
"""

import fcntl
import os
import uuid as uuids
from pathlib import Path
from typing import Any

from bdev import fence
from bdev.backing import Backing, open_backing
from bdev.engine import Engine, choose_engine
from bdev.kind import EINVAL, Bdev, OpenContext, opener, provider
from bdev.parameters import check_block_size, check_name, check_uuid
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib
from reactor.operations import operation


class FileBdev(Bdev):
    """A disk in a file. ``backing`` becomes the disk's to close."""

    kind = "file"
    product_name = "URING bdev"

    def __init__(
        self,
        name: str,
        path: str,
        backing: Backing,
        *,
        uuid: str,
        params: dict[str, Any],
        method: str,
        engine: Engine,
    ) -> None:
        self.engine = engine
        self.uses_registered_memory = engine is Engine.IO_URING
        self.path = path
        self.backing = backing
        self._params = params
        self._method = method
        self._users: set[Any] = set()  # reactors that may have operations in the kernel
        if backing.size < backing.block_size:
            raise OperationError(
                EINVAL,
                f"{path}: has {backing.size} bytes, less than a block of {backing.block_size}",
            )
        # The same disk under the same name is the same device to a guest, after a restart too.
        stable = uuids.uuid5(uuids.NAMESPACE_URL, f"file://{Path(path).resolve()}#{name}")
        super().__init__(
            name,
            block_size=backing.block_size,
            num_blocks=backing.size // backing.block_size,
            uuid=uuid or str(stable),
            readonly=backing.readonly,
            unmap=backing.unmap,
        )

    def open_args(self) -> dict[str, Any]:
        """Add what was found out about the file."""
        return {
            **super().open_args(),
            "memory_alignment": self.backing.memory_alignment,
            "offset_alignment": self.backing.offset_alignment,
            "readonly": self.readonly,
            "unmap": self.backing.unmap,
            "engine": self.engine.native,
        }

    def open_fds(self) -> list[int]:
        """Lend the file."""
        return [self.backing.fd]

    def keepsake(self) -> tuple[dict[str, Any], list[int]]:
        """Keep the file, and with it the lock."""
        readonly = bool(self._params.get("readonly"))
        return {"path": self.path, "readonly": readonly}, [self.backing.fd]

    async def opened(self, cluster: Any, reactor: Any) -> None:
        """Keep hold of the reactor's fence, which then outlives it."""
        self._users.add(reactor)
        await fence.hold(cluster, reactor)

    def closed(self, reactor: Any) -> None:
        """Let go of the fence, if this was the last file disk there."""
        self._users.discard(reactor)
        fence.release(reactor)

    async def fence(self, reactor: Any) -> None:
        """Wait until the kernel has finished what the dead reactor had submitted."""
        await fence.drained(reactor)
        self._users.discard(reactor)

    def let_go(self) -> None:
        """Unlock the file, although io_uring may have it open for a while yet.

        Unless a reactor has died with it: then the lock lasts as long as the kernel is at work.
        """
        if not self._users:
            fcntl.flock(self.backing.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file; a lock that is left goes with the last process that has it open."""
        os.close(self.backing.fd)

    @property
    def has_history(self) -> bool:
        """Return that a file may have been a disk before."""
        return True

    def blocks_now(self) -> int:
        """Return how many blocks the file has at this moment."""
        return os.lseek(self.backing.fd, 0, os.SEEK_END) // self.block_size

    def driver_specific(self) -> dict[str, Any]:
        """Return the file, and how it is reached."""
        return {
            "uring" if self._method.startswith("bdev_uring") else "aio": {
                "filename": self.path,
                "readonly": self.readonly,
                "engine": self.engine.value,
                "direct": self.backing.direct,
                "memory_alignment": self.backing.memory_alignment,
            }
        }

    def config(self) -> dict[str, Any]:
        """Return the call that would create this disk."""
        return {
            "method": self._method,
            "params": {
                "name": self.name,
                "filename": self.path,
                "block_size": self.block_size,
                "uuid": self.uuid,
                **self._params,
            },
        }


@provider
class FileOperations:
    """``bdev_uring_*`` and ``bdev_aio_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    async def _create(
        self,
        method: str,
        name: str,
        filename: str,
        block_size: int | None,
        uuid: str | None,
        readonly: bool,
        engine: Engine | None,
    ) -> str:
        check_name(name)
        self._registry.check_unused(name, check_uuid(uuid or ""))
        if block_size == 0:
            block_size = None
        if block_size is not None:
            check_block_size(block_size)
        params: dict[str, Any] = {"readonly": True} if readonly else {}
        if engine is not None:
            params["engine"] = engine.value
        known = {"path": filename, "readonly": readonly}
        _, fds = self._registry.inherit("file", name, **known)
        with fds:
            backing = await open_backing(filename, block_size, readonly, fds.take(0) if fds else -1)
        try:
            disk = FileBdev(
                name,
                filename,
                backing,
                uuid=uuid or "",
                params=params,
                method=method,
                engine=choose_engine(backing, engine),
            )
        except BaseException:
            os.close(backing.fd)
            raise
        await self._registry.register(disk)
        return name

    @operation(touches=True)
    async def bdev_uring_create(
        self,
        filename: str,
        name: str,
        block_size: int | None = None,
        uuid: str | None = None,
        readonly: bool = False,
        engine: Engine | None = None,
    ) -> str:
        """Create a disk in a file and return its name.

        Without ``block_size`` it is the smallest that suits the file, without ``engine`` the first
        that the system allows: io_uring, aio, threads.
        """
        method = "bdev_uring_create"
        return await self._create(method, name, filename, block_size, uuid, readonly, engine)

    @operation(aliases=["construct_aio_bdev"], touches=True)
    async def bdev_aio_create(
        self,
        name: str,
        filename: str,
        block_size: int | None = None,
        readonly: bool = False,
        fallocate: bool = True,  # noqa: ARG002 - always, where the file system can
        uuid: str | None = None,
        nowait: bool = False,  # noqa: ARG002 - a reactor never blocks
        engine: Engine | None = None,
    ) -> str:
        """Create a disk in a file and return its name; the same disk as bdev_uring_create makes."""
        method = "bdev_aio_create"
        return await self._create(method, name, filename, block_size, uuid, readonly, engine)

    @operation(touches=True)
    async def bdev_uring_delete(self, name: str) -> bool:
        """Delete a file disk; the file stays."""
        await self._registry.remove(name, kind="file")
        return True

    @operation(aliases=["delete_aio_bdev"], touches=True)
    async def bdev_aio_delete(self, name: str) -> bool:
        """Delete a file disk; the file stays."""
        await self._registry.remove(name, kind="file")
        return True

    async def _rescan(self, name: str) -> bool:
        disk = self._registry.find_as(name, FileBdev)
        await self._registry.resize(disk, disk.blocks_now())
        return True

    @operation
    async def bdev_uring_rescan(self, name: str) -> bool:
        """Look at a file's size again, and let guests know of a change."""
        return await self._rescan(name)

    @operation
    async def bdev_aio_rescan(self, name: str) -> bool:
        """Look at a file's size again, and let guests know of a change."""
        return await self._rescan(name)


@opener("file")
def open_file(context: OpenContext) -> CData:
    """Open a file disk in a reactor."""
    args = context.args
    setup = ffi.new(
        "struct file_setup *",
        {
            "fd": context.fds[0],
            "block_size": args["block_size"],
            "block_count": args["num_blocks"],
            "memory_alignment": args["memory_alignment"],
            "offset_alignment": args["offset_alignment"],
            "readonly": args["readonly"],
            "unmap": args["unmap"],
            "engine": args["engine"],
        },
    )
    handle = lib.file_bdev_open(context.reactor, context.id, context.slot, setup)
    if handle != ffi.NULL:
        context.fds.take(0)
    return handle
