"""NVMe drives that come and go while the program runs."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from bdev.kind import Op
from reactor.errors import OperationError
from tests.support.nvme_bench import NvmeBench, on_nvme
from tests.support.sysfs import FakeSysfs

DRIVE = "0000:01:00.0"


def slot(bench: NvmeBench, path: Path) -> FakeSysfs:
    """Return the bus that is looked at; the bench's drive is wherever somebody plugs one in."""
    operations: Any = bench.operations.find("bdev_nvme_set_hotplug").method.__self__  # type: ignore[attr-defined]
    operations.sysfs = sysfs = FakeSysfs(path)
    return sysfs


def names(bench: NvmeBench) -> list[str]:
    return [bdev.name for bdev in bench.registry]


@on_nvme()
async def test_a_drive_that_is_plugged_in_is_attached(bench: NvmeBench, tmp_path: Path) -> None:
    sysfs = slot(bench, tmp_path)
    await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=100)
    await asyncio.sleep(0.01)
    assert names(bench) == []
    sysfs.add(DRIVE, driver="vfio-pci")
    await bench.until(lambda: names(bench) == ["HotInNvme0n1"])
    disk = await bench.open("HotInNvme0n1")
    data = os.urandom(512)
    await disk.start(Op.WRITE, 0, buffers=[data]).completed()
    assert bench.soft.namespaces[1].data[:512] == data


@on_nvme()
async def test_a_drive_of_the_kernel_or_of_ours_is_left_alone(
    bench: NvmeBench, tmp_path: Path
) -> None:
    sysfs = slot(bench, tmp_path)
    sysfs.add(DRIVE, driver="vfio-pci")
    sysfs.add("0000:02:00.0", driver="nvme", group="8")
    await bench.attach()
    await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=100)
    await asyncio.sleep(0.02)
    assert names(bench) == ["Nvme0n1"]


@on_nvme()
async def test_a_drive_that_was_detached_comes_back_when_it_is_plugged_in_again(
    bench: NvmeBench, tmp_path: Path
) -> None:
    sysfs = slot(bench, tmp_path)
    await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=100)
    sysfs.add(DRIVE, driver="vfio-pci")
    await bench.until(lambda: names(bench) == ["HotInNvme0n1"])
    await bench.rpc("bdev_nvme_detach_controller", name="HotInNvme0")
    await asyncio.sleep(0.02)
    assert names(bench) == []
    sysfs.remove(DRIVE)
    await asyncio.sleep(0.02)
    sysfs.add(DRIVE, driver="vfio-pci")
    await bench.until(lambda: names(bench) == ["HotInNvme0n1"])


@on_nvme()
async def test_a_drive_that_is_detached_while_somebody_looks_is_left_alone(
    bench: NvmeBench, tmp_path: Path
) -> None:
    slot(bench, tmp_path).add(DRIVE, driver="vfio-pci")
    await bench.attach()
    await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=100)
    await bench.rpc("bdev_nvme_detach_controller", name="Nvme0")
    await asyncio.sleep(0.02)
    assert names(bench) == []


@on_nvme()
async def test_a_drive_that_cannot_be_attached_is_tried_once_and_named(
    bench: NvmeBench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench.soft.controller_type = 3
    sysfs = slot(bench, tmp_path)
    with caplog.at_level(logging.WARNING):
        await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=100)
        sysfs.add(DRIVE, driver="vfio-pci")
        await bench.until(lambda: "is not attached" in caplog.text)
        await asyncio.sleep(0.02)
    assert caplog.text.count("is not attached") == 1
    assert f"{DRIVE} was plugged in and is not attached: controller type 3" in caplog.text


@on_nvme()
async def test_nobody_looks_any_more_once_it_is_switched_off(
    bench: NvmeBench, tmp_path: Path
) -> None:
    sysfs = slot(bench, tmp_path)
    await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=100)
    await bench.rpc("bdev_nvme_set_hotplug", enable=False)
    sysfs.add(DRIVE, driver="vfio-pci")
    await asyncio.sleep(0.02)
    assert names(bench) == []


@on_nvme()
async def test_a_saved_configuration_names_controllers_before_it_looks_for_others(
    bench: NvmeBench, tmp_path: Path
) -> None:
    slot(bench, tmp_path)
    await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=5000)
    await bench.attach()
    attach, hotplug = bench.registry.config()
    assert attach["method"] == "bdev_nvme_attach_controller"
    assert hotplug == {
        "method": "bdev_nvme_set_hotplug",
        "params": {"enable": True, "period_us": 5000},
    }


@on_nvme()
async def test_periods_out_of_range_are_refused(bench: NvmeBench) -> None:
    for period in (-1, 10_000_001):
        with pytest.raises(OperationError, match=f"period_us {period}: must be 0 to 10000000"):
            await bench.rpc("bdev_nvme_set_hotplug", enable=True, period_us=period)


# --- removal


@on_nvme()
async def test_a_drive_that_the_kernel_wants_back_is_drained_and_given_back(
    bench: NvmeBench,
) -> None:
    disk = await bench.disk()
    bench.soft.faults.hold = True
    request = disk.start(Op.WRITE, 0, buffers=[b"x" * 512])
    await bench.until(lambda: bench.soft.log)
    for _ in range(3):  # the kernel asks until it has it
        os.eventfd_write(bench.transport.request, 1)
        await asyncio.sleep(0.001)
    assert not bench.transport.closed
    bench.soft.faults.hold = False
    await request.completed()
    await bench.until(lambda: bench.transport.closed)
    assert bench.soft.namespaces[1].data[:512] == b"x" * 512
    assert bench.soft.shutdowns == 1, "the drive was told to save what it has"
    assert await bench.rpc("bdev_nvme_get_controllers") == []
    with pytest.raises(OSError) as caught:
        await disk.read(0, 512)
    assert caught.value.errno == errno.ENODEV
    await bench.reactor.operations.invoke("bdev_close", {"id": next(iter(bench.reactor.handles))})


@on_nvme()
async def test_a_drive_that_could_not_be_given_back_is_when_the_kernel_asks_again(
    bench: NvmeBench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.disk()
    bench.cluster.refuse["bdev_remove"] = OperationError(-errno.EBUSY, "not now")
    os.eventfd_write(bench.transport.request, 1)
    await bench.until(lambda: "not now" in caplog.text)
    assert not bench.transport.closed
    bench.cluster.refuse.clear()
    os.eventfd_write(bench.transport.request, 1)
    await bench.until(lambda: bench.transport.closed)
    await bench.reactor.operations.invoke("bdev_close", {"id": next(iter(bench.reactor.handles))})


@on_nvme()
async def test_a_drive_goes_back_to_the_kernels_driver_where_that_is_asked_for(
    bench: NvmeBench, tmp_path: Path
) -> None:
    drive = slot(bench, tmp_path).add(DRIVE, driver="vfio-pci")
    await bench.attach()
    await bench.rpc("bdev_nvme_detach_controller", name="Nvme0")
    assert drive.driver == "vfio-pci", "it stays where it is"
    await bench.attach()
    await bench.rpc("bdev_nvme_detach_controller", name="Nvme0", restore=True)
    assert drive.driver == "nvme"
