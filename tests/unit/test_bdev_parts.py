"""Parts of a device: cut by hand, or found in its partition table."""

from __future__ import annotations

import asyncio
import errno
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdev.gpt_table import Partition, TableError, read_table
from bdev.kind import Bdev
from reactor.errors import OperationError
from tests.support.bdevs import Bench, on_bench
from tests.support.gpt import LINUX, gpt_disk, part_uuid

PARTS = [(64, 127, "boot"), (256, 1023, "root")]


def table_of(disk: bytes, block_size: int = 512) -> list[Partition]:
    """Return the partitions of a disk; none of what is read is beyond its end."""

    async def read(first: int, count: int) -> bytes:
        data = bytes(disk[first * block_size : (first + count) * block_size])
        assert len(data) == count * block_size
        return data

    return asyncio.run(read_table(read, len(disk) // block_size, block_size))


async def split(bench: Bench, count: int, size_mb: int = 0, blocks: int = 8192) -> list[str]:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=blocks)
    names: list[str] = await bench.rpc(
        "bdev_split_create", base_bdev="M", split_count=count, split_size_mb=size_mb
    )
    return names


def put(path: Path, disk: bytes) -> str:
    path.write_bytes(disk)
    return str(path)


async def file_disk(bench: Bench, path: Path, disk: bytes) -> None:
    name = put(path, disk)
    await bench.rpc("bdev_uring_create", name="F", filename=name, block_size=512)


def names(bench: Bench) -> list[str]:
    return [bdev.name for bdev in bench.registry]


# --- split


@on_bench()
async def test_parts_divide_a_device_and_do_not_touch_each_other(bench: Bench) -> None:
    assert await split(bench, 3, blocks=100) == ["Mp0", "Mp1", "Mp2"]
    for i in range(3):
        io = await bench.open(f"Mp{i}")
        io.write(0, bytes([65 + i]) * 33 * 512)
        with pytest.raises(OSError, match="WRITE") as caught:
            io.write(32 * 512, bytes(1024))
        assert caught.value.errno == errno.ERANGE
        io.flush()
    base = await bench.open("M")
    assert base.read(0, 100 * 512) == b"".join(
        [bytes([65 + i]) * 33 * 512 for i in range(3)] + [bytes(512)]
    )
    for name in ("Mp0", "Mp1", "Mp2", "M"):
        await bench.close(name)


@on_bench()
async def test_parts_have_the_size_that_is_asked_for(bench: Bench) -> None:
    await split(bench, 2, size_mb=1)
    assert [bench.registry.find(f"Mp{i}").size for i in range(2)] == [1 << 20] * 2
    (entry,) = await bench.rpc("bdev_get_bdevs", name="Mp1")
    assert entry["driver_specific"] == {"split": {"base_bdev": "M", "offset_blocks": 2048}}


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1025, 0), (5, 1), (2, -1)])
@on_bench()
async def test_parts_that_do_not_fit_are_refused(bench: Bench, count: int, size: int) -> None:
    with pytest.raises(OperationError, match=r"split_|do not fit"):
        await split(bench, count, size)
    assert names(bench) == ["M"]
    assert bench.registry.find("M").claims == []


@on_bench()
async def test_a_part_that_cannot_be_made_leaves_none(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="Mp1", block_size=512, num_blocks=8)
    with pytest.raises(OperationError, match="File exists"):
        await split(bench, 3)
    assert names(bench) == ["Mp1", "M"]


@on_bench()
async def test_all_parts_are_deleted_or_none(bench: Bench) -> None:
    await split(bench, 2)
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="Mp1")
    with pytest.raises(OperationError, match="Mp1 is claimed by passthru P"):
        await bench.rpc("bdev_split_delete", base_bdev="M")
    with pytest.raises(OperationError, match="M is claimed by split of M"):
        await bench.rpc("bdev_malloc_delete", name="M")
    assert names(bench) == ["M", "Mp0", "Mp1", "P"]
    await bench.rpc("bdev_passthru_delete", name="P")
    await bench.rpc("bdev_split_delete", base_bdev="M")
    await bench.rpc("bdev_malloc_delete", name="M")
    assert names(bench) == []


