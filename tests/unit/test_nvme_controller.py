"""The life of an NVMe controller: bring-up, events, supervision, reset, removal."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from bdev.kind import Op
from bdev.nvme_controller import Options
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.nvme_bench import NvmeBench, on_nvme
from tests.support.nvme_controller import CC, CSTS, Namespace, SoftController


def quick(bench: NvmeBench, **options: Any) -> None:
    """Have time-outs that a test can wait for."""
    provider = bench.operations.find("bdev_nvme_attach_controller").method.__self__  # type: ignore[attr-defined]
    values = {"timeout_us": 20_000, "timeout_admin_us": 200_000, **options}
    provider._options = Options(**values)


# --- bring-up


@on_nvme()
async def test_attach_makes_a_device_of_each_namespace(bench: NvmeBench) -> None:
    bench.soft.namespaces = {1: Namespace(), 3: Namespace(64, 4096)}
    bench.soft.namespaces[3].nguid = bytes(range(16))
    assert await bench.attach() == ["Nvme0n1", "Nvme0n3"]
    third = bench.registry.find("Nvme0n3")
    assert (third.block_size, third.num_blocks) == (4096, 64)
    assert third.uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert bench.registry.config() == [
        {
            "method": "bdev_nvme_attach_controller",
            "params": {"name": "Nvme0", "trtype": "PCIe", "traddr": "0000:01:00.0"},
        }
    ]


@on_nvme()
async def test_a_controller_that_somebody_left_enabled_is_reset_first(bench: NvmeBench) -> None:
    bench.soft.write32(CC, 0x460001)
    bench.soft.step()
    assert await bench.attach() == ["Nvme0n1"]
    assert await (await bench.disk()).read(0, 512) == bytes(512)


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
        quick(bench)
        broken_at_start(bench.soft, what)
        fds = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OperationError) as caught:
            await bench.attach()
        assert what in caught.value.message
        assert bench.transport.closed
        assert not bench.soft.dma.maps
        assert not list(bench.registry)
        assert len(os.listdir("/proc/self/fd")) == fds
        if what != "the device is gone":
            assert not bench.soft.read32(CC) & 1, "it is disabled"

    body()


@on_nvme()
async def test_a_controller_that_is_mended_can_be_attached_under_the_same_name(
    bench: NvmeBench,
) -> None:
    quick(bench)
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


@on_nvme()
async def test_a_name_is_given_once(bench: NvmeBench) -> None:
    await bench.attach()
    with pytest.raises(OperationError) as caught:
        await bench.attach()
    assert caught.value.code == -errno.EEXIST


@on_nvme(reactors=3)
async def test_more_reactors_than_queue_pairs_are_refused_one_by_one(bench: NvmeBench) -> None:
    bench.soft.queue_limit = 2
    await bench.attach()
    for reactor in (0, 1):
        assert await (await bench.disk(reactor)).read(0, 512) == bytes(512)
    with pytest.raises(OperationError, match="all of its 2 queue pairs are in use"):
        await bench.disk(2)
    await bench.close("Nvme0n1", 0)
    assert await (await bench.disk(2)).read(0, 512) == bytes(512)


@on_nvme()
async def test_namespaces_share_the_queue_pair_of_a_reactor(bench: NvmeBench) -> None:
    bench.soft.namespaces[2] = Namespace()
    await bench.attach()
    first, second = await bench.open("Nvme0n1"), await bench.open("Nvme0n2")
    data = os.urandom(512)
    await second.start(Op.WRITE, 0, buffers=[data]).completed()
    assert len((await bench.entry())["queues"]) == 1
    await bench.close("Nvme0n1")
    assert bench.soft.namespaces[2].data[:512] == data
    await second.start(Op.FLUSH).completed()
    del first
    await bench.close("Nvme0n2")
    assert (await bench.entry())["queues"] == []


# --- events


@on_nvme()
async def test_an_added_a_removed_and_a_resized_namespace_are_noticed(bench: NvmeBench) -> None:
    bench.soft.namespaces[2] = Namespace()
    await bench.attach()
    resized = []

    async def on_resized(bdev: Any) -> None:
        resized.append(bdev.num_blocks)

    bench.registry.on_resized(bench.registry.find("Nvme0n1"), on_resized)
    del bench.soft.namespaces[2]
    bench.soft.namespaces[4] = Namespace(64, 4096)
    bench.soft.namespaces[1].data += bytes(512)
    bench.soft.namespaces_changed(1, 2, 4)
    await bench.until(lambda: {b.name for b in bench.registry} == {"Nvme0n1", "Nvme0n4"})
    await bench.until(lambda: resized == [2049])
    bench.soft.namespaces[2] = Namespace()
    bench.soft.namespaces_changed(2)  # the request for events was made again
    await bench.until(lambda: len(list(bench.registry)) == 3)


@on_nvme()
async def test_health_is_what_the_controller_says(bench: NvmeBench) -> None:
    await bench.attach()
    health = await bench.rpc("bdev_nvme_get_controller_health_info", name="Nvme0")
    assert health["temperature_celsius"] == 27
    assert health["power_cycles"] == 513
    assert health["serial_number"] == "SOFT0001"


# --- supervision


@on_nvme()
async def test_a_lost_completion_is_aborted_and_the_command_tried_again(bench: NvmeBench) -> None:
    quick(bench)
    disk = await bench.disk()
    data = os.urandom(512)
    bench.soft.faults.lose = 1
    request = disk.start(Op.WRITE, 0, buffers=[data])
    await bench.until(lambda: bench.soft.log)
    await asyncio.sleep(0.03)
    await bench.controller.watch.check()
    await request.completed()
    assert bench.soft.aborted == [(1, bench.soft.log[0].cid)]
    assert bench.soft.namespaces[1].data[:512] == data
    assert (await bench.entry())["resets"] == 0


@on_nvme()
async def test_a_controller_that_does_not_abort_is_reset(bench: NvmeBench) -> None:
    quick(bench)
    disk = await bench.disk()
    data = os.urandom(512)
    bench.soft.faults.lose, bench.soft.faults.ignore_aborts = 1, True
    request = disk.start(Op.WRITE, 0, buffers=[data])
    await bench.until(lambda: bench.soft.log)
    await asyncio.sleep(0.03)
    await bench.controller.watch.check()
    assert not request.done
    await asyncio.sleep(0.03)
    await bench.controller.watch.check()
    await request.completed()
    assert bench.soft.namespaces[1].data[:512] == data
    assert (await bench.entry())["resets"] == 1


@on_nvme()
async def test_no_command_is_aborted_when_there_is_no_time_limit(bench: NvmeBench) -> None:
    quick(bench, action_on_timeout="none")
    disk = await bench.disk()
    bench.soft.faults.hold = True
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    await bench.until(lambda: bench.soft.log)
    await asyncio.sleep(0.03)
    await bench.controller.watch.check()
    assert bench.soft.aborted == []
    bench.soft.faults.hold = False
    await request.completed()


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


@on_nvme()
async def test_a_fatal_error_ends_in_a_reset(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.fatal = True
    await bench.until(lambda: bench.soft.read32(CSTS) & 2)
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    check = asyncio.create_task(bench.controller.watch.check())
    await bench.until(lambda: not bench.soft.read32(CC) & 1)
    bench.soft.faults.fatal = False  # a reset helps
    await check
    await request.completed()


@on_nvme(reactors=2)
async def test_a_reset_under_load_loses_nothing_on_any_reactor(bench: NvmeBench) -> None:
    disks = [await bench.disk(0), await bench.disk(1)]
    for turn in range(5):
        bench.soft.faults.hold = True
        data = os.urandom(64 * 512)
        parts = [data[i * 512 : (i + 1) * 512] for i in range(64)]
        requests = [
            disks[i % 2].start(Op.WRITE, i * 512, buffers=[part]) for i, part in enumerate(parts)
        ]
        await bench.until(lambda: len(bench.soft.log) >= 64)
        reset = asyncio.create_task(bench.rpc("bdev_nvme_reset_controller", name="Nvme0"))
        await bench.until(lambda: not bench.soft.read32(CC) & 1)
        bench.soft.faults.hold = False
        await reset
        for request in requests:
            await request.completed()
        assert bench.soft.namespaces[1].data[: 64 * 512] == data
        bench.soft.log.clear()
        assert (await bench.entry())["resets"] == turn + 1


@on_nvme()
async def test_a_reset_that_fails_fails_requests_and_a_later_one_mends_it(bench: NvmeBench) -> None:
    quick(bench)
    disk = await bench.disk()
    bench.soft.faults.hold = bench.soft.faults.never_ready = True
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    with pytest.raises(OperationError, match="not ready"):
        await bench.rpc("bdev_nvme_reset_controller", name="Nvme0")
    with pytest.raises(OSError) as caught:
        await request.completed()
    assert caught.value.errno == errno.ENODEV
    assert not bench.soft.master, "a controller that was given up does no DMA"
    assert (await bench.entry())["state"] == "failed"
    bench.soft.faults.hold = bench.soft.faults.never_ready = False
    await bench.rpc("bdev_nvme_reset_controller", name="Nvme0")
    assert await disk.read(0, 512) == bytes(512)
    assert (await bench.entry())["state"] == "enabled"


@on_nvme()
async def test_a_drive_that_is_pulled_out_fails_its_requests_and_is_gone(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.hold = True
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    await bench.until(lambda: bench.soft.log)
    bench.soft.faults.gone = True
    await bench.until(lambda: bench.soft.read32(CSTS) == 0xFFFF_FFFF)
    await bench.controller.watch.check()
    with pytest.raises(OSError) as caught:
        await request.completed()
    assert caught.value.errno == errno.ENODEV
    assert list(bench.registry) == []
    assert await bench.rpc("bdev_nvme_get_controllers") == []
    with pytest.raises(OSError) as caught:
        await disk.read(0, 512)
    assert caught.value.errno == errno.ENODEV
    await bench.cluster.reactors[0].operations.invoke(
        "bdev_close", {"id": next(iter(bench.reactor.handles))}
    )


@on_nvme()
async def test_a_register_mapping_that_vanishes_is_a_device_that_is_gone(bench: NvmeBench) -> None:
    """As the kernel does it: an access to the registers raises SIGBUS."""
    await bench.attach()
    os.ftruncate(bench.soft.registers_fd, 0)
    bench.soft.step = lambda: 0  # type: ignore[method-assign]
    await bench.controller.watch.check()
    assert list(bench.registry) == []


# --- reactors that die, and the end


@on_nvme(reactors=2)
async def test_the_queue_pair_of_a_dead_reactor_is_deleted_before_another_is_lent(
    bench: NvmeBench,
) -> None:
    disk = await bench.disk(0)
    bench.soft.faults.hold = True
    disk.start(Op.WRITE, 0, buffers=[b"x" * 512])
    await bench.until(lambda: bench.soft.log)
    queue = lib.nvme_queue_find(next(iter(bench.controller.queues)).key)
    await bench.registry.reactor_lost(bench.cluster.reactors[0])
    other = await bench.disk(1)
    bench.soft.faults.hold = False
    assert await other.read(0, 512) == bytes(512), "the dead reactor's write is over"
    opcodes = [c.opcode for c in bench.soft.admin_log if c.opcode in (0, 1, 4, 5)]
    assert opcodes == [5, 1, 0, 4, 5, 1]
    lib.nvme_queue_fail(queue)  # what is left of the dead one, in this process


@on_nvme()
async def test_detach_with_requests_in_flight_waits_for_them(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.hold = True
    request = disk.start(Op.WRITE, 0, buffers=[b"x" * 512])
    await bench.until(lambda: bench.soft.log)
    detach = asyncio.create_task(bench.rpc("bdev_nvme_detach_controller", name="Nvme0"))
    await bench.until(lambda: "bdev_remove" in bench.reactor.calls)
    assert not detach.done()
    bench.soft.faults.hold = False
    await request.completed()
    await detach
    assert bench.soft.namespaces[1].data[:512] == b"x" * 512
    assert bench.soft.shutdowns == 1, "the drive was told to save what it has"
    assert not bench.soft.read32(CC) & 1
    await bench.reactor.operations.invoke("bdev_close", {"id": next(iter(bench.reactor.handles))})


@on_nvme()
async def test_options_are_checked_and_saved(bench: NvmeBench) -> None:
    await bench.rpc("bdev_nvme_set_options", timeout_us=5_000_000, action_on_timeout="reset")
    saved = bench.registry.config()[0]
    assert saved["method"] == "bdev_nvme_set_options"
    assert saved["params"]["timeout_us"] == 5_000_000
    await bench.rpc(saved["method"], **saved["params"])
    for params in ({"timeout_us": -1}, {"action_on_timeout": "panic"}, {"bdev_retry_count": 1000}):
        with pytest.raises(OperationError):
            await bench.rpc("bdev_nvme_set_options", **params)


# --- interrupts


@on_nvme()
async def test_an_idle_reactor_sleeps_and_an_interrupt_wakes_it(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.hold = True
    before = bench.soft.signals
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    await bench.until(lambda: bench.soft.log)
    counters = lib.reactor_counters(bench.reactor.native)
    await bench.until(lambda: counters.hot == 0)  # although a command is in flight
    bench.soft.faults.hold = False
    await request.completed()
    assert bench.soft.signals == before + 1


@on_nvme()
async def test_without_interrupts_a_reactor_polls_while_something_is_in_flight(
    bench: NvmeBench,
) -> None:
    bench.transport.vectors = 0
    disk = await bench.disk()
    counters = lib.reactor_counters(bench.reactor.native)
    await bench.until(lambda: counters.hot == 0)
    bench.soft.faults.hold = True
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    await bench.until(lambda: bench.soft.log)
    assert counters.hot == 1
    bench.soft.faults.hold = False
    await request.completed()
    await bench.until(lambda: counters.hot == 0)
