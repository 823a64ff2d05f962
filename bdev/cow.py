"""Cow: a private overlay on a read-only base that many disks share."""

import asyncio
import contextlib
import errno
import os
import uuid as uuids
from pathlib import Path
from typing import Any, Literal

from bdev import overlay
from bdev.background import Background
from bdev.backing import open_backing
from bdev.engine import choose_engine
from bdev.file import FileBdev
from bdev.kind import (
    EINVAL,
    Bdev,
    Op,
    OpenContext,
    TaskContext,
    check_name,
    check_uuid,
    opener,
    provider,
    task,
)
from bdev.overlay import Layout
from bdev.registry import BdevRegistry
from bdev.shared import Shared
from bdev.stacked import StackedBdev
from reactor.errors import OperationError, check
from reactor.native import CData, ffi, lib
from reactor.operations import operation

FILL_BYTES = 16 << 20  # of the disk, that a step of a fill looks at
PAUSE = 0.01  # seconds until a cluster that somebody else copies is looked at again


class OverlayBdev(FileBdev):
    """The overlay's file as a device, which comes and goes with the disk that it belongs to."""

    def config(self) -> dict[str, Any]:
        """Return nothing: the disk's own call creates it."""
        return {}

    def keepsake(self) -> None:  # type: ignore[override,unused-ignore]
        """Return that nobody keeps it open when the control process ends: it is opened anew."""

    @property
    def has_history(self) -> bool:
        """Return that there is nothing to be found in it."""
        return False