@on_bench()
async def test_one_call_is_saved_for_all_parts(bench: Bench) -> None:
    await split(bench, 4)
    methods = [call["method"] for call in bench.registry.config()]
    assert methods == ["bdev_malloc_create", "bdev_split_create"]


@on_bench()
async def test_parts_of_a_device_that_shrinks_end_where_it_ends(bench: Bench) -> None:
    await split(bench, 2)
    await bench.registry.resize(bench.registry.find("M"), 5000)
    assert [bench.registry.find(f"Mp{i}").num_blocks for i in range(2)] == [4096, 904]
    await bench.registry.resize(bench.registry.find("M"), 8192)
    assert [bench.registry.find(f"Mp{i}").num_blocks for i in range(2)] == [4096, 4096]


# --- the partition table


@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_table_is_read(block_size: int) -> None:
    disk = gpt_disk(PARTS, block_size=block_size)
    assert table_of(disk, block_size) == [
        Partition(1, LINUX, part_uuid(1), 64, 127, "boot"),
        Partition(2, LINUX, part_uuid(2), 256, 1023, "root"),
    ]


@pytest.mark.parametrize("where", [512 + 60, 1024 + 40])
def test_the_backup_stands_in_for_a_damaged_table(where: int) -> None:
    disk = gpt_disk(PARTS)
    disk[where] ^= 1
    assert len(table_of(disk)) == 2


def test_two_damaged_tables_are_an_error() -> None:
    disk = gpt_disk(PARTS)
    disk[512 + 60] ^= 1
    disk[-512 + 60] ^= 1
    with pytest.raises(TableError, match="checksum"):
        table_of(disk)


@pytest.mark.parametrize("size", [0, 512, 1024, 1536, 512 * 100])
def test_a_disk_without_a_table_has_no_partitions(size: int) -> None:
    assert table_of(bytes(size)) == []


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ([(64, 100, "a"), (100, 200, "b")], "overlap"),
        ([(100, 99, "a")], "blocks 100 to 99"),
        ([(2, 99, "a")], "blocks 2 to 99"),
        ([(64, 1 << 63, "a")], "blocks 64 to"),
    ],
)
def test_partitions_in_impossible_places_are_an_error(
    parts: list[tuple[int, int, str]], what: str
) -> None:
    with pytest.raises(TableError, match=what):
        table_of(gpt_disk(parts))


@given(st.data())
def test_whatever_a_table_says_its_partitions_are_on_the_disk(data: st.DataObject) -> None:
    """Headers with valid checksums and any contents: never an error of another kind."""
    disk = gpt_disk(PARTS)
    for here in (512, len(disk) - 512):
        for offset, form in (
            (12, "<I"),
            (40, "<Q"),
            (48, "<Q"),
            (72, "<Q"),
            (80, "<I"),
            (84, "<I"),
        ):
            if data.draw(st.booleans()):
                top = 2 ** (struct.calcsize(form) * 8) - 1
                value = data.draw(st.integers(0, 4096) | st.integers(0, top))
                struct.pack_into(form, disk, here + offset, value)
        size = min(struct.unpack_from("<I", disk, here + 12)[0], 512)
        disk[here + 16 : here + 20] = bytes(4)
        crc = zlib.crc32(disk[here : here + size])
        struct.pack_into("<I", disk, here + 16, crc)
    try:
        partitions = table_of(disk)
    except TableError:
        return
    for partition in partitions:
        assert 0 < partition.num_blocks <= 2048
        assert 0 <= partition.first <= partition.last < 2048


# --- partitions as devices


