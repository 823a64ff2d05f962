"""Block devices without processes: real handles in real poll loops, behind a transport of calls."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from bdev import fence
from bdev.io import BdevIO
from bdev.kind import Bdev, make_providers, make_worker_providers
from bdev.registry import BdevRegistry
from bdev.worker import BdevWorker, FenceOperations
from reactor.errors import OperationError, to_operation_error
from reactor.loop import NoticeHandler, PollSelector
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, Operations
from reactor.stats import SlotAllocator, StatsArea
from reactor.vault import NoVault

SLOTS = 64


class LocalReactor:
    """What a reactor process has for bdevs, in this process: it turns when the loop is idle."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = self.cpu = number
        self.stats = StatsArea.create(SLOTS)
        self.start()

    def start(self) -> None:
        self.selector = PollSelector("never", area=self.stats.address, slots=SLOTS)
        self.handles: dict[int, CData] = {}
        self.operations = Operations()
        self.operations.add(BdevWorker(self, self.handles, self.tell))  # type: ignore[arg-type]
        self.operations.add(FenceOperations(self))  # type: ignore[arg-type]
        self.operations.add(*make_worker_providers())
        self.sent: dict[int, FileDescriptors] = {}
        self.calls: list[str] = []
        self.told: list[tuple[str, dict[str, Any]]] = []  # to the control process
        self.alive = True

    @property
    def native(self) -> CData:
        return self.selector.native

    def tell(self, op: str, args: dict[str, Any]) -> None:
        self.told.append((op, args))

    def on_notice(self, source: int, handler: NoticeHandler | None) -> None:
        if handler is None:
            self.selector.notice_handlers.pop(source, None)
        else:
            self.selector.notice_handlers[source] = handler

    @property
    def loop(self) -> LocalReactor:
        return self

    def send_fds(self, tag: int, fds: Sequence[int]) -> None:
        self.sent[tag] = FileDescriptors([os.dup(fd) for fd in fds])

    async def turn_forever(self) -> None:
        while True:
            if self.alive:
                self.selector.select(0)
            await asyncio.sleep(0)

    def io(self, bdev: Bdev) -> BdevIO:
        return BdevIO(self.selector, self.handles[bdev.id])

    async def stop(self) -> None:
        for ident in list(self.handles):
            await self.operations.invoke("bdev_close", {"id": ident})
        self.selector.close()
        self.alive = False


class LocalCluster:
    """``reactor.cluster.Cluster`` as far as the registry knows it."""

    def __init__(self, count: int) -> None:
        self.vault = NoVault()
        self.reactors = [LocalReactor(f"reactor-{i}", i) for i in range(count)]
        self.everyone = self.counting = self.reactors
        self.refuse: dict[str, OperationError] = {}
        self.modules: list[str] = []

    async def call(
        self,
        reactor: LocalReactor,
        op: str,
        args: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        timeout: float | None = 10.0,
    ) -> Any:
        await asyncio.sleep(0)  # as any message, it takes its time
        if op in self.refuse:
            raise self.refuse[op]
        reactor.calls.append(op)
        wire = msgpack.unpackb(msgpack.packb(args or {}))
        sent = FileDescriptors([os.dup(fd) for fd in fds])
        try:
            async with asyncio.timeout(timeout):
                return await reactor.operations.invoke(op, wire, sent or None)
        except (OSError, OperationError) as error:
            raise to_operation_error(error) from None

    async def call_for_fds(
        self, reactor: LocalReactor, op: str, count: int, timeout: float = 10.0
    ) -> tuple[Any, FileDescriptors]:
        result = await self.call(reactor, op, {"tag": 7}, timeout=timeout)
        fds = reactor.sent.pop(7)
        assert len(fds) == count
        return result, fds


