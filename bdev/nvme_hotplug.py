"""Drives that are plugged in while the program runs: found in sysfs, and attached."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from bdev.pci import VFIO_DRIVER, Sysfs
from reactor.errors import OperationError

log = logging.getLogger(__name__)

DEFAULT_PERIOD_US = 100_000
LONGEST_PERIOD_US = 10_000_000


def drives_of_vfio(sysfs: Sysfs) -> set[str]:
    """Return the addresses of the drives that vfio-pci has: nobody else uses these."""
    return {drive.address for drive in sysfs.nvme() if drive.driver == VFIO_DRIVER}


class Hotplug:
    """Attaches each drive that appears, once.

    A drive that was detached, or could not be attached, is left alone until vfio-pci has lost it:
    it was pulled out, or given back to the kernel's driver.
    """

    def __init__(
        self,
        attach: Callable[[str], Awaitable[None]],
        attached: Callable[[], set[str]],
        sysfs: Callable[[], Sysfs],
    ) -> None:
        self._sysfs = sysfs
        self._attach = attach
        self._attached = attached
        self._known: set[str] = set()  # drives that had their turn
        self._task: asyncio.Task[None] | None = None
        self.period_us = DEFAULT_PERIOD_US

    @property
    def enabled(self) -> bool:
        """Whether it is looking."""
        return self._task is not None

    def start(self, period_us: int) -> None:
        """Look now, and every ``period_us`` microseconds from now on."""
        self.stop()
        self.period_us = period_us
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Look no more; what is attached stays."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._known.clear()

    def leave(self, address: str) -> None:
        """Leave a drive alone, which is being detached, until it is plugged in again."""
        self._known.add(address)

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self.period_us / 1e6)

    async def look(self) -> None:
        """Attach what is new."""
        present = await asyncio.to_thread(drives_of_vfio, self._sysfs())
        self._known &= present
        for address in sorted(present - self._known - self._attached()):
            try:
                await self._attach(address)
            except (OperationError, OSError) as error:
                log.warning("%s was plugged in and is not attached: %s", address, error)
        self._known |= present
