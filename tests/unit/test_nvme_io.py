"""I/O of NVMe disks on a software controller: every byte moved is moved by the device."""

from __future__ import annotations

import errno
import os

import pytest

from bdev.kind import Op
from reactor.native import lib
from tests.support.nvme_bench import AsyncDisk, NvmeBench, on_nvme
from tests.support.nvme_controller import (
    DSM,
    FLUSH,
    INTERNAL_ERROR,
    MEDIA_ERROR,
    OUT_OF_RANGE,
    READ,
    WRITE,
    ZEROES,
    Namespace,
)


@on_nvme()
async def test_what_is_written_is_on_the_drive_and_is_read_back(bench: NvmeBench) -> None:
    disk = await bench.disk()
    data = os.urandom(8192)
    await disk.write(4096, data)
    assert bench.soft.namespaces[1].data[4096 : 4096 + 8192] == data
    assert await disk.read(4096, 8192) == data


@on_nvme()
async def test_blocks_of_4096_bytes(bench: NvmeBench) -> None:
    bench.soft.namespaces = {1: Namespace(256, 4096)}
    disk = await bench.disk()
    data = os.urandom(12288)
    await disk.write(8192, data)
    assert bench.soft.namespaces[1].data[8192 : 8192 + 12288] == data
    assert (bench.soft.log[0].first, bench.soft.log[0].blocks) == (2, 3)


@on_nvme()
async def test_a_request_larger_than_mdts_is_split(bench: NvmeBench) -> None:
    bench.soft.mdts = 1  # 8 KiB
    disk = await bench.disk()
    data = os.urandom(65536)
    await disk.write(0, data)
    assert await disk.read(0, 65536) == data
    assert [c.blocks for c in bench.soft.log] == [16] * 16


@on_nvme()
async def test_one_doorbell_write_for_a_batch(bench: NvmeBench) -> None:
    disk = await bench.disk()
    requests = [disk.start(Op.READ, i * 512, buffers=[bytearray(512)]) for i in range(30)]
    for request in requests:
        await request.completed()
    now = await bench.counters()
    assert (now["commands"], now["completions"]) == (30, 30)
    assert (now["submission_doorbells"], now["completion_doorbells"]) == (1, 1)


@on_nvme()
async def test_more_requests_than_slots_wait_and_complete(bench: NvmeBench) -> None:
    bench.soft.max_entries = 4
    bench.soft.write64(0, bench.soft.capabilities())
    disk = await bench.disk()
    data = os.urandom(100 * 512)
    requests = [
        disk.start(Op.WRITE, i * 512, buffers=[data[i * 512 : (i + 1) * 512]]) for i in range(100)
    ]
    for request in requests:
        await request.completed()
    assert bench.soft.namespaces[1].data[: len(data)] == data
    assert (await bench.counters())["waits"] > 0


