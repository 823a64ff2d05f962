"""NVMe controllers that do not make sense, and requests that make none: clear errors, no damage."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest

from bdev.kind import Op
from reactor.errors import OperationError
from tests.support.descriptors import open_fds
from tests.support.nvme_bench import AsyncDisk, NvmeBench, on_nvme
from tests.support.nvme_controller import CC, Faults, Namespace, SoftController


def broken_at_start(soft: SoftController, what: str) -> None:
    faults, one = soft.faults, soft.namespaces[1]
    changes: dict[str, Callable[[], Any]] = {
        "not ready": lambda: setattr(faults, "never_ready", True),
        "fatal error": lambda: setattr(faults, "fatal", True),
        "the device is gone": lambda: setattr(faults, "gone", True) or soft.step(),
        "queues of one entry": lambda: setattr(soft, "max_entries", 1),
        "pages of 8192 bytes": lambda: setattr(soft, "min_page", 1),
        "NVM command set": lambda: setattr(soft, "css", 0x40),
        "past BAR 0": lambda: setattr(soft, "stride", 4 << 15),
        "an administrative controller": lambda: setattr(soft, "controller_type", 3),
        "entries of 64 and 16": lambda: setattr(soft, "entry_sizes", (0x55, 0x44)),
        "cannot have namespaces": lambda: setattr(soft, "nn", 0),
        "which is reserved": lambda: setattr(soft, "queue_limit", None),
        "Identify Controller failed with status 0/0x06": lambda: faults.admin_fail.update({6: 6}),
        "Identify Controller: no completion": lambda: faults.admin_lose.add(6),
        "number of queues failed": lambda: faults.admin_fail.update({9: 0x4002}),
        "metadata": lambda: setattr(one, "metadata", 8),
        "blocks of 2^10 bytes": lambda: setattr(one, "shift", 10),
        "blocks of 2^255 bytes": lambda: setattr(one, "shift", 255),
        "has 0 blocks": lambda: setattr(one, "size", 0),
        "has 18446744073709551615 blocks": lambda: setattr(one, "size", 2**64 - 1),
    }
    changes[what]()
    if what != "the device is gone":
        soft.write64(0, soft.capabilities())


@pytest.mark.parametrize(
    "what",
    [
        "not ready",
        "fatal error",
        "the device is gone",
        "queues of one entry",
        "pages of 8192 bytes",
        "NVM command set",
        "past BAR 0",
        "an administrative controller",
        "entries of 64 and 16",
        "cannot have namespaces",
        "which is reserved",
        "Identify Controller failed with status 0/0x06",
        "Identify Controller: no completion",
        "number of queues failed",
        "metadata",
        "blocks of 2^10 bytes",
        "blocks of 2^255 bytes",
        "has 0 blocks",
        "has 18446744073709551615 blocks",
    ],
)
def test_a_controller_that_does_not_make_sense_is_left_as_it_was_found(what: str) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.quick()
        broken_at_start(bench.soft, what)
        fds = open_fds()
        with pytest.raises(OperationError) as caught:
            await bench.attach()
        assert what in caught.value.message
        assert bench.transport.closed
        assert not bench.soft.dma.maps
        assert not list(bench.registry)
        assert open_fds() == fds
        if what != "the device is gone":
            assert not bench.soft.read32(CC) & 1, "it is disabled"

    body()


@pytest.mark.parametrize("mdts", [0, 21, 255])
def test_a_limit_of_transfers_that_is_none_is_no_obstacle(mdts: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.mdts = mdts
        bench.soft.namespaces = {1: Namespace(32768)}
        disk = await bench.disk()
        data = os.urandom(9 << 20)
        await disk.write(0, data)
        assert bench.soft.namespaces[1].data[: len(data)] == data

    body()


@pytest.mark.parametrize("granted", [1, 2, 3])
def test_a_controller_with_fewer_queue_pairs_than_asked_for_is_used_as_far_as_they_go(
    granted: int,
) -> None:
    @on_nvme(reactors=3)
    async def body(bench: NvmeBench) -> None:
        bench.soft.queue_limit = granted  # the answer cannot say none: it is the number less 1
        await bench.attach()
        for reactor in range(granted):
            assert await (await bench.disk(reactor)).read(0, 512) == bytes(512)
        assert len((await bench.entry())["queues"]) == granted

    body()


@pytest.mark.parametrize("fault", ["fatal", "gone", "cid", "never_ready"])
def test_a_bad_controller_does_not_disturb_other_devices(fault: str) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.quick()
        await bench.rpc("bdev_malloc_create", name="Other", num_blocks=64, block_size=512)
        other = AsyncDisk(await bench.open("Other"))
        disk = await bench.disk()
        if fault == "cid":
            bench.soft.faults.cid = lambda _cid: 0xFFFF
        else:
            setattr(bench.soft.faults, fault, True)
        request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
        await asyncio.sleep(0.03)
        with contextlib.suppress(OperationError):
            await bench.rpc("bdev_nvme_reset_controller", name="Nvme0")
        with contextlib.suppress(OSError):
            await request.completed()
        data = os.urandom(512)
        await other.write(512, data)
        assert await other.read(512, 512) == data
        assert "Other" in [bdev.name for bdev in bench.registry]
        bench.soft.faults = Faults()

    body()


@on_nvme()
async def test_a_controller_that_is_mended_can_be_attached_under_the_same_name(
    bench: NvmeBench,
) -> None:
    bench.quick()
    bench.soft.faults.admin_fail[6] = 6
    with pytest.raises(OperationError):
        await bench.attach()
    bench.soft.faults.admin_fail.clear()
    assert await bench.attach() == ["Nvme0n1"]


@on_nvme()
async def test_one_bad_namespace_does_not_keep_the_others_back(bench: NvmeBench) -> None:
    bench.soft.namespaces[2] = Namespace()
    bench.soft.namespaces[2].metadata = 16
    assert await bench.attach() == ["Nvme0n1"]
    refused = (await bench.entry())["refused"]
    assert refused[0]["nsid"] == 2
    assert "16 bytes of metadata" in refused[0]["reason"]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"traddr": "nowhere"}, "PCI address 'nowhere'"),
        ({"traddr": "00:40.0"}, "PCI address '00:40.0'"),
        ({"trtype": "TCP"}, "trtype 'TCP': must be PCIe"),
        ({"num_io_queues": 0}, "num_io_queues 0"),
        ({"name": ""}, "name ''"),
        ({"prchk_guard": True}, "prchk_guard"),
        ({"dma": "magic"}, "dma"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], text: str) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        given = {"name": "Nvme0", "trtype": "PCIe", "traddr": "0000:01:00.0", **params}
        with pytest.raises(OperationError) as caught:
            await bench.rpc("bdev_nvme_attach_controller", **given)
        assert text in caught.value.message

    body()


@pytest.mark.parametrize("fault", ["unknown", "far", "twice"])
def test_a_completion_that_makes_no_sense_ends_in_a_reset_and_loses_nothing(fault: str) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        disk = await bench.disk()
        if fault == "twice":
            bench.soft.faults.twice = True
        else:
            bench.soft.faults.cid = lambda _cid: 254 if fault == "unknown" else 0xFFFF
        data = os.urandom(4096)
        requests = [
            disk.start(Op.WRITE, i * 512, buffers=[data[i * 512 : (i + 1) * 512]]) for i in range(8)
        ]
        pair = next(iter(bench.controller.queues))
        await bench.until(lambda: pair.watch.broken)
        await bench.controller.watch.check()
        for request in requests:
            await request.completed()
        assert bench.soft.namespaces[1].data[:4096] == data
        assert (await bench.entry())["resets"] == 1

    body()
