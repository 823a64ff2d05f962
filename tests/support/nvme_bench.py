"""A bench with a software NVMe controller, attached the way an operator does."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from bdev import nvme
from bdev.io import BdevIO
from bdev.nvme_controller import Options
from reactor.native import ffi, lib
from tests.support.bdevs import Bench, on_bench
from tests.support.nvme_controller import SoftController, SoftDma, SoftTransport


class NvmeBench(Bench):
    """Names: controller Nvme0, device Nvme0n1."""

    def __init__(self, reactors: int = 1) -> None:
        super().__init__(reactors)
        self.soft = SoftController(SoftDma())
        self.transport = SoftTransport(self.soft)

    async def __aenter__(self) -> NvmeBench:
        await super().__aenter__()
        self._tasks.append(asyncio.create_task(self._step()))
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(mock.patch.dict(nvme.TRANSPORTS, PCIe=self._open))
        return self

    async def __aexit__(self, *exc: object) -> None:
        attached = (await self.rpc("bdev_nvme_get_controllers"))[:]
        for entry in attached:
            await self.close_all(entry["name"])
        self._stack.close()
        await super().__aexit__(*exc)
        assert not self.soft.dma.maps, "everything that was mapped for DMA has been unmapped"
        assert self.transport.closed or not self.transport.calls
        self.soft.close()

    async def close_all(self, name: str) -> None:
        for bdev in list(self.registry):
            for reactor in self.cluster.reactors:
                if bdev.id in reactor.handles:
                    await self.registry.close(bdev, reactor)
        await self.rpc("bdev_nvme_detach_controller", name=name)

    def _open(self, _address: str) -> SoftTransport:
        if self.transport.closed:
            self.transport = SoftTransport(self.soft, self.transport.vectors)
        return self.transport

    async def _step(self) -> None:
        while True:
            self.soft.step()
            await asyncio.sleep(0)

    async def attach(self, **params: Any) -> list[str]:
        return await self.rpc(
            "bdev_nvme_attach_controller", name="Nvme0", trtype="PCIe", traddr="01:00.0", **params
        )

    async def disk(self, reactor: int = 0, **params: Any) -> AsyncDisk:
        """Attach, if need be, and open the first namespace."""
        if not await self.rpc("bdev_nvme_get_controllers"):
            await self.attach(**params)
        return AsyncDisk(await self.open("Nvme0n1", reactor))

    @property
    def controller(self) -> Any:
        provider = self.operations.find("bdev_nvme_attach_controller").method.__self__
        return provider._attached["Nvme0"].controller

    async def entry(self) -> dict[str, Any]:
        return (await self.rpc("bdev_nvme_get_controllers"))[0]["ctrlrs"][0]

    def quick(self, **options: Any) -> None:
        """Have time-outs that a test can wait for."""
        provider = self.operations.find("bdev_nvme_attach_controller").method.__self__
        values = {"timeout_us": 20_000, "timeout_admin_us": 200_000, **options}
        provider._options = Options(**values)

    async def counters(self) -> dict[str, int]:
        """Return what is known of the first queue pair."""
        return dict((await self.entry())["queues"][0])

    async def until(self, condition: Callable[[], Any], turns: int = 200_000) -> None:
        for _ in range(turns):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("the condition has not come true")


class GuestMemory:
    """Memory that the device sees: ``at`` and ``length`` choose parts of it."""

    def __init__(self, bench: NvmeBench, size: int = 1 << 20) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self.dma = bench.soft.dma
        self.iova = self.dma.map(self.fd, 0, size)
        self._view = ffi.from_buffer("char[]", self.map)
        assert lib.dma_range_add(self._view, size, self.iova) == 0

    def part(self, at: int, length: int) -> memoryview:
        return memoryview(self.map)[at : at + length]

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.dma_range_remove(self._view)
        ffi.release(self._view)
        self.dma.unmap(self.iova)
        os.close(self.fd)


class AsyncDisk:
    """Requests, awaited while the loop turns reactors and controller."""

    def __init__(self, io: BdevIO) -> None:
        self.io = io

    def start(self, *args: Any, **kwargs: Any) -> Any:
        return self.io.start(*args, **kwargs)

    async def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        await self.io.start(nvme_op("READ"), offset, buffers=[buffer]).completed()
        return bytes(buffer)

    async def write(self, offset: int, *data: Any, flags: int = 0) -> None:
        await self.io.start(nvme_op("WRITE"), offset, buffers=data, flags=flags).completed()

    async def read_into(self, offset: int, *buffers: Any) -> None:
        await self.io.start(nvme_op("READ"), offset, buffers=list(buffers)).completed()

    async def do(
        self, op: str, offset: int = 0, length: int = 0, flags: int = 0, source: int = 0
    ) -> None:
        request = self.io.start(nvme_op(op), offset, length, flags=flags, source=source)
        await request.completed()


def nvme_op(name: str) -> Any:
    from bdev.kind import Op

    return Op[name]


def on_nvme(reactors: int = 1) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run a coroutine test with an :class:`NvmeBench` as ``bench``."""
    return on_bench(reactors, NvmeBench)
