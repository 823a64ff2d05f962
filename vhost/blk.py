"""The virtio-blk device (virtio 1.2, section 5.2) as front-ends see it: features and configuration.

Its requests are served by vhost/blk.c.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from bdev.kind import Bdev, Op
from reactor.errors import OperationError
from vhost.messages import MAX_FD_QUEUES, Feature, ProtocolError
from vhost.virtio_blk import SECTOR, WRITEBACK, BlkConfig, BlkFeature

SEG_MAX = 126  # buffers of data in one request; with header and status they fill a queue of 128
# Bytes a buffer. SeaBIOS keeps SEG_MAX * SIZE_MAX in blocks in 16 bits: with a product that has
# zeroes there it asks for nothing, for ever, and the machine does not boot.
SIZE_MAX = 256 << 10
MAX_DISCARD_SECTORS = (64 << 20) // SECTOR  # a segment: bounds how long one can hold a reactor
MAX_DISCARD_SEGMENTS = 16
SERIAL_LENGTH = 20  # bytes, section 5.2.6


ALWAYS = (
    Feature.VERSION_1
    # Drivers of virtio 0.9 take these two, and no VERSION_1; later ones leave them alone.
    | Feature.NOTIFY_ON_EMPTY
    | Feature.ANY_LAYOUT
    | Feature.RING_RESET  # the front-end stops one queue and starts it again
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.BLK_SIZE
    | BlkFeature.TOPOLOGY
    | BlkFeature.MQ
)


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What a guest is told of a disk. It outlives the bdev: a guest keeps what it was told."""

    block_size: int  # bytes
    num_blocks: int
    physical_block_size: int  # bytes
    readonly: bool
    flush: bool
    discard: bool
    write_zeroes: bool

    @classmethod
    def of(cls, bdev: Bdev, *, readonly: bool) -> DiskFacts:
        """Return the facts of a bdev, served read-only if it is or if that is asked for."""
        readonly = readonly or bdev.readonly
        return cls(
            block_size=bdev.block_size,
            num_blocks=bdev.num_blocks,
            physical_block_size=getattr(bdev, "physical_block_size", 0) or bdev.block_size,
            readonly=readonly,
            flush=Op.FLUSH in bdev.supported,
            discard=Op.UNMAP in bdev.supported and not readonly,
            write_zeroes=Op.WRITE_ZEROES in bdev.supported and not readonly,
        )

    def features(self) -> int:
        """Return the feature bits to offer."""
        wanted = {
            BlkFeature.RO: self.readonly,
            BlkFeature.FLUSH: self.flush,
            BlkFeature.CONFIG_WCE: self.flush and not self.readonly,
            BlkFeature.DISCARD: self.discard,
            BlkFeature.WRITE_ZEROES: self.write_zeroes,
        }
        return int(ALWAYS) | sum(int(bit) for bit, on in wanted.items() if on)

    def config(self, *, writeback: bool = True, queues: int = MAX_FD_QUEUES) -> bytes:
        """Return the configuration space."""
        sectors_a_block = self.block_size // SECTOR
        config = BlkConfig(
            capacity=self.num_blocks * sectors_a_block,
            size_max=SIZE_MAX,
            seg_max=SEG_MAX,
            cylinders=0,
            heads=0,
            sectors=0,
            blk_size=self.block_size,
            physical_block_exp=max(1, self.physical_block_size // self.block_size).bit_length() - 1,
            alignment_offset=0,
            min_io_size=1,
            opt_io_size=0,
            writeback=int(writeback),
            unused0=0,
            num_queues=queues,
            max_discard_sectors=MAX_DISCARD_SECTORS if self.discard else 0,
            max_discard_seg=MAX_DISCARD_SEGMENTS if self.discard else 0,
            discard_sector_alignment=sectors_a_block if self.discard else 0,
            max_write_zeroes_sectors=MAX_DISCARD_SECTORS if self.write_zeroes else 0,
            max_write_zeroes_seg=MAX_DISCARD_SEGMENTS if self.write_zeroes else 0,
            write_zeroes_may_unmap=int(self.write_zeroes and self.discard),
        )
        return config.to_bytes()


class Bdevs(Protocol):
    """The part of bdev.registry.BdevRegistry that is needed."""

    async def open(self, bdev: Bdev, reactor: Any) -> None:
        """Make sure that ``reactor`` has a handle, and count one more user of it."""

    async def close(self, bdev: Bdev, reactor: Any) -> None:
        """Count one user less."""

    def using(self, bdev: Bdev, reactor: Any) -> AbstractAsyncContextManager[None]:
        """Hold the device open in ``reactor`` for a while."""

    def on_removed(self, bdev: Bdev, callback: Callable[[Bdev], Awaitable[None]]) -> None:
        """Await the callback when the device has been drained, before it is closed."""

    def on_resized(self, bdev: Bdev, callback: Callable[[Bdev], Awaitable[None]]) -> None:
        """Await the callback when the size has changed."""

    def forget_callbacks(self, bdev: Bdev, *callbacks: Callable[[Bdev], Awaitable[None]]) -> None:
        """Call these no more."""


class BlkDevice:
    """A bdev as a virtio-blk device: a Device and a ServedDevice (vhost.interfaces).

    ``on_lost`` is awaited when the bdev is removed: after that no queue may use it. ``on_config``
    is called when the configuration space has changed.
    """

    virtio_id = 2

    def __init__(
        self,
        bdevs: Bdevs,
        bdev: Bdev,
        cpus: Collection[int],
        *,
        readonly: bool,
        packed_ring: bool,
        in_order: bool,
        serial: str,
        on_lost: Callable[[], Awaitable[None]],
        on_config: Callable[[], None],
        registered_buffers: bool = False,
    ) -> None:
        self.bdev: Bdev | None = bdev
        self.cpus = cpus
        self.readonly = readonly
        self.packed_ring = packed_ring
        self.in_order = in_order
        self.serial = serial
        self.asked_for_registered_buffers = registered_buffers
        self._bdevs = bdevs
        self._on_lost = on_lost
        self._on_config = on_config
        self._facts = DiskFacts.of(bdev, readonly=readonly)
        self._opened: dict[int, Bdev] = {bdev.id: bdev}
        bdevs.on_removed(bdev, self._removed)
        bdevs.on_resized(bdev, self._resized)

    @property
    def features(self) -> int:
        """See Device."""
        packed = Feature.RING_PACKED if self.packed_ring else 0
        return self._facts.features() | packed | (Feature.IN_ORDER if self.in_order else 0)

    def bdevs(self) -> list[Bdev]:
        """Return the disk, if it is there still."""
        return [] if self.bdev is None else [self.bdev]

    @property
    def registered_buffers(self) -> bool:
        """See ServedDevice; a device that would not use them does not get them."""
        useful = self.bdev is not None and self.bdev.uses_registered_memory
        return self.asked_for_registered_buffers and useful

    def config(self, features: int, written: Mapping[int, int], queues: int) -> bytes:
        """See Device; the cache mode means something only with CONFIG_WCE."""
        writeback = not features & BlkFeature.CONFIG_WCE or is_writeback(features, written)
        return self._facts.config(writeback=writeback, queues=queues)

    def accept_config(
        self, offset: int, data: bytes, features: int, queues: int, *, migration: bool
    ) -> dict[int, int]:
        """See Device: a guest can write the cache mode, if CONFIG_WCE was negotiated.

        The source of a migration may write everything, but change nothing else.
        """
        changes = {at: byte for at, byte in enumerate(data, offset) if at == WRITEBACK}
        switchable = bool(features & BlkFeature.CONFIG_WCE)
        if migration or (switchable and len(changes) == len(data)):
            expected = self.config(features, changes, queues)[offset : offset + len(data)]
            if data == expected:
                return changes if switchable else {}
        where = f"bytes {offset} to {offset + len(data) - 1} = {data[:64].hex()}"
        allowed = f"0 or 1 in byte {WRITEBACK} (writeback), after CONFIG_WCE was negotiated"
        raise ProtocolError("SET_CONFIG", "range", where, allowed, fatal=False)

    async def open(self, reactor: Any) -> int | None:
        """See ServedDevice; without a bdev, queues are served and their requests fail."""
        bdev = self.bdev
        if bdev is None:
            return None
        try:
            await self._bdevs.open(bdev, reactor)
        except OperationError as error:
            if error.code == -errno.ENODEV:
                return None  # it is being removed
            raise
        return bdev.id

    async def close(self, reactor: Any, handle: int) -> None:
        """See ServedDevice."""
        await self._bdevs.close(self._opened[handle], reactor)

    def queue_args(
        self, features: int, written: Mapping[int, int], slot: int, handle: int | None
    ) -> dict[str, Any]:
        """See ServedDevice."""
        return {
            "bdev": handle,
            "blk": {
                "slot": slot,
                "readonly": self._facts.readonly,
                "write_through": self._facts.flush and not is_writeback(features, written),
                "discard": bool(features & BlkFeature.DISCARD),
                "write_zeroes": bool(features & BlkFeature.WRITE_ZEROES),
                "max_discard_sectors": MAX_DISCARD_SECTORS,
                "max_discard_segments": MAX_DISCARD_SEGMENTS,
                "serial": self.serial,
            },
        }

    @property
    def facts(self) -> DiskFacts:
        """What guests are told."""
        return self._facts

    def facts_of(self, bdev: Bdev) -> DiskFacts:
        """Return what guests would be told if ``bdev`` were served."""
        return DiskFacts.of(bdev, readonly=self.readonly)

    def set_bdev(self, bdev: Bdev | None) -> None:
        """Be another bdev from now on, or none; queues keep theirs until they are left."""
        self.release()
        self.bdev = bdev
        if bdev is not None:
            self._opened[bdev.id] = bdev
            self._bdevs.on_removed(bdev, self._removed)
            self._bdevs.on_resized(bdev, self._resized)
            if self.facts_of(bdev) != self._facts:
                self._tell(bdev)

    @asynccontextmanager
    async def hold(self, reactor: Any) -> AsyncIterator[None]:
        """Have what is served open in a reactor for a while, unless it is being removed."""
        async with AsyncExitStack() as held:
            if self.bdev is not None:
                with suppress(OperationError):
                    await held.enter_async_context(self._bdevs.using(self.bdev, reactor))
            yield

    def hold_other(self, bdev: Bdev, reactor: Any) -> AbstractAsyncContextManager[None]:
        """Have another one open; raises what opening it fails with."""
        return self._bdevs.using(bdev, reactor)

    def release(self) -> None:
        """Have no more to do with the bdev; no queue is served."""
        if self.bdev is not None:
            self._bdevs.forget_callbacks(self.bdev, self._removed, self._resized)
            self.bdev = None

    async def _removed(self, _: Bdev) -> None:
        self.bdev = None
        await self._on_lost()

    async def _resized(self, bdev: Bdev) -> None:
        self._tell(bdev)

    def _tell(self, bdev: Bdev) -> None:
        self._facts = DiskFacts.of(bdev, readonly=self.readonly)
        self._on_config()


def is_writeback(features: int, written: Mapping[int, int]) -> bool:
    """Tell whether a completed write may be lost until a flush: section 5.2.6.2.

    A driver that can neither flush nor choose the cache mode relies on a completed write.
    """
    flushes = bool(features & BlkFeature.FLUSH)
    if features & BlkFeature.CONFIG_WCE:
        return bool(written.get(WRITEBACK, flushes))
    return flushes


def check_serial(serial: str, default: str) -> str:
    """Return what GET_ID answers: ``serial``, or as much of ``default`` as fits if that is empty.

    Raises ValueError for a serial number that has more than 20 bytes or is not ASCII.
    """
    if not serial:
        return default.encode("ascii", "replace")[:SERIAL_LENGTH].decode()
    if not serial.isascii() or not serial.isprintable() or len(serial) > SERIAL_LENGTH:
        raise ValueError(
            f"serial {serial[:40]!r}: must have at most {SERIAL_LENGTH} printable ASCII characters"
        )
    return serial