class Bench:
    """A registry on a local cluster, and the operations that clients reach."""

    def __init__(self, reactors: int = 1) -> None:
        self.cluster = LocalCluster(reactors)
        self.slots = SlotAllocator(SLOTS)
        self.registry = BdevRegistry(self.cluster, self.slots)
        self.operations = Operations()
        self.operations.add(*make_providers(self.registry))
        self._tasks: list[asyncio.Task[None]] = []
        self.temporary: list[tempfile.TemporaryDirectory[str]] = []  # that go with the bench

    async def __aenter__(self) -> Bench:
        self._tasks = [asyncio.create_task(r.turn_forever()) for r in self.cluster.reactors]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for reactor in self.cluster.reactors:
            if reactor.alive:
                await reactor.stop()
            reactor.stats.close()
            fence.forget(reactor)
        self.registry.close_all()
        for folder in self.temporary:
            folder.cleanup()

    @property
    def reactor(self) -> LocalReactor:
        return self.cluster.reactors[0]

    async def rpc(self, method: str, **params: Any) -> Any:
        return await self.operations.invoke(method, params)

    async def open(self, name: str, reactor: int = 0) -> BdevIO:
        bdev, at = self.registry.find(name), self.cluster.reactors[reactor]
        await self.registry.open(bdev, at)  # type: ignore[arg-type]
        return at.io(bdev)

    async def close(self, name: str, reactor: int = 0) -> None:
        bdev, at = self.registry.find(name), self.cluster.reactors[reactor]
        await self.registry.close(bdev, at)  # type: ignore[arg-type]


def pages(size: int) -> mmap.mmap:
    """Return page-aligned memory."""
    return mmap.mmap(-1, size)


def on_bench(
    reactors: int = 1, make: Callable[[int], contextlib.AbstractAsyncContextManager[Any]] = Bench
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run a coroutine test in an event loop of its own, with what ``make`` returns as ``bench``."""

    def mark(test: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            async def main() -> None:
                async with make(reactors) as bench:
                    await test(bench=bench, **fixtures)

            asyncio.run(main())

        signature = inspect.signature(test)
        left = [p for p in signature.parameters.values() if p.name != "bench"]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return mark


class LocalDisk:
    """One handle in a poll loop of its own, without a registry."""

    ID = 77

    def __init__(self, open_handle: Callable[[CData], CData]) -> None:
        self.slot = 0
        self.stats_area = StatsArea.create(SLOTS)
        self.selector = PollSelector("never", area=self.stats_area.address, slots=SLOTS)
        self.handle = open_handle(self.selector.native)
        if self.handle == ffi.NULL:
            number = ffi.errno
            self._close_reactor()
            raise OSError(number, os.strerror(number))
        self.io = BdevIO(self.selector, self.handle)
        self.notices: list[str] = []
        self.selector.notice_handlers[self.ID] = lambda _k, _c, text: self.notices.append(text)

    @property
    def stats(self) -> CData:
        return self.stats_area.slot(self.slot, "struct bdev_stats")

    def poll(self) -> None:
        self.selector.select(0)

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        self.poll()
        assert lib.bdev_close(self.handle) == 0
        then()
        self._close_reactor()

    def _close_reactor(self) -> None:
        self.selector.close()
        self.stats_area.close()


def null_disk(blocks: int = 1000) -> LocalDisk:
    return LocalDisk(lambda native: lib.null_bdev_open(native, LocalDisk.ID, 0, 512, blocks))


def malloc_disk(fd: int, blocks: int, page_size: int = 0) -> LocalDisk:
    return LocalDisk(
        lambda native: lib.malloc_bdev_open(native, LocalDisk.ID, 0, 512, blocks, fd, page_size)
    )


def file_disk(path: Path, *, direct: bool = True, block_size: int = 512, **setup: Any) -> LocalDisk:
    """Open a handle on a file, as it is; ``setup`` overrides members of ``struct file_setup``."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    values = {
        "fd": setup["fd"] if "fd" in setup else os.open(path, flags),
        "block_size": block_size,
        "block_count": os.path.getsize(path) // block_size,
        "memory_alignment": 512 if direct else 1,
        "offset_alignment": 512 if direct else 1,
        "unmap": True,
        **setup,
    }
    native = ffi.new("struct file_setup *", values)
    return LocalDisk(lambda reactor: lib.file_bdev_open(reactor, LocalDisk.ID, 0, native))
