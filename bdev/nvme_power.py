"""Enabling, disabling and shutting down a controller: CC and CSTS (Base 3.5, 3.6)."""

import asyncio
import contextlib
import errno
import time

from bdev.nvme_identify import Capabilities
from bdev.nvme_transport import ControllerError, Registers
from reactor.native import lib

_SHUTDOWN_TIMEOUT = 5.0  # seconds
_POLL_DELAY = 0.005  # seconds between looks at CSTS


class Power:
    """The state of one controller."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers
        self.ready_timeout = 0.5  # seconds

    def use(self, capabilities: Capabilities) -> None:
        """Take the time limit that the controller asks for."""
        self.ready_timeout = capabilities.timeout

    async def enable(self) -> None:
        """Set CC.EN, and wait until the controller is ready."""
        self._registers.write32(lib.NVME_REG_CC, lib.NVME_CC_ENTRY_SIZES | lib.NVME_CC_ENABLE)
        await self._wait_ready(True)

    async def disable(self) -> None:
        """Clear CC.EN and wait until the controller has forgotten everything (Base 3.5.1)."""
        cc = self._registers.read32(lib.NVME_REG_CC)
        if cc & lib.NVME_CC_ENABLE:
            # It must not be cleared while the controller is still on its way to ready.
            if not self._registers.read32(lib.NVME_REG_CSTS) & lib.NVME_CSTS_FATAL:
                with contextlib.suppress(ControllerError):
                    await self._wait_ready(True)
            self._registers.write32(
                lib.NVME_REG_CC, cc & ~lib.NVME_CC_ENABLE & ~lib.NVME_CC_SHUTDOWN_MASK
            )
        await self._wait_ready(False)

    async def _wait_ready(self, ready: bool) -> None:
        """Wait for CSTS.RDY to follow CC.EN, as long as CAP.TO allows."""
        deadline = time.monotonic() + self.ready_timeout
        while True:
            csts = self._registers.read32(lib.NVME_REG_CSTS)
            if ready and csts & lib.NVME_CSTS_FATAL:
                raise ControllerError(f"CSTS {csts:#x}: the controller reports a fatal error")
            if bool(csts & lib.NVME_CSTS_READY) == ready:
                return
            if time.monotonic() >= deadline:
                state = "ready" if ready else "disabled"
                raise ControllerError(
                    f"CSTS {csts:#x}: not {state} in the {self.ready_timeout:g} s of CAP.TO",
                    -errno.ETIMEDOUT,
                )
            await asyncio.sleep(_POLL_DELAY)

    async def shut_down(self, *, notify: bool) -> None:
        """Have the drive save what it holds in volatile memory, if ``notify``, then disable it."""
        if notify and self._begin_shutdown():
            deadline = time.monotonic() + _SHUTDOWN_TIMEOUT
            while not self._shutdown_done() and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_DELAY)
        await self.disable()

    def _begin_shutdown(self) -> bool:
        """Notify the controller; returns whether it is in a state to take notice."""
        cc = self._registers.read32(lib.NVME_REG_CC)
        if not cc & lib.NVME_CC_ENABLE:
            return False
        value = cc & ~lib.NVME_CC_SHUTDOWN_MASK | lib.NVME_CC_SHUTDOWN_NORMAL
        self._registers.write32(lib.NVME_REG_CC, value)
        return True

    def _shutdown_done(self) -> bool:
        csts = self._registers.read32(lib.NVME_REG_CSTS)
        return bool(csts & lib.NVME_CSTS_SHUTDOWN_MASK == lib.NVME_CSTS_SHUTDOWN_DONE)

    def shut_down_now(self, *, notify: bool) -> None:
        """Do the same at the end of the process, without an event loop."""
        if notify and self._begin_shutdown():
            deadline = time.monotonic() + _SHUTDOWN_TIMEOUT
            while not self._shutdown_done() and time.monotonic() < deadline:
                time.sleep(_POLL_DELAY)