@on_bench()
async def test_partitions_are_found_when_a_disk_is_created(bench: Bench, tmp_path: Path) -> None:
    disk = gpt_disk(PARTS)
    disk[64 * 512 : 65 * 512] = b"B" * 512
    await file_disk(bench, tmp_path / "disk", disk)
    assert names(bench) == ["F", "Fp1", "Fp2"]
    (entry,) = await bench.rpc("bdev_get_bdevs", name="Fp2")
    assert entry["num_blocks"] == 768
    assert entry["uuid"] == str(part_uuid(2))
    assert entry["driver_specific"]["gpt"] == {
        "base_bdev": "F",
        "offset_blocks": 256,
        "partition_type_guid": str(LINUX),
        "unique_partition_guid": str(part_uuid(2)),
        "partition_name": "root",
    }
    assert bench.reactor.handles == {}
    io = await bench.open("Fp1")
    assert io.read(0, 512) == b"B" * 512
    await bench.close("Fp1")


@on_bench()
async def test_partitions_claim_their_base_only_while_they_are_open(
    bench: Bench, tmp_path: Path
) -> None:
    await file_disk(bench, tmp_path / "disk", gpt_disk(PARTS))
    assert bench.registry.find("F").claims == []
    await bench.open("Fp1")
    await bench.open("Fp2")
    with pytest.raises(OperationError, match="by gpt of F"):
        await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="F")
    await bench.close("Fp1")
    await bench.close("Fp2")
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="F")
    with pytest.raises(OperationError, match="by passthru P"):
        await bench.open("Fp1")
    assert bench.reactor.handles == {}


@on_bench()
async def test_a_partition_is_not_opened_on_a_disk_that_is_served(
    bench: Bench, tmp_path: Path
) -> None:
    await file_disk(bench, tmp_path / "disk", gpt_disk(PARTS))

    async def removed(_: Bdev) -> None:
        pass

    bench.registry.on_removed(bench.registry.find("F"), removed)
    with pytest.raises(OperationError, match="F is in use"):
        await bench.open("Fp1")


@on_bench()
async def test_partitions_go_with_their_disk_and_are_not_saved(
    bench: Bench, tmp_path: Path
) -> None:
    await file_disk(bench, tmp_path / "disk", gpt_disk(PARTS))
    assert [call["method"] for call in bench.registry.config()] == ["bdev_uring_create"]
    await bench.rpc("bdev_uring_delete", name="F")
    assert names(bench) == []


@on_bench()
async def test_a_disk_stays_while_something_stands_on_its_partition(
    bench: Bench, tmp_path: Path
) -> None:
    await file_disk(bench, tmp_path / "disk", gpt_disk(PARTS))
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="Fp1")
    with pytest.raises(OperationError, match="Fp1 is claimed by passthru P"):
        await bench.rpc("bdev_uring_delete", name="F")
    assert names(bench) == ["F", "Fp1", "Fp2", "P"]


@on_bench()
async def test_a_copy_of_a_disk_gets_other_uuids(bench: Bench, tmp_path: Path) -> None:
    await file_disk(bench, tmp_path / "disk", gpt_disk(PARTS))
    (tmp_path / "copy").write_bytes(gpt_disk(PARTS))
    path = str(tmp_path / "copy")
    await bench.rpc("bdev_uring_create", name="C", filename=path, block_size=512)
    assert bench.registry.find("Cp1").uuid != str(part_uuid(1))


@on_bench()
async def test_a_damaged_table_is_a_line_in_the_log_and_an_error_when_asked(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await file_disk(bench, tmp_path / "disk", gpt_disk([(64, 100, "a"), (70, 80, "b")]))
    assert names(bench) == ["F"]
    assert "partitions 1 and 2 overlap" in caplog.text
    with pytest.raises(OperationError, match="damaged partition table"):
        await bench.rpc("bdev_examine", name="F")


@on_bench()
async def test_a_disk_is_examined_again_on_request(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=2048)
    io = await bench.open("M")
    io.write(0, gpt_disk(PARTS))
    for _ in range(2):
        await bench.rpc("bdev_examine", name="M")
        assert names(bench) == ["M", "Mp1", "Mp2"]
    await bench.close("M")
