"""One device of several: where its bytes are, and what happens when a base fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from bdev.io import Op
from reactor.errors import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench

KB = 1024


async def make(bench: Bench, level: str, *blocks: int, strip: int = 0) -> None:
    """Create R on M0, M1 ... of so many blocks."""
    for i, count in enumerate(blocks):
        await bench.rpc("bdev_malloc_create", name=f"M{i}", block_size=512, num_blocks=count)
    await bench.rpc(
        "bdev_raid_create",
        name="R",
        raid_level=level,
        strip_size_kb=strip,
        base_bdevs=[f"M{i}" for i in range(len(blocks))],
    )


def names(bench: Bench) -> list[str]:
    return [bdev.name for bdev in bench.registry]


def pattern(size: int) -> bytes:
    """Bytes of which every strip is different."""
    return b"".join(i.to_bytes(4, "little") for i in range(size // 4))


@on_bench()
async def test_a_concatenation_has_one_base_after_another(bench: Bench) -> None:
    await make(bench, "concat", 3, 5, 1)
    io = await bench.open("R")
    data = pattern(9 * 512)
    io.write(0, data)
    assert lib.bdev_size(io.handle) == 9 * 512
    for name, first, last in (("M0", 0, 3), ("M1", 3, 8), ("M2", 8, 9)):
        base = await bench.open(name)
        assert base.read(0, (last - first) * 512) == data[first * 512 : last * 512]
        await bench.close(name)
    assert io.read(1024, 6 * 512) == data[1024 : 8 * 512]
    await bench.close("R")


@on_bench()
async def test_strips_go_to_one_base_after_another(bench: Bench) -> None:
    await make(bench, "raid0", 16, 17, 19, strip=2)
    io = await bench.open("R")
    assert lib.bdev_size(io.handle) == 12 * 2 * KB  # four strips of each; the rest is not used
    data = pattern(12 * 2 * KB)
    io.write(0, data)
    for i in range(3):
        base = await bench.open(f"M{i}")
        strips = [data[at * 2 * KB : (at + 1) * 2 * KB] for at in range(i, 12, 3)]
        assert base.read(0, 4 * 2 * KB) == b"".join(strips)
        await bench.close(f"M{i}")
    await bench.close("R")


@pytest.mark.parametrize("op", [Op.UNMAP, Op.WRITE_ZEROES])
@on_bench()
async def test_a_range_without_data_is_one_request_a_base(bench: Bench, op: Op) -> None:
    await make(bench, "raid0", 64, 64, strip=1)
    io = await bench.open("R")
    io.write(0, b"x" * 128 * 512)
    io.start(op, 3 * 512, 100 * 512).finish()
    expected = b"x" * 3 * 512 + bytes(100 * 512) + b"x" * 25 * 512
    assert io.read(0, 128 * 512) == expected
    for i in range(2):
        stats = bench.reactor.stats.slot(bench.registry.find(f"M{i}").slot, "struct bdev_stats")
        assert stats.ops[op] == 1
    await bench.close("R")


@on_bench()
async def test_a_flush_reaches_every_base(bench: Bench) -> None:
    await make(bench, "concat", 8, 8, 8)
    io = await bench.open("R")
    io.flush()
    for i in range(3):
        stats = bench.reactor.stats.slot(bench.registry.find(f"M{i}").slot, "struct bdev_stats")
        assert stats.ops[Op.FLUSH] == 1
    await bench.close("R")


@on_bench()
async def test_a_piece_that_fails_fails_the_request_after_all_have_ended(bench: Bench) -> None:
    for i in range(2):
        await bench.rpc("bdev_malloc_create", name=f"M{i}", block_size=512, num_blocks=64)
        await bench.rpc("bdev_error_create", base_name=f"M{i}")
    await bench.rpc(
        "bdev_raid_create",
        name="R",
        raid_level="raid0",
        strip_size_kb=4,
        base_bdevs=["EE_M0", "EE_M1"],
    )
    io = await bench.open("R")
    for name, fault in (("EE_M0", "pending"), ("EE_M1", "failure")):
        await bench.rpc("bdev_error_inject_error", name=name, io_type="write", error_type=fault)
    request = io.start(Op.WRITE, 0, 0, [b"w" * 8 * KB])
    io.selector.select(0)
    assert not request.done
    await bench.rpc("bdev_error_resume_pending", name="EE_M0")
    with pytest.raises(OSError, match="WRITE") as caught:
        request.finish()
    assert caught.value.errno == errno.EIO
    assert io.read(0, 8 * KB) == b"w" * 4 * KB + bytes(4 * KB)
    await bench.close("R")


@on_bench()
async def test_more_pieces_than_the_pool_has_wait(bench: Bench, tmp_path: Path) -> None:
    names = []
    for i in range(2):
        path = tmp_path / f"disk{i}"
        path.write_bytes(bytes(1 << 20))
        await bench.rpc("bdev_uring_create", name=f"F{i}", filename=str(path), block_size=512)
        names.append(f"F{i}")
    await bench.rpc(
        "bdev_raid_create", name="R", raid_level="raid0", strip_size_kb=1, base_bdevs=names
    )
    io = await bench.open("R")
    data = pattern(1 << 20)
    requests = [
        io.start(Op.WRITE, at, 0, [data[at : at + (1 << 18)]]) for at in range(0, 1 << 20, 1 << 18)
    ]
    requests.append(io.start(Op.FLUSH))
    below = sum(
        lib.bdev_in_flight(bench.reactor.handles[bench.registry.find(name).id]) for name in names
    )
    assert below == 128 + len(names)  # all parts that there are, and the flush of each
    for request in requests:
        request.finish()
    assert io.read(0, 1 << 20) == data
    await bench.close("R")


@pytest.mark.parametrize(
    ("level", "strip", "message"),
    [
        ("raid5f", 4, "raid_level raid5f"),
        ("raid0", 0, "strip_size_kb 0"),
        ("raid0", 3, "strip_size_kb 3"),
        ("raid0", 64, "less than a strip"),
        ("raid9", 4, "raid_level"),
    ],
)
@on_bench()
async def test_a_layout_that_cannot_be_is_refused(
    bench: Bench, level: str, strip: int, message: str
) -> None:
    with pytest.raises(OperationError, match=message):
        await make(bench, level, 64, 64, strip=strip)
    assert names(bench) == ["M0", "M1"]
    assert not any(bdev.claims for bdev in bench.registry)


@on_bench()
async def test_bases_must_differ_and_have_the_same_blocks(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="A", block_size=512, num_blocks=64)
    await bench.rpc("bdev_null_create", name="B", block_size=4096, num_blocks=64)
    for bases, message in ((["A", "A"], "twice"), (["A", "B"], "must be the same"), ([], "1 to")):
        with pytest.raises(OperationError, match=message):
            await bench.rpc("bdev_raid_create", name="R", raid_level="concat", base_bdevs=bases)


@on_bench()
async def test_raid_devices_are_listed_as_spdk_lists_them(bench: Bench) -> None:
    await make(bench, "raid0", 64, 64, strip=4)
    for category, count in (("all", 1), ("online", 1), ("offline", 0), ("configuring", 0)):
        assert len(await bench.rpc("bdev_raid_get_bdevs", category=category)) == count
    (entry,) = await bench.rpc("bdev_raid_get_bdevs", category="all")
    assert (entry["name"], entry["raid_level"], entry["strip_size_kb"]) == ("R", "raid0", 4)
    assert [base["name"] for base in entry["base_bdevs_list"]] == ["M0", "M1"]
    calls = bench.registry.config()
    async with Bench() as again:
        for call in calls:
            await again.rpc(call["method"], **call["params"])
        assert again.registry.config() == calls


@on_bench()
async def test_the_bases_are_free_after_deletion(bench: Bench) -> None:
    await make(bench, "concat", 8, 8)
    with pytest.raises(OperationError, match="M1 is claimed by raid R"):
        await bench.rpc("bdev_malloc_delete", name="M1")
    await bench.rpc("bdev_raid_delete", name="R")
    await bench.rpc("bdev_malloc_delete", name="M1")
    assert names(bench) == ["M0"]
