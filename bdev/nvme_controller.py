"""One NVMe controller: bring-up, reset, supervision and shutdown (Base 3.5 to 3.7)."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from bdev.nvme_admin import AdminQueue, identify, log_page, set_features
from bdev.nvme_identify import (
    Capabilities,
    Identity,
    Namespace,
    check_capabilities,
    parse_controller,
    parse_health,
    read_capabilities,
)
from bdev.nvme_power import Power
from bdev.nvme_queues import Cluster, QueuePair, QueuePairs
from bdev.nvme_scan import IDENTIFY_CONTROLLER, scan
from bdev.nvme_transport import (
    PAGE,
    ControllerError,
    DmaMemory,
    Registers,
    Transport,
)
from bdev.nvme_watch import Watch
from reactor.errors import OperationError
from reactor.native import lib

log = logging.getLogger(__name__)

_FEATURE_ASYNC_EVENTS = 0x0B
_HEALTH_EVENTS, _NAMESPACE_EVENTS = 0x1F, 0x100
_LOG_ERROR, _LOG_HEALTH, _LOG_NAMESPACES = 0x01, 0x02, 0x04
_EVENT_NOTICE, _NOTICE_NAMESPACES = 2, 0


@dataclass(frozen=True)
class Options:
    """``bdev_nvme_set_options``, of those that mean something to a PCIe controller."""

    action_on_timeout: Literal["none", "reset", "abort"] = "abort"
    timeout_us: int = 30_000_000  # of a command from submission; 0: none
    timeout_admin_us: int = 10_000_000
    bdev_retry_count: int = 3


class NvmeController:
    """A controller that this process owns.

    ``changed`` is awaited with the controller when its namespaces may have changed, and after
    ``failed`` has become true.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        cluster: Cluster,
        options: Options,
        changed: Callable[[Any], Awaitable[None]],
        *,
        queues: int,
        interrupts: bool = True,
        direct: bool = True,
    ) -> None:
        self.name = name
        self.transport = transport
        self.options = options
        self.direct = direct
        self.failed = ""  # why, once the controller is given up
        self.gone = False  # pulled out, or wanted back
        self.resets = 0
        self._changed = changed
        self._lock = asyncio.Lock()  # bring-up, reset, detach: one at a time
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.registers = Registers(transport)
        try:
            self.admin = AdminQueue(self.registers, transport.dma)
        except BaseException:
            self.registers.close()
            raise
        self.power = Power(self.registers)
        self.watch = Watch(self)
        self._data = DmaMemory(transport.dma, "nvme-identify", PAGE)
        self._data_lock = asyncio.Lock()
        self.queues = QueuePairs(
            transport, self.admin, cluster, wanted=queues, interrupts=interrupts
        )
        self.capabilities: Capabilities  # both from start() on
        self.identity: Identity
        self.namespaces: dict[int, Namespace] = {}
        self.refused: dict[int, str] = {}  # namespaces that cannot be served, and why

    @property
    def busy(self) -> bool:
        """Whether a reset or the end is under way."""
        return self._lock.locked()

    # --- bring-up

    async def start(self) -> None:
        """Bring the controller up; ControllerError if it does not come, and it is left disabled."""
        try:
            await self._bring_up()
            self.namespaces = await self._scan()
            if not self.namespaces and self.refused:
                raise ControllerError("; ".join(self.refused.values()), -errno.ENOTSUP)
        except BaseException:
            await self.close()
            raise
        self._loop = asyncio.get_running_loop()
        if self.queues.admin_interrupt >= 0:
            self._loop.add_reader(self.queues.admin_interrupt, self._interrupted)
        self.watch.begin(self._loop)
        self._tasks.append(asyncio.create_task(self.watch.run()))

    async def _bring_up(self) -> None:
        self.capabilities = read_capabilities(self.registers.read64(lib.NVME_REG_CAP))
        self.power.use(self.capabilities)
        check_capabilities(self.capabilities)
        self._check_doorbells(1)
        self.queues.stride = self.capabilities.stride
        self.queues.timeout = self.options.timeout_admin_us / 1e6 or 60.0
        await self.power.disable()
        self.transport.enable()
        self.admin.install(self.capabilities.stride)
        await self.power.enable()
        self.identity = parse_controller(
            await self._fetch("Identify Controller", identify(IDENTIFY_CONTROLLER, 0, 0))
        )
        await self.queues.negotiate(self.capabilities.max_entries)
        self._check_doorbells(self.queues.limit + 1)
        await self._use_shadow_doorbells()
        await self._ask_for_events()

    def _check_doorbells(self, queues: int) -> None:
        end = lib.NVME_REG_DOORBELLS + 2 * queues * self.capabilities.stride
        if end > self.registers.size:
            raise ControllerError(
                f"doorbells of {queues} queues end at {end:#x}, past BAR 0 of "
                f"{self.registers.size:#x} bytes"
            )

    async def _fetch(self, what: str, command: dict[str, int]) -> bytes:
        """Run a command that fills a page, and return the page."""
        async with self._data_lock:
            self._data.clear()
            fields = {**command, "prp1": self._data.iova}
            await self.admin.run(what, self.queues.timeout, **fields)
            return self._data.bytes(0, PAGE)

    async def _use_shadow_doorbells(self) -> None:
        """Where the controller (an emulated one) has them, most doorbell writes are spared."""
        fits = 2 * (self.queues.limit + 1) * self.capabilities.stride <= PAGE
        if not self.identity.shadow_doorbells or not fits:
            return
        if self.queues.shadow is None:
            self.queues.shadow = DmaMemory(self.transport.dma, "nvme-doorbells", 2 * PAGE)
        shadow = self.queues.shadow
        shadow.clear()
        await self.admin.run(
            "Doorbell Buffer Config",
            self.queues.timeout,
            opcode=lib.NVME_ADMIN_DOORBELL_BUFFER,
            prp1=shadow.iova,
            prp2=shadow.iova + PAGE,
        )

    # --- namespaces

    async def _scan(self) -> dict[int, Namespace]:
        """Return the namespaces that can be served; ``refused`` has the others."""
        found, self.refused = await scan(self._fetch, self.identity)
        for reason in self.refused.values():
            log.warning("%s: %s", self.name, reason)
        return found

    async def rescan(self) -> None:
        """Look at the namespaces again, and let the owner know."""
        self.namespaces = await self._scan()
        await self._changed(self)

    async def health(self) -> dict[str, Any]:
        """Return the SMART / Health Information log."""
        page = await self._fetch("reading the health log", log_page(_LOG_HEALTH, 512, 0))
        return dict(parse_health(page[:512]))

    # --- events

    async def _ask_for_events(self) -> None:
        wanted = _HEALTH_EVENTS | (_NAMESPACE_EVENTS if self.identity.namespace_events else 0)
        await self.admin.run(
            "asking for events", self.queues.timeout, **set_features(_FEATURE_ASYNC_EVENTS, wanted)
        )
        await self._next_event()

    async def _next_event(self) -> None:
        future = await self.admin.submit(
            "Asynchronous Event Request", opcode=lib.NVME_ADMIN_ASYNC_EVENT
        )
        future.add_done_callback(self._event_came)

    def _event_came(self, future: asyncio.Future[int]) -> None:
        if future.cancelled() or future.exception() is not None or self._closed:
            return  # a reset asks again
        self.run_beside(self._handle_event(future.result()))

    async def _handle_event(self, result: int) -> None:
        kind, info, page = result & 7, result >> 8 & 0xFF, result >> 16 & 0xFF
        if page in (_LOG_ERROR, _LOG_HEALTH, _LOG_NAMESPACES):
            # Reading the log is what lets the next event of this type come (Base 5.2).
            await self._fetch(f"reading log page {page:#x}", log_page(page, 512, 0))
        await self._next_event()
        if kind == _EVENT_NOTICE and info == _NOTICE_NAMESPACES:
            log.info("%s: its namespaces have changed", self.name)
            await self.rescan()
        else:
            log.warning("%s: event of type %d, %#x; see its health log", self.name, kind, info)

    def _interrupted(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.queues.admin_interrupt)
        self.poll_admin()

    def poll_admin(self) -> None:
        """Take what the admin queue has completed."""
        try:
            self.admin.poll()
        except ControllerError as error:
            self.run_beside(self.reset(error.message))

    def run_beside(self, job: Any) -> None:
        """Run a coroutine beside everything else; what it fails with is logged."""

        async def run() -> None:
            try:
                await job
            except OperationError as error:
                log.warning("%s: %s", self.name, error.message)
            except Exception:
                log.exception("%s: a fault of this program", self.name)

        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(run()))

    # --- reset, removal, end

    async def reset(self, why: str) -> None:
        """Reset the controller; what was in flight is submitted again. ControllerError if it fails.

        A controller that had been given up gets another chance.
        """
        if self._lock.locked():
            return  # one is under way
        async with self._lock:
            if self._closed:
                return
            log.warning("%s: reset: %s", self.name, why)
            self.resets += 1
            try:
                await self.queues.pause()
                before = self.identity.serial
                await self._bring_up()
                if self.identity.serial != before:
                    raise ControllerError(f"serial number {self.identity.serial!r} was {before!r}")
                await self.queues.remake()
                self.failed = ""
            except (OperationError, OSError) as error:
                text = error.message if isinstance(error, OperationError) else str(error)
                await self._fail(f"reset failed: {text}")
                raise ControllerError(f"{self.name}: {self.failed}") from error
        await self.rescan()

    async def fence(self, reactor: Any) -> None:
        """Return when no command of a reactor that died can do anything any more."""
        while True:
            try:
                await self.queues.fence(reactor)
            except ControllerError as error:
                why = error.message
            else:
                return
            if not self._lock.locked():
                break
            async with self._lock:
                pass  # a reset under way ends them, too, but not before it is over
        with contextlib.suppress(ControllerError):  # one that fails stops the device's DMA
            await self.reset(why)

    async def give_up(self, why: str) -> None:
        """Fail everything on a device that was pulled out, and have the owner forget it."""
        self.gone = True
        async with self._lock:
            await self._fail(why)
        await self._changed(self)

    async def hand_back(self) -> None:
        """Have the owner drain and forget a device that somebody wants, and that is still there."""
        self.gone = True
        log.warning("%s: the kernel wants %s back", self.name, self.transport.address)
        try:
            await self._changed(self)
        except BaseException:
            self.gone = False  # the kernel asks again
            raise

    async def _fail(self, why: str) -> None:
        """Make sure that the device touches no memory, and have every request fail."""
        self.failed = why
        log.error("%s: given up: %s", self.name, why)
        with contextlib.suppress(OSError, OperationError):
            self.transport.quiesce()
        self.admin.abandon(why)
        await self.queues.fail()

    def setup(self, pair: QueuePair, namespace: Namespace) -> tuple[dict[str, Any], list[int]]:
        """Return what a reactor needs to open a namespace: arguments and descriptors."""
        registers, offset, size = self.transport.registers
        at = lib.NVME_REG_DOORBELLS + 2 * pair.qid * self.capabilities.stride
        identity = self.identity
        queue = {
            "key": pair.key,
            "depth": pair.depth,
            "bounces": (pair.layout.zeroes - pair.layout.bounce) // lib.NVME_BOUNCE_SIZE,
            "iova": pair.memory.iova,
            "registers_offset": offset,
            "registers_size": size,
            "submission_doorbell": at,
            "completion_doorbell": at + self.capabilities.stride,
            "retries": self.options.bdev_retry_count,
            "direct": self.direct,
            "sgl": identity.sgl,
        }
        disk = {
            "nsid": namespace.nsid,
            "block_size": namespace.block_size,
            "block_count": namespace.num_blocks,
            "max_transfer": identity.max_transfer,
            "readonly": namespace.readonly,
            "unmap": identity.unmap,
            "write_zeroes": identity.write_zeroes,
            "cache": identity.cache,
            "compare": identity.compare,
            "verify": identity.verify,
            "copy_blocks": namespace.copy_blocks if identity.copy else 0,
            "copy_range_blocks": namespace.copy_range_blocks,
            "copy_ranges": namespace.copy_ranges,
        }
        fds = [pair.memory.fd, registers]
        shadow = self.queues.shadow
        optional = {"interrupt": pair.interrupt, "shadow": shadow.fd if shadow else -1}
        present = {name: fd for name, fd in optional.items() if fd >= 0}
        return {"queue": queue, "disk": disk, "with": list(present)}, [*fds, *present.values()]

    async def close(self) -> None:
        """Shut the controller down and let go of the device; reactors fail what they still have."""
        if self._closed:
            return
        self._stop_watching()
        async with self._lock:
            with contextlib.suppress(OperationError, OSError):
                await self.queues.pause()
            with contextlib.suppress(OperationError, OSError):
                await self.power.shut_down(notify=not self.failed)
            with contextlib.suppress(OSError, OperationError):
                self.transport.quiesce()
            self.admin.abandon("the controller was detached")
            await self.queues.detach()
            self.release()

    def _stop_watching(self) -> None:
        self._closed = True
        if self.queues.admin_interrupt >= 0 and self._loop is not None:
            self._loop.remove_reader(self.queues.admin_interrupt)
        for task in self._tasks:
            if task is not asyncio.current_task(self._loop):
                task.cancel()

    def close_now(self) -> None:
        """Do as close() does, at the end of the process, when no reactor is left."""
        if self._closed:
            return
        self._stop_watching()
        with contextlib.suppress(OperationError):
            self.power.shut_down_now(notify=not self.failed)
        with contextlib.suppress(OSError, OperationError):
            self.transport.quiesce()
        self.release()

    def release(self) -> None:
        """Give memory, registers and the device back."""
        self.watch.end()
        self.admin.close()
        self._data.close()
        self.registers.close()
        self.queues.release()
        self.transport.close()
