"""Commands that few drives have: carried out by the drive that has them, else by the bdev layer."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdev.kind import Op
from tests.support.nvme_bench import GuestMemory, NvmeBench, on_nvme
from tests.support.nvme_controller import (
    COMPARE,
    COPY,
    HAS_COMPARE,
    HAS_COPY,
    HAS_DSM,
    HAS_VERIFY,
    HAS_ZEROES,
    INVALID_FIELD,
    MEDIA_ERROR,
    PAGE,
    READ,
    VERIFY,
    WRITE,
)

EVERYTHING = HAS_COMPARE | HAS_DSM | HAS_ZEROES | HAS_COPY


def opcodes(bench: NvmeBench) -> list[int]:
    return [command.opcode for command in bench.soft.log]


def fill(bench: NvmeBench) -> bytearray:
    data = bench.soft.namespaces[1].data
    data[:] = os.urandom(len(data))
    return data


# --- compare


@pytest.mark.parametrize(("oncs", "expected"), [(EVERYTHING, COMPARE), (0, READ)])
def test_compare_with_what_is_there(oncs: int, expected: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        disk = await bench.disk()
        data = fill(bench)
        await disk.start(Op.COMPARE, 1024, buffers=[bytes(data[1024:9216])]).completed()
        assert opcodes(bench) == [expected]

    body()


@pytest.mark.parametrize("oncs", [EVERYTHING, 0])
@pytest.mark.parametrize("at", [0, 513, 70_000, 131_071])
def test_the_first_byte_that_differs_is_named(oncs: int, at: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        disk = await bench.disk()
        data = bytearray(fill(bench)[512 : 512 + 131072])
        data[at] ^= 0xFF
        request = disk.start(Op.COMPARE, 512, buffers=[data])
        with pytest.raises(OSError) as caught:
            await request.completed()
        assert (caught.value.errno, request.miscompare) == (errno.EILSEQ, at)
        assert (await bench.counters())["retries"] == 0, "to try again is no help"

    body()


@on_nvme()
async def test_compare_of_guest_memory_is_not_copied(bench: NvmeBench) -> None:
    bench.soft.oncs = EVERYTHING
    disk = await bench.disk()
    data = fill(bench)
    with GuestMemory(bench) as guest:
        guest.map[: 2 * PAGE] = data[: 2 * PAGE]
        with guest.part(0, 2 * PAGE) as part:
            await disk.start(Op.COMPARE, 0, buffers=[part]).completed()
    assert (await bench.counters())["bounced"] == 0
    assert opcodes(bench) == [COMPARE]


@on_nvme()
async def test_a_compare_that_cannot_read_is_no_miscompare(bench: NvmeBench) -> None:
    bench.soft.oncs = EVERYTHING
    disk = await bench.disk()
    bench.soft.faults.fail = [MEDIA_ERROR]
    with pytest.raises(OSError) as caught:
        await disk.start(Op.COMPARE, 0, buffers=[bytes(512)]).completed()
    assert caught.value.errno == errno.ENODATA


@on_nvme()
async def test_what_has_become_equal_by_the_second_look_is_equal(bench: NvmeBench) -> None:
    bench.soft.oncs = EVERYTHING
    disk = await bench.disk()
    bench.soft.faults.fail = [0x0285]
    await disk.start(Op.COMPARE, 0, buffers=[bytes(512)]).completed()
    assert opcodes(bench) == [COMPARE, READ]


# --- copy


@pytest.mark.parametrize(("oncs", "expected"), [(EVERYTHING, {COPY}), (0, {READ, WRITE})])
def test_copy_within_a_drive(oncs: int, expected: set[int]) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        disk = await bench.disk()
        data = fill(bench)
        before = bytes(data)
        await disk.do("COPY", 512 * 1000, 512 * 100, source=512 * 3)
        assert data[512 * 1000 : 512 * 1100] == before[512 * 3 : 512 * 103]
        assert data[: 512 * 1000] == before[: 512 * 1000]
        assert data[512 * 1100 :] == before[512 * 1100 :]
        assert set(opcodes(bench)) == expected

    body()


@on_nvme()
async def test_a_copy_is_split_as_the_drive_wants_it(bench: NvmeBench) -> None:
    bench.soft.oncs = EVERYTHING
    disk = await bench.disk()
    await disk.do("COPY", 512 * 1000, 512 * 45, source=0)
    assert [(c.first, (c.cdw[2] & 0xFF) + 1) for c in bench.soft.log] == [
        (1000, 3),  # 8, 8 and 4 blocks
        (1020, 3),
        (1040, 1),
    ]


@pytest.mark.parametrize("change", ["no format", "no limits"])
def test_a_copy_that_the_drive_cannot_do_is_made_of_reads_and_writes(change: str) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = EVERYTHING
        if change == "no format":
            bench.soft.ocfs = 0
        else:
            bench.soft.namespaces[1].mssrl = 0
        disk = await bench.disk()
        data = fill(bench)
        await disk.do("COPY", 512 * 100, 512, source=0)
        assert data[51200:51712] == data[:512]
        assert COPY not in opcodes(bench)

    body()


@settings(max_examples=60, deadline=None)
@given(
    source=st.integers(0, 100),
    target=st.integers(0, 100),
    blocks=st.integers(1, 100),
    limits=st.tuples(st.integers(1, 70), st.integers(1, 200), st.integers(0, 255)),
)
def test_any_copy_moves_the_right_blocks(
    source: int, target: int, blocks: int, limits: tuple[int, int, int]
) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = EVERYTHING
        one = bench.soft.namespaces[1]
        one.mssrl, one.mcl, one.msrc = limits
        disk = await bench.disk()
        data = fill(bench)
        expected = bytearray(data)
        expected[512 * target : 512 * (target + blocks)] = data[
            512 * source : 512 * (source + blocks)
        ]
        await disk.do("COPY", 512 * target, 512 * blocks, source=512 * source)
        assert data == expected
        apart = target >= source + blocks or source >= target + blocks
        assert (COPY in opcodes(bench)) == apart

    body()


# --- verify


@pytest.mark.parametrize(("oncs", "expected"), [(HAS_VERIFY, VERIFY), (0, READ)])
def test_verify(oncs: int, expected: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        disk = await bench.disk()
        await disk.do("VERIFY", 512, 512 * 600)
        assert set(opcodes(bench)) == {expected}
        assert sum(c.blocks for c in bench.soft.log) == 600

    body()


@pytest.mark.parametrize("oncs", [HAS_VERIFY, 0])
def test_what_cannot_be_read_is_not_verified(oncs: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        disk = await bench.disk()
        bench.soft.faults.fail = [0, MEDIA_ERROR]
        with pytest.raises(OSError) as caught:
            await disk.do("VERIFY", 0, 512 * 600)
        assert caught.value.errno == errno.ENODATA

    body()


@on_nvme()
async def test_a_drive_that_verifies_less_at_once_than_it_says_is_read(bench: NvmeBench) -> None:
    bench.soft.oncs = HAS_VERIFY
    disk = await bench.disk()
    bench.soft.faults.fail = [INVALID_FIELD]
    await disk.do("VERIFY", 0, 512 * 8)
    assert opcodes(bench) == [VERIFY, READ]


# --- what is said of them


@pytest.mark.parametrize("oncs", [EVERYTHING, 0])
def test_clients_are_told_what_can_be_asked_of_a_drive(oncs: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.oncs = oncs
        await bench.attach()
        (info,) = await bench.rpc("bdev_get_bdevs", name="Nvme0n1")
        types: dict[str, Any] = info["supported_io_types"]
        assert types["compare"]
        assert types["copy"]
        assert types["compare_and_write"]
        assert types["unmap"] == bool(oncs & HAS_DSM)

    body()


@on_nvme()
async def test_a_namespace_that_others_may_have_says_so(bench: NvmeBench) -> None:
    bench.soft.namespaces[1].shared = True
    await bench.attach()
    (info,) = await bench.rpc("bdev_get_bdevs", name="Nvme0n1")
    assert info["driver_specific"]["nvme"][0]["ns_data"]["can_share"] is True