class CowBdev(StackedBdev):
    """What is in ``above``, an overlay with this layout and these bits, and else in ``base``."""

    kind = "cow"
    product_name = "Copy-on-Write Disk"

    def __init__(
        self,
        registry: BdevRegistry,
        name: str,
        base: Bdev,
        above: OverlayBdev,
        *,
        layout: Layout,
        bits: bytes,
        copy_on_read: bool,
    ) -> None:
        super().__init__(name, [base, above], num_blocks=layout.num_blocks, uuid=str(layout.uuid))
        self.private_bases = (above,)
        self.readonly = False
        self.supported = above.supported | {Op.UNMAP}
        self.layout = layout
        self.copy_on_read = copy_on_read
        self._registry = registry
        native = overlay.to_native(layout)
        self._shared = Shared("bdev-cow", "struct cow_map", lib.cow_map_size(native))
        lib.cow_map_init(self._shared.struct, native)
        ffi.memmove(self._shared.struct.words, bits, len(bits))
        self.fill = Background(registry, self, self._fill_step)

    @property
    def has_history(self) -> bool:
        """Return that the base may have partitions, and the overlay too."""
        return True

    def present(self) -> int:
        """Return how many clusters are in the overlay."""
        return int(lib.cow_map_count(self._shared.struct))

    def missing(self, cluster: int = 0) -> int:
        """Return the first cluster from ``cluster`` on that is not; that after the base's last."""
        end = self.layout.base_clusters
        return int(lib.cow_map_find(self._shared.struct, cluster, end, False))

    async def _fill_step(self, reactor: Any) -> bool:
        """Have ``reactor`` copy some of what is missing; True when nothing is."""
        first = self.missing()
        last = self.layout.base_clusters
        if first == last:
            return True
        end = min(first + FILL_BYTES // self.layout.cluster_size, last)
        await self._registry.task(self, reactor, {"first": first, "end": end})
        if self.missing() == first:
            await asyncio.sleep(PAUSE)
        return False

    async def lend(self, reactor: Any) -> tuple[dict[str, Any], list[int]]:
        """Lend the map, and the name by which the reactor claims clusters."""
        args = {
            **self.open_args(),
            "base_blocks": self.layout.base_blocks,
            "owner": self._registry.number(reactor),
            "copy_on_read": self.copy_on_read,
        }
        return args, [self._shared.fd]

    async def recovered(self, reactor: Any) -> None:
        """Have others copy what the reactor, which is dead, had claimed."""
        lib.cow_map_forsake(self._shared.struct, self._registry.number(reactor))

    def close(self) -> None:
        """Release the map; what it says is in the overlay."""
        self._shared.close()

    def driver_specific(self) -> dict[str, Any]:
        """Return the parts, and how much of the base has been copied."""
        error = self.fill.error
        return {
            "cow": {
                "base_bdev_name": self.bases[0].name,
                "overlay": self._path,
                "cluster_size": self.layout.cluster_size,
                "num_clusters": self.layout.clusters,
                "num_allocated_clusters": self.present(),
                "copy_on_read": self.copy_on_read,
                "fill": {
                    "running": self.fill.running,
                    "complete": self.missing() == self.layout.base_clusters,
                    "error": None if error is None else error.message,
                },
            }
        }

    @property
    def _path(self) -> str:
        (above,) = self.private_bases
        assert isinstance(above, OverlayBdev)
        return above.path

    def config(self) -> dict[str, Any]:
        """Return the call that would make this disk of the same overlay."""
        params = {
            "name": self.name,
            "base": self.bases[0].name,
            "overlay": self._path,
            "cluster_size": self.layout.cluster_size,
            "num_blocks": self.num_blocks,
            "uuid": self.uuid,
        }
        if self.copy_on_read:
            params["copy_on_read"] = True
        if self.fill.running:
            params["fill"] = True
        return {"method": "bdev_cow_create", "params": params}


def _check_same(path: str, layout: Layout, **wanted: Any) -> None:
    """OperationError(-22) if an overlay that exists is not as it was asked for."""
    for name, value in wanted.items():
        if value and value != str(getattr(layout, name)) and value != getattr(layout, name):
            raise OperationError(
                EINVAL, f"{name} {value}: overlay {path} has {getattr(layout, name)}; leave it out"
            )


@provider
class CowOperations:
    """``bdev_cow_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation
    async def bdev_cow_create(
        self,
        name: str,
        base: str,
        overlay: str,
        cluster_size: int | None = None,
        num_blocks: int | None = None,
        copy_on_read: bool = False,
        fill: bool = False,
        uuid: str | None = None,
    ) -> str:
        """Create a disk that reads from ``base`` and keeps in a file what is written to it.

        ``overlay`` is the path of that file; it is made if there is none, else the disk is as it
        was left. ``base`` must be read-only. The disk may be larger than its base.
        """
        check_name(name)
        self._registry.check_unused(name, check_uuid(uuid or ""))
        self._registry.check_unused(f"{name}.overlay", "")
        below = self._registry.find(base)
        if not below.readonly:
            raise OperationError(
                EINVAL, f"base {base}: can be written, which would change {name}; make it read-only"
            )
        made = await asyncio.to_thread(
            _make_overlay, overlay, below, cluster_size, num_blocks, uuid
        )
        try:
            disk = await self._assemble(
                name, below, overlay, cluster_size, num_blocks, uuid, copy_on_read
            )
        except BaseException:
            if made:
                os.unlink(overlay)
            raise
        if fill:
            disk.fill.start()
        return name

    async def _assemble(
        self,
        name: str,
        base: Bdev,
        path: str,
        cluster_size: int | None,
        num_blocks: int | None,
        uuid: str | None,
        copy_on_read: bool,
    ) -> CowBdev:
        """Make the disk of an overlay that exists, and register both."""
        backing = await open_backing(path, base.block_size, readonly=False)
        try:
            if backing.readonly:
                raise OperationError(-errno.EROFS, f"overlay {path}: cannot be written")
            layout, bits = await asyncio.to_thread(overlay.load, path)
            overlay.check_base(path, layout, base)
            _check_same(
                path,
                layout,
                cluster_size=cluster_size,
                num_blocks=num_blocks,
                uuid=check_uuid(uuid or ""),
            )
            above = OverlayBdev(
                f"{name}.overlay",
                path,
                backing,
                uuid="",
                params={},
                method="bdev_uring_create",
                engine=choose_engine(backing),
            )
        except BaseException:
            os.close(backing.fd)
            raise
        await self._registry.register(above)
        try:
            disk = CowBdev(
                self._registry,
                name,
                base,
                above,
                layout=layout,
                bits=bits,
                copy_on_read=copy_on_read,
            )
            await self._registry.register(disk)
        except BaseException:
            await self._registry.remove(above.name)
            raise
        return disk

    @operation
    async def bdev_cow_delete(self, name: str) -> bool:
        """Delete a copy-on-write disk; its base and its overlay's file stay."""
        disk = self._registry.find_as(name, CowBdev)
        self._registry.check_free(disk.name)
        await disk.fill.stop()
        await self._registry.remove(disk.name, kind="cow")
        return True

    @operation
    async def bdev_cow_fill(self, name: str, action: Literal["start", "stop"] = "start") -> bool:
        """Start or stop copying all that the base has; ``bdev_get_bdevs`` shows the progress."""
        disk = self._registry.find_as(name, CowBdev)
        if action == "start":
            disk.fill.start()
        else:
            await disk.fill.stop()
        return True


def _make_overlay(
    path: str, base: Bdev, cluster_size: int | None, num_blocks: int | None, uuid: str | None
) -> bool:
    """Make the overlay's file if there is none: whether it was made."""
    if Path(path).exists():
        return False
    layout = Layout(
        cluster_size=cluster_size or overlay.DEFAULT_CLUSTER_SIZE,
        block_size=base.block_size,
        num_blocks=num_blocks or base.num_blocks,
        base_blocks=base.num_blocks,
        base_uuid=uuids.UUID(base.uuid),
        uuid=uuids.UUID(uuid) if uuid else uuids.uuid4(),
    )
    try:
        with contextlib.suppress(FileExistsError):  # meanwhile
            overlay.create(path, overlay.check_layout(layout))
            return True
    except OSError as error:
        code = error.errno or errno.EIO
        raise OperationError(-code, f"overlay {path}: {os.strerror(code)}") from None
    return False


@opener("cow")
def open_cow(context: OpenContext) -> CData:
    """Open a copy-on-write disk in a reactor."""
    args = context.args
    setup = ffi.new(
        "struct cow_setup *",
        {
            "base": context.bases[0],
            "overlay": context.bases[1],
            "base_blocks": args["base_blocks"],
            "block_count": args["num_blocks"],
            "owner": args["owner"],
            "copy_on_read": args["copy_on_read"],
            "map_fd": context.fds[0],
        },
    )
    return lib.cow_bdev_open(context.id, context.slot, setup)


@task("cow")
async def fill_clusters(context: TaskContext, args: dict[str, Any]) -> None:
    """Bring some clusters to the overlay."""
    code = await context.ended(
        lambda ident: lib.cow_fill_start(context.handle, ident, args["first"], args["end"]),
        "fill",
    )
    check(code, "fill")
