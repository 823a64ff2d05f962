"""Supervision of one controller: it is looked at twice a second, and helped where it needs help."""

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

from bdev.nvme_admin import CommandError
from bdev.nvme_queues import QueuePair
from bdev.nvme_transport import DeviceGoneError
from reactor.errors import OperationError
from reactor.native import ffi, lib

if TYPE_CHECKING:
    from bdev.nvme_controller import NvmeController

log = logging.getLogger(__name__)

_PERIOD = 0.5  # seconds


class Watch:
    """Finds a device that is gone, fatal errors, queues that stopped, and commands that hang."""

    def __init__(self, controller: "NvmeController") -> None:
        self._controller = controller
        self._loop: asyncio.AbstractEventLoop | None = None
        self._request = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen to the kernel, which asks for a device that is to be removed or unbound."""
        self._loop = loop
        self._controller.transport.set_request(self._request)
        loop.add_reader(self._request, self._requested)

    def _requested(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._request)
        if not self._controller.gone:  # it goes on asking until it has the device
            self._controller.run_beside(self._controller.hand_back())

    def end(self) -> None:
        """Listen no more."""
        if self._request >= 0:
            if self._loop is not None:
                self._loop.remove_reader(self._request)
            os.close(self._request)
            self._request = -1

    async def run(self) -> None:
        """Look after the controller for good."""
        controller = self._controller
        while True:
            await asyncio.sleep(_PERIOD)
            if not controller.failed and not controller.busy:
                try:
                    await self.check()
                except OperationError as error:
                    log.warning("%s: %s", controller.name, error.message)

    async def check(self) -> None:
        """Look after the controller: once every half a second."""
        controller = self._controller
        try:
            csts = controller.registers.read32(lib.NVME_REG_CSTS)
        except DeviceGoneError as error:
            await controller.give_up(error.message)
            return
        controller.poll_admin()
        if csts & lib.NVME_CSTS_FATAL:
            await controller.reset(f"CSTS {csts:#x}: the controller reports a fatal error")
            return
        for pair in controller.queues:
            if pair.watch.broken:
                text = bytes(ffi.buffer(pair.watch.text)).split(b"\0")[0].decode(errors="replace")
                await controller.reset(f"queue {pair.qid}: {text}")
                return
            if await self._check_times(pair):
                return

    async def _check_times(self, pair: QueuePair) -> bool:
        """Abort commands that take too long; reset (and return True) when that is no help."""
        controller = self._controller
        limit = controller.options.timeout_us
        if not limit or controller.options.action_on_timeout == "none":
            return False
        now, rate = lib.reactor_ticks(), lib.reactor_tick_rate()
        overdue = {}
        for cid, start in enumerate(pair.started()):
            age = (now - start) * 1_000_000 // rate if start else 0
            if age > limit:
                overdue[cid] = start
                once = pair.aborted.get(cid) == start
                if controller.options.action_on_timeout == "reset" or (once and age > 2 * limit):
                    await controller.reset(
                        f"queue {pair.qid}: command {cid} takes {age // 1000} ms"
                    )
                    return True
        new = [cid for cid, start in overdue.items() if pair.aborted.get(cid) != start]
        pair.aborted = {cid: s for cid, s in overdue.items() if pair.aborted.get(cid) == s}
        for cid in new[: controller.identity.abort_limit]:
            log.warning(
                "%s: queue %d: command %d is overdue: abort", controller.name, pair.qid, cid
            )
            pair.aborted[cid] = overdue[cid]
            await self._abort(pair, cid)
        return False

    async def _abort(self, pair: QueuePair, cid: int) -> None:
        controller = self._controller
        try:
            await controller.admin.run(
                f"aborting command {cid} of queue {pair.qid}",
                controller.queues.timeout,
                opcode=lib.NVME_ADMIN_ABORT,
                cdw10=cid << 16 | pair.qid,
            )
        except CommandError as error:
            log.warning("%s: %s", controller.name, error.message)
