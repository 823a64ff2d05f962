"""How NVMe commands describe memory: PRPs, SGLs, and what is bounced, as the device sees it."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdev.kind import Op
from reactor.native import lib
from tests.support.nvme_bench import GuestMemory, NvmeBench, on_nvme
from tests.support.nvme_controller import INTERNAL_ERROR, PAGE, WRITE, Namespace


@on_nvme()
async def test_memory_that_the_device_sees_is_not_copied(bench: NvmeBench) -> None:
    disk = await bench.disk()
    with GuestMemory(bench) as guest:
        guest.map[0:8192] = data = os.urandom(8192)
        with guest.part(0, 8192) as part:
            await disk.write(0, part)
        with guest.part(65536, 8192) as part:
            await disk.read_into(0, part)
        assert guest.map[65536 : 65536 + 8192] == data
        assert bench.soft.log[0].prp1 == guest.iova
    assert (await bench.counters())["bounced"] == 0


@on_nvme()
async def test_dma_bounce_copies_even_memory_that_the_device_sees(bench: NvmeBench) -> None:
    disk = await bench.disk(dma="bounce")
    with GuestMemory(bench) as guest:
        with guest.part(0, 4096) as part:
            await disk.write(0, part)
        assert bench.soft.log[0].prp1 != guest.iova
    assert (await bench.counters())["bounced"] == 1


@pytest.mark.parametrize("at", [0, 4, 512, 4092])
@pytest.mark.parametrize("length", [512, 4096, 4608, 8192, 8704, 65536])
def test_one_piece_at_any_offset_of_a_page_goes_in_place(at: int, length: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        disk = await bench.disk()
        with GuestMemory(bench) as guest:
            guest.map[at : at + length] = data = os.urandom(length)
            with guest.part(at, length) as part:
                await disk.write(0, part)
            assert bench.soft.namespaces[1].data[:length] == data
            with guest.part(at + 131072, length) as part:
                await disk.read_into(0, part)
            assert guest.map[at + 131072 : at + 131072 + length] == data
            assert guest.map[at + 131072 + length] == 0
        assert (await bench.counters())["bounced"] == 0

    body()


@on_nvme()
async def test_whole_pages_scattered_in_memory_are_one_command_in_place(bench: NvmeBench) -> None:
    disk = await bench.disk()
    with GuestMemory(bench) as guest:
        places = [5 * PAGE + 1024, 9 * PAGE, 2 * PAGE, 40 * PAGE]
        lengths = [PAGE - 1024, PAGE, 2 * PAGE, 1024]
        parts = [guest.part(a, n) for a, n in zip(places, lengths, strict=True)]
        for part in parts:
            part[:] = os.urandom(len(part))
        expected = b"".join(bytes(part) for part in parts)
        await disk.write(0, *parts)
        assert bench.soft.namespaces[1].data[: len(expected)] == expected
        assert len(bench.soft.log) == 1
        for part in parts:
            part.release()
    assert (await bench.counters())["bounced"] == 0


@pytest.mark.parametrize(("sgls", "step", "bounced"), [(1, 1, 0), (2, 4, 0), (2, 1, 1), (0, 4, 1)])
def test_what_prps_cannot_say_is_said_by_sgls_or_bounced(
    sgls: int, step: int, bounced: int
) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.sgls = sgls
        disk = await bench.disk()
        with GuestMemory(bench) as guest:
            parts = [guest.part(8192 * i + step, 512) for i in range(8)]
            for part in parts:
                part[:] = os.urandom(512)
            expected = b"".join(bytes(part) for part in parts)
            await disk.write(0, *parts)
            assert bench.soft.namespaces[1].data[:4096] == expected
            for part in parts:
                part[:] = bytes(512)
            await disk.read_into(0, *parts)
            assert b"".join(bytes(part) for part in parts) == expected
            for part in parts:
                part.release()
        assert bool((await bench.counters())["bounced"]) == bool(bounced)
        assert not bench.soft.dma_faults

    body()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 200),  # page
            st.sampled_from([0, 0, 0, 4, 512, 2048, 3]),  # offset
            st.sampled_from([512, 1024, 4096, 4096, 8192, 100, 412, 12288]),
        ),
        min_size=1,
        max_size=12,
    ),
    sgls=st.sampled_from([0, 1, 2]),
    mdts=st.sampled_from([0, 1, 3]),
)
def test_any_scatter_list_moves_the_right_bytes(
    pieces: list[tuple[int, int, int]], sgls: int, mdts: int
) -> None:
    total = sum(length for _, _, length in pieces)
    pieces = [*pieces, (201, 0, -total % 512 or 512)]

    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.sgls, bench.soft.mdts = sgls, mdts
        disk = await bench.disk()
        with GuestMemory(bench) as guest:
            at, used = [], 0
            for _, offset, length in pieces:  # as scattered as drawn, but without overlap
                at.append(used + offset)
                used += -(-(offset + length) // PAGE) * PAGE
            parts = [guest.part(a, n) for a, (_, _, n) in zip(at, pieces, strict=True)]
            for part in parts:
                part[:] = os.urandom(len(part))
            expected = b"".join(bytes(part) for part in parts)
            await disk.write(512, *parts)
            assert bench.soft.namespaces[1].data[512 : 512 + len(expected)] == expected
            for part in parts:
                part[:] = bytes(len(part))
            await disk.read_into(512, *parts)
            assert b"".join(bytes(part) for part in parts) == expected
            for part in parts:
                part.release()
        assert not bench.soft.dma_faults

    body()


# --- lists of more than a page

BIG = 12 << 20


def big(bench: NvmeBench) -> bytearray:
    """Have a drive without a limit of transfers, and return its contents."""
    bench.soft.mdts = 0
    bench.soft.namespaces = {1: Namespace(BIG // 512)}
    return bench.soft.namespaces[1].data


@pytest.mark.parametrize("entries", [1, 2, 511, 512, 513, 1023, 1024, 2000])
@pytest.mark.parametrize("offset", [0, 2048])
def test_a_prp_list_goes_on_in_further_pages(entries: int, offset: int) -> None:
    length = (entries + 1) * PAGE - offset

    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        disk_data = big(bench)
        disk = await bench.disk()
        with GuestMemory(bench, BIG) as guest:
            guest.map[offset : offset + length] = data = os.urandom(length)
            with guest.part(offset, length) as part:
                await disk.write(512, part)
                assert disk_data[512 : 512 + length] == data
                guest.map[offset : offset + length] = bytes(length)
                await disk.read_into(512, part)
                assert guest.map[offset : offset + length] == data
        assert [c.blocks * 512 for c in bench.soft.log] == [length] * 2, "one command each"
        assert (await bench.counters())["bounced"] == 0

    body()


@pytest.mark.parametrize(
    ("pieces", "segments"), [(1, 0), (2, 1), (255, 1), (256, 1), (257, 2), (1500, 2), (4351, 2)]
)
def test_an_sgl_goes_on_in_a_second_segment(pieces: int, segments: int) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.sgls = 1
        disk_data = big(bench)
        disk = await bench.disk()
        with GuestMemory(bench, BIG) as guest:
            parts = [guest.part(1024 * i + 1, 512) for i in range(pieces)]
            for part in parts:
                part[:] = os.urandom(512)
            expected = b"".join(bytes(part) for part in parts)
            await disk.write(512, *parts)
            assert disk_data[512 : 512 + len(expected)] == expected
            for part in parts:
                part.release()
        # A single aligned piece needs no SGL; this one begins at an odd address.
        assert bench.soft.segments == segments
        assert len(bench.soft.log) == 1
        assert (await bench.counters())["bounced"] == 0

    body()


@pytest.mark.parametrize(("sgls", "expected"), [(0, [513, 187]), (1, [256, 44])])
def test_without_a_buffer_for_long_lists_commands_are_shorter(
    sgls: int, expected: list[int]
) -> None:
    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        disk_data = big(bench)
        bench.soft.sgls = sgls
        disk = await bench.disk()
        bench.soft.faults.hold = True
        taken = [disk.start(Op.READ, 0, buffers=[bytearray(65536)]) for _ in range(32)]
        with GuestMemory(bench, BIG) as guest:
            size = 512 if sgls else PAGE
            if sgls:
                parts = [guest.part(1024 * i + 1, size) for i in range(300)]
            else:
                parts = [guest.part(0, 700 * PAGE)]
            for part in parts:
                part[:] = os.urandom(len(part))
            data = b"".join(bytes(part) for part in parts)
            request = disk.start(Op.WRITE, 0, buffers=parts)
            await bench.until(lambda: len(bench.soft.log) == 34)
            bench.soft.faults.hold = False
            for each in [*taken, request]:
                await each.completed()
            for part in parts:
                part.release()
        assert disk_data[: len(data)] == data
        writes = [c.blocks * 512 // size for c in bench.soft.log if c.opcode == WRITE]
        assert writes == expected, "as much as one page describes, and the rest"

    body()


@on_nvme()
async def test_a_buffer_for_long_lists_comes_back(bench: NvmeBench) -> None:
    big(bench)
    disk = await bench.disk()
    with GuestMemory(bench, BIG) as guest, guest.part(0, 4 << 20) as part:
        for _ in range(2):
            requests = [disk.start(Op.READ, 0, buffers=[part]) for _ in range(40)]
            for request in requests:
                await request.completed()
        lengths = [c.blocks * 512 for c in bench.soft.log]
        assert lengths.count(4 << 20) >= 64, "32 buffers, twice"
        bench.soft.log.clear()
        await disk.read_into(0, part)
        assert [c.blocks * 512 for c in bench.soft.log] == [4 << 20]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(
        st.tuples(
            st.integers(1, 400),  # pieces of this kind, one after the other
            st.sampled_from([512, 4096, 8192, 1536, 20480, 1028, 516, 511]),  # bytes of each
            st.sampled_from([0, 0, 4, 512, 4096, 4092, 1]),  # what lies in between
        ),
        min_size=1,
        max_size=3,
    ),
    start=st.sampled_from([0, 0, 4, 2048, 4092, 1]),
    sgls=st.sampled_from([0, 1, 2]),
    mdts=st.sampled_from([0, 0, 1, 4, 9]),
    block=st.sampled_from([512, 4096]),
)
def test_any_long_scatter_list_moves_the_right_bytes(
    runs: list[tuple[int, int, int]], start: int, sgls: int, mdts: int, block: int
) -> None:
    places, at = [], start
    for count, length, gap in runs:
        for _ in range(count):
            if at + length > BIG - 3 * PAGE:
                break
            places.append((at, length))
            at += length + gap
    total = sum(length for _, length in places)
    places.append((at, -total % block or block))
    total += places[-1][1]

    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        bench.soft.mdts, bench.soft.sgls = mdts, sgls
        bench.soft.namespaces = {1: Namespace(BIG // block, block)}
        disk = await bench.disk()
        with GuestMemory(bench, BIG) as guest:
            guest.map[: at + PAGE] = memory = os.urandom(at + PAGE)
            expected = b"".join(memory[a : a + n] for a, n in places)
            parts = [guest.part(a, n) for a, n in places]
            await disk.write(block, *parts)
            assert bench.soft.namespaces[1].data[block : block + total] == expected
            guest.map[: at + PAGE] = bytes(at + PAGE)
            await disk.read_into(block, *parts)
            assert b"".join(bytes(part) for part in parts) == expected
            for part in parts:
                part.release()
        limit = PAGE << mdts if mdts else 8 << 20
        moved = [c.blocks * block for c in bench.soft.log]
        assert max(moved) <= limit
        assert sum(moved) == 2 * total, "every block once"
        assert not bench.soft.dma_faults

    body()


# --- plain commands, which are not kept but made again from their requests


@pytest.mark.parametrize("op", ["READ", "WRITE"])
@pytest.mark.parametrize(("at", "length"), [(0, 4096), (512, 4096), (4, 8188), (PAGE, 512)])
def test_a_plain_command_that_is_retried_is_the_same_again(op: str, at: int, length: int) -> None:
    length -= length % 512

    @on_nvme()
    async def body(bench: NvmeBench) -> None:
        disk = await bench.disk()
        bench.soft.namespaces[1].data[:] = os.urandom(len(bench.soft.namespaces[1].data))
        bench.soft.faults.fail = [INTERNAL_ERROR]
        with GuestMemory(bench) as guest:
            guest.map[at : at + length] = os.urandom(length)
            with guest.part(at, length) as part:
                await disk.start(Op[op], 1024, buffers=[part], flags=lib.BDEV_IO_FUA).completed()
            assert guest.map[at : at + length] == bench.soft.namespaces[1].data[1024:][:length]
        first, second = bench.soft.log
        assert first == second
        assert first.prp1 == guest.iova + at

    body()


@on_nvme()
async def test_plain_commands_survive_a_reset(bench: NvmeBench) -> None:
    disk = await bench.disk()
    bench.soft.faults.hold = True
    with GuestMemory(bench) as guest:
        guest.map[: 64 * PAGE] = data = os.urandom(64 * PAGE)
        parts = [guest.part(i * PAGE, PAGE) for i in range(64)]
        requests = [disk.start(Op.WRITE, i * PAGE, buffers=[p]) for i, p in enumerate(parts)]
        await bench.until(lambda: len(bench.soft.log) == 64)
        bench.soft.faults.hold = False
        await bench.rpc("bdev_nvme_reset_controller", name="Nvme0")
        for request in requests:
            await request.completed()
        for part in parts:
            part.release()
    assert bench.soft.namespaces[1].data[: 64 * PAGE] == data


@on_nvme()
async def test_memory_in_several_regions_is_reached_in_place(bench: NvmeBench) -> None:
    disk = await bench.disk()
    with GuestMemory(bench) as one, GuestMemory(bench) as other:
        for turn in range(6):
            guest = (one, other)[turn % 2]
            guest.map[:PAGE] = data = os.urandom(PAGE)
            with guest.part(0, PAGE) as part:
                await disk.write(turn * PAGE, part)
            assert bench.soft.log[-1].prp1 == guest.iova
            assert bench.soft.namespaces[1].data[turn * PAGE :][:PAGE] == data
    assert (await bench.counters())["bounced"] == 0
