"""The load generator on virtio-scsi: vhost/workload_scsi.c, and ``vhost-reactor io --scsi``."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tests.support.scsi_stack import controller
from tests.support.stack import CPUS
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.frontend_link import FrontendError
from vhost.frontend_scsi_disk import ScsiDisk
from vhost.io import io_command, run_workload
from vhost.messages import ProtocolFeature
from vhost.workload import Workload


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
async def test_what_is_written_under_load_is_read_back(packed: bool, indirect: bool) -> None:
    async with controller(cpus=CPUS[:2]) as target:
        work = Workload(
            *(0, "randrw"),
            block_size=16384,
            depth=16,
            requests=2000,
            verify=True,
            indirect=indirect,
        )

        def load() -> None:
            with ScsiDisk(target.socket("s0"), packed=packed) as disk:
                assert (disk.size, disk.block_size, disk.read_only) == (16 << 20, 512, False)
                results = run_workload(disk, work, queues=2)
            assert (results.good, results.first_error) == (True, "")
            assert results.total.ops >= 2000
            assert results.verified > 500
            assert 0 < results.total.percentile(50) <= results.total.percentile(99.9)

        await target.in_thread(load)
        await target.until(lambda: not target.sessions())


async def test_a_back_end_without_configuration_space_is_served_with_qemus() -> None:
    async with controller() as target:

        def load() -> None:
            protocol = WANTED_PROTOCOL & ~ProtocolFeature.CONFIG
            with ScsiDisk(target.socket("s0"), protocol_features=protocol) as disk:
                assert disk.max_buffers == 126
                assert run_workload(disk, Workload(0, requests=100)).good

        await target.in_thread(load)
        await target.until(lambda: not target.sessions())


async def test_errors_are_told_as_scsi_has_them() -> None:
    async with controller() as target:
        await target.call("bdev_malloc_create", name="M1", num_blocks=1024, block_size=512)
        await target.call("bdev_error_create", base_name="M1")
        lun = {"ctrlr": "s0", "scsi_target_num": 3, "lun": 5, "bdev_name": "EE_M1"}
        await target.call("vhost_scsi_controller_add_target", **lun)
        fault = {"name": "EE_M1", "io_type": "read", "error_type": "failure", "num": 3}
        await target.call("bdev_error_inject_error", **fault)

        def load() -> None:
            with ScsiDisk(target.socket("s0"), target=3, lun=5) as disk:
                results = run_workload(disk, Workload(0, requests=100))
            assert (results.good, results.errors, results.total.ops) == (False, 3, 97)
            assert results.first_error.endswith("the device says CHECK CONDITION")
            with pytest.raises(FrontendError, match="LUN 7 of target 3 is not ready"):
                ScsiDisk(target.socket("s0"), target=3, lun=7)

        await target.in_thread(load)
        await target.until(lambda: not target.sessions())


async def test_command_line() -> None:
    async with controller() as target:
        options = ["--scsi", "--rw", "rw", "--number-ios", "300", "--verify", "--json"]
        done = await target.in_thread(
            lambda: CliRunner().invoke(io_command, [target.socket("s0"), *options])
        )
        assert (done.exit_code, '"mismatches": 0' in done.output) == (0, True), done.output
        await target.until(lambda: not target.sessions())
