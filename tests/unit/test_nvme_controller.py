"""The life of an NVMe controller: bring-up, events, supervision, reset, removal."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest

from bdev.kind import Op
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.nvme_bench import NvmeBench, on_nvme
from tests.support.nvme_controller import CC, CSTS, Namespace

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
    bench.quick()
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
    bench.quick()
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
    bench.quick(action_on_timeout="none")
    disk = await bench.disk()
    bench.soft.faults.hold = True
    request = disk.start(Op.READ, 0, buffers=[bytearray(512)])
    await bench.until(lambda: bench.soft.log)
    await asyncio.sleep(0.03)
    await bench.controller.watch.check()
    assert bench.soft.aborted == []
    bench.soft.faults.hold = False
    await request.completed()


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
    bench.quick()
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


@on_nvme(reactors=2)
async def test_the_fence_of_a_reactor_that_dies_during_a_reset_waits_for_it(
    bench: NvmeBench,
) -> None:
    disk = await bench.disk(0)
    bench.soft.faults.hold = True
    disk.start(Op.WRITE, 0, buffers=[b"x" * 512])
    await bench.until(lambda: bench.soft.log)
    queue = lib.nvme_queue_find(next(iter(bench.controller.queues)).key)

    async def fence() -> list[int]:
        await bench.registry.reactor_lost(bench.cluster.reactors[0])
        return [command.opcode for command in bench.soft.admin_log]

    bench.soft.faults.admin_lose.add(0)  # the deletion of the queue pair, which the reset cuts off
    fencing = asyncio.create_task(fence())
    await bench.until(lambda: bench.soft.admin_log[-1].opcode == 0)
    await bench.rpc("bdev_nvme_reset_controller", name="Nvme0")
    done = await fencing
    assert 6 in done[done.index(0) :], "the controller was identified again before that"
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