@on_nvme()
async def test_bounce_buffers_that_run_dry_push_back(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.hold = True
    requests = [disk.start(Op.READ, 0, buffers=[bytearray(65536)]) for _ in range(70)]
    await bench.until(lambda: len(bench.soft.log) == 32)
    bench.soft.faults.hold = False
    for request in requests:
        await request.completed()
    assert len(bench.soft.log) == 70


@on_nvme()
async def test_flush_reaches_the_drive_only_if_it_has_a_cache(bench: NvmeBench) -> None:
    disk = await bench.disk()
    await disk.do("FLUSH")
    assert [c.opcode for c in bench.soft.log] == [FLUSH]


@on_nvme()
async def test_flush_without_a_cache_has_nothing_to_do(bench: NvmeBench) -> None:
    bench.soft.vwc = 0
    disk = await bench.disk()
    await disk.do("FLUSH")
    assert bench.soft.log == []


@on_nvme()
async def test_fua_is_passed_on(bench: NvmeBench) -> None:
    disk = await bench.disk()
    await disk.write(0, bytes(512), flags=lib.BDEV_IO_FUA)
    assert bench.soft.log[0].cdw[2] >> 30 & 1


@on_nvme()
async def test_unmap_deallocates(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.namespaces[1].data[:8192] = b"x" * 8192
    await disk.do("UNMAP", 512, 1024)
    assert bench.soft.log[0].opcode == DSM
    assert bench.soft.namespaces[1].data[:2048] == b"x" * 512 + bytes(1024) + b"x" * 512


@on_nvme()
async def test_unmap_is_refused_where_the_drive_has_no_dataset_management(bench: NvmeBench) -> None:
    bench.soft.oncs = 0
    disk = await bench.disk()
    with pytest.raises(OSError, match="not supported"):
        await disk.do("UNMAP", 0, 512)


@pytest.mark.parametrize(("oncs", "opcode"), [(0xC, ZEROES), (0x4, WRITE)])
def test_write_zeroes(oncs: int, opcode: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        disk = await bench.disk()
        bench.soft.namespaces[1].data[:] = b"x" * len(bench.soft.namespaces[1].data)
        await disk.do("WRITE_ZEROES", 512, 300 * 512)
        data = bench.soft.namespaces[1].data
        assert not any(data[512 : 301 * 512])
        assert data[:512] == data[301 * 512 : 302 * 512] == b"x" * 512
        assert {c.opcode for c in bench.soft.log} == {opcode}

    body()


@on_nvme()
async def test_shadow_doorbells_spare_writes_to_the_device(bench: NvmeBench) -> None:
    bench.soft.oacs = 0x100
    disk = await bench.disk()
    reactor = bench.reactor.selector
    for _ in range(10):  # ten batches, at none of which the device looks
        disk.start(Op.READ, 0, buffers=[bytearray(512)])
        reactor.select(0)
    assert (await bench.counters())["submission_doorbells"] == 1
    data = os.urandom(4096)
    for i in range(300):  # all the way round the queue
        await disk.write(i % 10 * 4096, data)
    assert bench.soft.namespaces[1].data[:40960] == data * 10


@on_nvme()
async def test_a_queue_pair_made_anew_begins_with_shadow_doorbells_of_zero(
    bench: NvmeBench,
) -> None:
    bench.soft.oacs = 0x100
    for _ in range(3):
        disk = await bench.disk()
        for _ in range(5):
            await disk.read(0, 512)
        await bench.close("Nvme0n1")
    disk = await bench.disk()
    await bench.rpc("bdev_nvme_reset_controller", name="Nvme0")
    assert await disk.read(0, 512) == bytes(512)


@on_nvme()
async def test_a_drive_with_limits_is_opened_like_any_other(bench: NvmeBench) -> None:
    await bench.attach()
    await bench.rpc("bdev_set_qos_limit", name="Nvme0n1", rw_ios_per_sec=100_000)
    disk = AsyncDisk(await bench.open("Nvme0n1"))
    data = os.urandom(4096)
    await disk.write(0, data)
    assert await disk.read(0, 4096) == data


# --- errors


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (MEDIA_ERROR, errno.ENODATA),
        (OUT_OF_RANGE, errno.ERANGE),
        (0x4001, errno.EOPNOTSUPP),
        (0x4002, errno.EINVAL),
        (0x4020, errno.EROFS),
        (0x4081, errno.ENOSPC),
        (0x4083, errno.EBADE),
        (0x4280, errno.EIO),
        (0x4285, errno.EILSEQ),
        (0x4286, errno.EACCES),
        (0x7FFF, errno.EIO),
    ],
)
def test_an_error_status_becomes_an_errno(status: int, expected: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        disk = await bench.disk()
        bench.soft.faults.fail = [status]
        with pytest.raises(OSError) as caught:
            await disk.read(0, 512)
        assert caught.value.errno == expected
        assert len(bench.soft.log) == 1, "an error that says 'do not retry' is not retried"

    body()


@on_nvme()
async def test_an_error_that_may_pass_is_retried(bench: NvmeBench) -> None:
    disk = await bench.disk()
    data = os.urandom(512)
    bench.soft.faults.fail = [INTERNAL_ERROR] * 3
    await disk.write(0, data)
    assert bench.soft.namespaces[1].data[:512] == data
    assert (await bench.counters())["retries"] == 3


@on_nvme()
async def test_an_error_that_does_not_pass_is_reported_in_the_end(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.fail = [INTERNAL_ERROR] * 10
    with pytest.raises(OSError) as caught:
        await disk.read(0, 512)
    assert caught.value.errno == errno.EIO
    assert len(bench.soft.log) == 4


@on_nvme()
async def test_one_failing_part_fails_the_whole_request_once(bench: NvmeBench) -> None:
    bench.soft.mdts = 1
    disk = await bench.disk()
    bench.soft.faults.hold = True
    request = disk.start(Op.READ, 0, buffers=[bytearray(65536)])
    await bench.until(lambda: len(bench.soft.log) == 8)
    bench.soft.faults.fail = [0] * 3 + [MEDIA_ERROR]
    bench.soft.faults.hold = False
    with pytest.raises(OSError) as caught:
        await request.completed()
    assert caught.value.errno == errno.ENODATA
    assert lib.bdev_in_flight(disk.io.handle) == 0


@on_nvme()
async def test_reads_are_what_the_device_wrote(bench: NvmeBench) -> None:
    """The test of the tests: a device that writes other data is noticed."""
    disk = await bench.disk()
    bench.soft.faults.garbage = b"\xa5" * 512
    assert await disk.read(0, 512) == b"\xa5" * 512
    assert bench.soft.log[0].opcode == READ
