"""What a virtio-scsi device has: its last target and unit, two addresses of one, data both ways."""

from __future__ import annotations

import struct

from tests.support.scsi_stack import INQUIRY, READY, close, connect, controller
from tests.support.stack import Stack
from vhost.frontend_scsi import ScsiFrontend
from vhost.frontend_scsi_disk import ScsiDisk
from vhost.io import run_workload
from vhost.virtio_scsi import COMMAND, RESPONSE, SENSE_SIZE, Response, ScsiFeature
from vhost.workload import Workload

LAST = 255
IDENTITY = 255  # bytes of an answer to INQUIRY


async def add(target: Stack, number: int, lun: int) -> None:
    unit = {"ctrlr": "s0", "scsi_target_num": number, "lun": lun, "bdev_name": "M0"}
    await target.call("vhost_scsi_controller_add_target", **unit)


async def test_the_last_of_256_units_of_the_last_of_256_targets_is_served() -> None:
    async with controller() as target:
        for lun in range(LAST + 1):
            await add(target, LAST, lun)
        front = await connect(target)

        def work() -> None:
            report = struct.pack(">BBB3xI2x", 0xA0, 0, 0, 4096)
            listed = front.command(LAST, 0, report, into=4096).data
            assert int.from_bytes(listed[:4], "big") == 8 * (LAST + 1)
            assert front.command(LAST, LAST, INQUIRY, into=IDENTITY).data[0] == 0
            assert front.command(LAST - 1, 0, READY).response == Response.BAD_TARGET

        await target.in_thread(work)
        await close(target, front)


def identify(front: ScsiFrontend, lun: bytes) -> bytes:
    header = COMMAND.pack(b"\1\0" + lun + bytes(4), 9, 0, 0, 0, INQUIRY)
    return front.answer(front.send(2, header, RESPONSE.size + SENSE_SIZE + IDENTITY)).data


async def test_a_unit_is_found_by_its_peripheral_and_by_its_flat_address() -> None:
    """SAM-5, 4.7.7.2 and 4.7.7.3; virtio 1.2, 5.6.6.1, asks for the flat one."""
    async with controller() as target:
        await add(target, 0, LAST)
        front = await connect(target)

        def work() -> None:
            assert identify(front, b"\x40\xff")[0] == 0
            assert identify(front, b"\x00\xff") == identify(front, b"\x40\xff")
            assert identify(front, b"\x40\xfe")[0] == 0x7F

        await target.in_thread(work)
        await close(target, front)


async def test_a_command_may_come_with_buffers_both_ways() -> None:
    """What INOUT promises: the direction that the command does not use is left alone."""
    async with controller() as target:
        front = await connect(target)
        assert front.features & ScsiFeature.INOUT
        answer = await target.in_thread(
            lambda: front.command(0, 0, INQUIRY, b"\xff" * 512, into=IDENTITY)
        )
        assert (answer.response, answer.status) == (Response.OK, 0)
        assert answer.data[8:13] == b"VHOST"
        await close(target, front)


async def test_coalescing_is_a_setting_and_loses_no_completion() -> None:
    async with controller() as target:
        args = {"ctrlr": "s0", "delay_base_us": 1000, "iops_threshold": 1000}
        await target.call("vhost_controller_set_coalescing", **args)
        (described,) = await target.call("vhost_get_controllers")
        assert (described["delay_base_us"], described["iops_threshold"]) == (1000, 1000)

        def load() -> None:
            with ScsiDisk(target.socket("s0")) as disk:
                work = Workload(0, "randrw", depth=16, requests=2000, verify=True)
                assert run_workload(disk, work).good

        await target.in_thread(load)
        await target.until(lambda: not target.sessions())
