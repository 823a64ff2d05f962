"""NVMe drives behind SCSI: what the drive says of a command is what the initiator is told."""

from __future__ import annotations

import os

import pytest

from tests.support.nvme_bench import NvmeBench, on_nvme
from tests.support.nvme_controller import MEDIA_ERROR, OUT_OF_RANGE
from tests.support.scsi import (
    CHECK_CONDITION,
    CONFLICT,
    DATA_PROTECT,
    GOOD,
    HARDWARE_ERROR,
    ILLEGAL_REQUEST,
    MEDIUM_ERROR,
    MISCOMPARE,
    Answer,
    Unit,
)

READ_10 = bytes.fromhex("28 00 00000000 00 0001 00")
WRITE_10 = bytes.fromhex("2a 00 00000000 00 0001 00")
VERIFY_10 = bytes.fromhex("2f 02 00000000 00 0001 00")  # BYTCHK: with the data sent
COMPARE_AND_WRITE = bytes.fromhex("89 00 0000000000000000 000000 01 00 00")


async def run(bench: NvmeBench, cdb: bytes, out: bytes = b"", into: int = 0) -> Answer:
    """Carry out one command while the drive goes on."""
    disk = await bench.disk()
    unit = Unit(bench.reactor.native, disk.io.handle)
    try:
        pending = unit.port().prepare(cdb, out, into).start()
        await bench.until(lambda: pending.done)
        return pending.wait()
    finally:
        unit.close()


@pytest.mark.parametrize(
    ("status", "cdb", "expected"),
    [
        (MEDIA_ERROR, READ_10, (MEDIUM_ERROR, 0x1100)),
        (0x4280, WRITE_10, (MEDIUM_ERROR, 0x0C00)),
        (OUT_OF_RANGE, READ_10, (ILLEGAL_REQUEST, 0x2100)),
        (0x4020, WRITE_10, (DATA_PROTECT, 0x2700)),
        (0x4081, WRITE_10, (DATA_PROTECT, 0x2707)),
        (0x4286, READ_10, (HARDWARE_ERROR, 0x4400)),
    ],
)
def test_an_error_of_the_drive_becomes_sense_data(
    status: int, cdb: bytes, expected: tuple[int, int]
) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.faults.fail = [status]
        out, into = (b"", 512) if cdb is READ_10 else (bytes(512), 0)
        answer = await run(bench, cdb, out, into)
        assert (answer.status, answer.code) == (CHECK_CONDITION, expected)

    body()


@on_nvme()
async def test_a_reservation_of_another_host_is_a_reservation_conflict(bench: NvmeBench) -> None:
    bench.soft.faults.fail = [0x4083]
    assert (await run(bench, WRITE_10, bytes(512))).status == CONFLICT
    assert bench.soft.namespaces[1].data[:512] == bytes(512)


@on_nvme()
async def test_verify_compares_with_what_is_on_the_drive(bench: NvmeBench) -> None:
    bench.soft.namespaces[1].data[:512] = data = os.urandom(512)
    assert (await run(bench, VERIFY_10, data)).status == GOOD


@pytest.mark.parametrize("same", [True, False])
def test_compare_and_write(same: bool) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.namespaces[1].data[:512] = before = os.urandom(512)
        after = os.urandom(512)
        expected = before if same else before[:100] + bytes([before[100] ^ 1]) + before[101:]
        answer = await run(bench, COMPARE_AND_WRITE, expected + after)
        if same:
            assert answer.status == GOOD
        else:
            assert answer.code == (MISCOMPARE, 0x1D00)
            assert answer.information == 100
        assert bench.soft.namespaces[1].data[:512] == (after if same else before)

    body()
