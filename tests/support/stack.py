"""The whole target in one event loop: real reactor processes, bdevs, and controllers on sockets."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from bdev.kind import make_providers
from bdev.registry import BdevRegistry
from reactor.cluster import Cluster
from reactor.events import Node
from reactor.operations import Operations
from reactor.stats import SlotAllocator
from vhost.frontend import BlkFrontend
from vhost.management import VhostManagement
from vhost.scsi_service import VhostScsiService
from vhost.service import VhostService

LOAD = ("bdev.worker", "vhost.worker")
CPUS = sorted(os.sched_getaffinity(0))

T = TypeVar("T")


class Stack:
    """What a control process consists of, without its command line."""

    def __init__(self, folder: str, cpus: Iterable[int], state_dir: Path | None = None) -> None:
        self.folder = folder
        self.operations = Operations()
        self.cluster = Cluster(folder, cpus, load=LOAD)
        slots = SlotAllocator()
        self.registry = BdevRegistry(self.cluster, slots)
        self.cluster.on_lost(self.registry.reactor_lost)  # before the controllers hear of it
        self.vhost = VhostService(folder, self.cluster, self.registry, slots)
        self.scsi = VhostScsiService(self.vhost, self.cluster, self.registry, state_dir)
        self.management = VhostManagement(self.vhost)
        self.operations.add(self.vhost, self.scsi, self.management)
        self.operations.add(*make_providers(self.registry))
        self.node = Node(folder, "control", self.operations)

    async def call(self, op: str, **args: Any) -> Any:
        """Run an operation as a client would."""
        return await self.operations.invoke(op, args)

    def socket(self, name: str) -> str:
        """Return the path of a controller's socket."""
        return os.path.join(self.folder, name)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what a guest does, which blocks, beside the event loop that serves it."""
        async with asyncio.timeout(30):
            return await asyncio.to_thread(work)

    async def connect(self, name: str, **options: Any) -> BlkFrontend:
        """Return a front-end that is connected to a controller; see ``close``."""
        return await self.in_thread(lambda: BlkFrontend.connect(self.socket(name), **options))

    async def close(self, *fronts: BlkFrontend) -> None:
        """Close front-ends and wait until their sessions are gone."""
        gone = len(self.sessions()) - len(fronts)
        for front in fronts:
            await self.in_thread(front.close)
        await self.until(lambda: len(self.sessions()) <= gone)

    def sessions(self) -> list[dict[str, Any]]:
        """Return the descriptions of all sessions."""
        controllers = self.vhost.vhost_get_controllers()
        return [session for controller in controllers for session in controller["sessions"]]

    async def until(self, condition: Callable[[], bool], limit: float = 10) -> None:
        """Return once something has come true that nobody tells us of."""
        async with asyncio.timeout(limit):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@asynccontextmanager
async def stack(
    cpus: Iterable[int] = CPUS[:1], state_dir: Path | None = None
) -> AsyncIterator[Stack]:
    """Run the target on ``cpus`` and end it in order."""
    with tempfile.TemporaryDirectory(prefix="vr-") as folder:
        made = Stack(folder, cpus, state_dir)
        made.node.start()
        await made.cluster.start()
        try:
            yield made
        finally:
            await made.vhost.stop()
            await made.cluster.stop()
            made.node.close()
            made.registry.close_all()
