"""How NVMe commands describe memory: PRPs, SGLs, and what is bounced, as the device sees it."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdev.kind import Op
from reactor.native import lib
from tests.support.nvme_bench import GuestMemory, NvmeBench, on_nvme
from tests.support.nvme_controller import INTERNAL_ERROR, PAGE


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
