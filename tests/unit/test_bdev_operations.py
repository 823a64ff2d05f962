"""The bdev operations as clients see them: SPDK's parameters, replies and error codes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import uuid

import pytest

from bdev import backing, engine
from reactor.errors import INVALID_PARAMS, OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench
from tests.support.descriptors import open_fds

DISK = {"block_size": 512, "num_blocks": 2048}


async def refused(bench: Bench, code: int, method: str, **params) -> str:
    with pytest.raises(OperationError) as caught:
        await bench.rpc(method, **params)
    assert caught.value.code == code, caught.value.message
    return caught.value.message


# What SPDK answers to bdev_get_bdevs of a null disk, by member.
SPDK_MEMBERS = [
    "name",
    "aliases",
    "product_name",
    "block_size",
    "num_blocks",
    "preferred_write_alignment",
    "preferred_write_granularity",
    "optimal_write_size",
    "preferred_unmap_alignment",
    "preferred_unmap_granularity",
    "uuid",
    "assigned_rate_limits",
    "claimed",
    "zoned",
    "supported_io_types",
    "driver_specific",
]
SPDK_IOSTAT = [
    "name",
    *("bytes_read", "num_read_ops", "bytes_written", "num_write_ops"),
    *("bytes_unmapped", "num_unmap_ops", "bytes_copied", "num_copy_ops"),
    *("read_latency_ticks", "max_read_latency_ticks", "min_read_latency_ticks"),
    *("write_latency_ticks", "max_write_latency_ticks", "min_write_latency_ticks"),
    *("unmap_latency_ticks", "max_unmap_latency_ticks", "min_unmap_latency_ticks"),
    *("copy_latency_ticks", "max_copy_latency_ticks", "min_copy_latency_ticks"),
    "io_error",
]


@on_bench()
async def test_a_description_has_the_members_that_spdk_has(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N0", block_size=512, num_blocks=2097152)
    (entry,) = await bench.rpc("bdev_get_bdevs", name="N0")
    assert list(entry) == SPDK_MEMBERS
    assert entry["aliases"] == [entry["uuid"]]
    assert entry["num_blocks"] == 2097152
    assert len(entry["supported_io_types"]) == 22
    supported = {name for name, is_ in entry["supported_io_types"].items() if is_}
    own = {"read", "write", "unmap", "flush", "reset", "write_zeroes"}
    assert supported == own | {"compare", "compare_and_write", "copy"}


@on_bench()
async def test_a_malloc_disk_without_a_name_is_numbered(bench: Bench) -> None:
    assert await bench.rpc("bdev_malloc_create", **DISK) == "Malloc0"
    assert await bench.rpc("bdev_malloc_create", **DISK) == "Malloc1"
    await bench.rpc("bdev_malloc_delete", name="Malloc0")
    assert await bench.rpc("bdev_malloc_create", **DISK) == "Malloc0"


@pytest.mark.parametrize("method", ["bdev_malloc_create", "bdev_null_create"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_size": 500}, "block_size 500: must be 512 or 4096"),
        ({"block_size": 0}, "block_size 0"),
        ({"block_size": -512}, "block_size -512"),
        ({"num_blocks": 0}, "num_blocks 0: must be 1 or more"),
        ({"num_blocks": -1}, "num_blocks -1"),
        ({"num_blocks": 1 << 63}, "num_blocks 9223372036854775808"),
        ({"uuid": "nonsense"}, "uuid 'nonsense'"),
        ({"name": ""}, "name ''"),
        ({"name": "a\nb"}, "name 'a\\nb'"),
        ({"name": "x" * 256}, "1 to 255"),
        ({"md_size": 8}, "md_size 8: not supported"),
        ({"dif_type": 1}, "dif_type 1: not supported"),
        ({"physical_block_size": 1000}, "physical_block_size 1000"),
        ({"physical_block_size": 256}, "physical_block_size 256"),
    ],
)
@on_bench()
async def test_a_bad_value_is_named(bench: Bench, method: str, changes: dict, says: str) -> None:
    message = await refused(bench, -errno.EINVAL, method, **{"name": "X", **DISK, **changes})
    assert says in message


@pytest.mark.parametrize(
    "changes",
    [{"block_size": "512"}, {"num_blocks": None}, {"bogus": 1}, {"uuid": 5}, {"name": 7}],
)
@on_bench()
async def test_a_value_of_a_wrong_type_is_refused(bench: Bench, changes: dict) -> None:
    await refused(bench, INVALID_PARAMS, "bdev_malloc_create", **{"name": "X", **DISK, **changes})


@on_bench()
async def test_more_memory_than_the_machine_has_is_refused(bench: Bench) -> None:
    message = await refused(
        bench, -errno.ENOMEM, "bdev_malloc_create", name="X", block_size=4096, num_blocks=1 << 40
    )
    assert "more than" in message


@on_bench()
async def test_a_name_or_uuid_that_is_taken_is_refused(bench: Bench) -> None:
    ident = str(uuid.uuid4())
    await bench.rpc("bdev_malloc_create", name="M", uuid=ident, **DISK)
    await refused(bench, -errno.EEXIST, "bdev_null_create", name="M", **DISK)
    await refused(bench, -errno.EEXIST, "bdev_null_create", name="N", uuid=ident, **DISK)
    await refused(bench, -errno.EEXIST, "bdev_null_create", name=ident, **DISK)


@pytest.mark.parametrize("kind", ["malloc", "null", "uring", "aio"])
@on_bench()
async def test_deleting_what_is_not_there_is_no_such_device(bench: Bench, kind: str) -> None:
    await refused(bench, -errno.ENODEV, f"bdev_{kind}_delete", name="none")


@on_bench()
async def test_a_disk_is_not_deleted_as_another_kind(bench: Bench) -> None:
    await bench.rpc("bdev_null_create", name="N", **DISK)
    await refused(bench, -errno.ENODEV, "bdev_malloc_delete", name="N")
    assert [disk.name for disk in bench.registry] == ["N"]


@on_bench()
async def test_names_of_2018_are_the_same_operations(bench: Bench) -> None:
    assert await bench.rpc("construct_malloc_bdev", name="M", **DISK) == "M"
    assert [entry["name"] for entry in await bench.rpc("get_bdevs")] == ["M"]
    assert await bench.rpc("delete_malloc_bdev", name="M") is True


@on_bench()
async def test_asking_for_a_disk_can_wait_for_it(bench: Bench) -> None:
    asking = asyncio.create_task(bench.rpc("bdev_get_bdevs", name="later", timeout=60_000))
    await asyncio.sleep(0)
    await bench.rpc("bdev_null_create", name="other", **DISK)
    await asyncio.sleep(0)
    assert not asking.done()
    await bench.rpc("bdev_null_create", name="later", **DISK)
    assert (await asking)[0]["name"] == "later"


@on_bench()
async def test_waiting_for_a_disk_ends(bench: Bench) -> None:
    with pytest.raises(OperationError, match="No such device"):
        await bench.rpc("bdev_get_bdevs", name="never", timeout=5)


# --- statistics


@on_bench(reactors=2)
async def test_statistics_are_summed_over_reactors(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    for reactor in range(2):
        io = await bench.open("M", reactor)
        io.write(0, bytes(4096))
        io.read(0, 512)
        io.unmap(0, 8192)
    reply = await bench.rpc("bdev_get_iostat", names=["M"])
    assert list(reply) == ["tick_rate", "ticks", "bdevs"]
    assert reply["tick_rate"] == lib.reactor_tick_rate()
    (entry,) = reply["bdevs"]
    assert list(entry) == [*SPDK_IOSTAT, "queue_depth"]
    assert (entry["bytes_written"], entry["num_write_ops"]) == (8192, 2)
    assert (entry["bytes_read"], entry["num_read_ops"]) == (1024, 2)
    assert (entry["bytes_unmapped"], entry["num_unmap_ops"]) == (16384, 2)
    assert 0 < entry["min_read_latency_ticks"] <= entry["max_read_latency_ticks"]


@on_bench(reactors=2)
async def test_statistics_of_each_reactor(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    (await bench.open("M", 1)).read(0, 512)
    (entry,) = (await bench.rpc("bdev_get_iostat", name="M", per_channel=True))["bdevs"]
    assert [channel["num_read_ops"] for channel in entry["channels"]] == [0, 1]


@on_bench()
async def test_statistics_of_a_disk_that_is_not_there(bench: Bench) -> None:
    await refused(bench, -errno.ENODEV, "bdev_get_iostat", names=["none"])


@on_bench()
async def test_reading_statistics_can_start_them_afresh(bench: Bench) -> None:
    await bench.rpc("bdev_malloc_create", name="M", **DISK)
    io = await bench.open("M")

    async def stat(mode: str) -> tuple[int, int]:
        (entry,) = (await bench.rpc("bdev_get_iostat", name="M", reset_mode=mode))["bdevs"]
        return entry["num_read_ops"], entry["max_read_latency_ticks"]

    io.read(0, 512)
    assert (await stat("maxmin"))[1] > 0
    assert await stat("none") == (1, 0)
    io.read(0, 512)
    assert (await stat("all"))[0] == 2
    assert await stat("none") == (0, 0)
    io.read(0, 512)
    assert (await stat("none"))[0] == 1


# --- files


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.mark.parametrize("method", ["bdev_uring_create", "bdev_aio_create"])
@on_bench()
async def test_a_file_becomes_a_disk_of_its_exact_size(bench: Bench, path, method: str) -> None:
    path.write_bytes(bytes(1000 * 512 + 100))
    assert await bench.rpc(method, name="F", filename=str(path), block_size=512) == "F"
    (entry,) = await bench.rpc("bdev_get_bdevs", name="F")
    assert (entry["block_size"], entry["num_blocks"]) == (512, 1000)
    io = await bench.open("F")
    io.write(999 * 512, b"end!" * 128)
    assert path.read_bytes()[999 * 512 : 1000 * 512] == b"end!" * 128
    assert path.stat().st_size == 1000 * 512 + 100


@on_bench()
async def test_a_missing_file_is_refused(bench: Bench) -> None:
    message = await refused(
        bench, -errno.ENOENT, "bdev_uring_create", name="F", filename="/nonexistent/file"
    )
    assert message == "No such file or directory: /nonexistent/file"


@on_bench()
async def test_what_is_no_disk_is_refused(bench: Bench, tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("/dev/zero", str(tmp_path / "fifo")):
        message = await refused(bench, -errno.EINVAL, "bdev_uring_create", name="F", filename=name)
        assert "neither a regular file nor a block device" in message
    await refused(bench, -errno.EISDIR, "bdev_aio_create", name="F", filename=str(tmp_path))


@on_bench()
async def test_a_file_shorter_than_a_block_is_refused_and_closed(bench: Bench, path) -> None:
    path.write_bytes(bytes(511))
    before = open_fds()
    message = await refused(
        bench, -errno.EINVAL, "bdev_uring_create", name="F", filename=str(path), block_size=512
    )
    assert "511 bytes" in message
    assert open_fds() == before


@on_bench()
async def test_a_file_is_written_by_one_disk_only(bench: Bench, path) -> None:
    await bench.rpc("bdev_uring_create", name="F", filename=str(path))
    message = await refused(bench, -errno.EBUSY, "bdev_aio_create", name="G", filename=str(path))
    assert str(path) in message
    await refused(
        bench, -errno.EBUSY, "bdev_aio_create", name="G", filename=str(path), readonly=True
    )
    await bench.rpc("bdev_uring_delete", name="F")
    await bench.rpc("bdev_aio_create", name="G", filename=str(path))


@on_bench()
async def test_a_file_is_read_by_as_many_disks_as_like(bench: Bench, path) -> None:
    for name in ("A", "B"):
        await bench.rpc("bdev_aio_create", name=name, filename=str(path), readonly=True)
        assert (await bench.open(name)).read(0, 4096) == path.read_bytes()[:4096]


@on_bench()
async def test_another_process_keeps_its_lock(bench: Bench, path) -> None:
    holder = await asyncio.create_subprocess_exec(
        *("flock", str(path), "sh", "-c", "echo locked; read x"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert await holder.stdout.readline() == b"locked\n"
    await refused(bench, -errno.EBUSY, "bdev_uring_create", name="F", filename=str(path))
    await holder.communicate(b"\n")
    await bench.rpc("bdev_uring_create", name="F", filename=str(path))


@on_bench()
async def test_a_file_that_cannot_be_written_is_served_read_only(
    bench: Bench, path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def open_as_nobody(name, flags, *args, **kwargs):
        """Root may write everything; most users may not."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_as_nobody)
    await bench.rpc("bdev_uring_create", name="F", filename=str(path))
    monkeypatch.undo()
    (entry,) = await bench.rpc("bdev_get_bdevs", name="F")
    assert not entry["supported_io_types"]["write"]
    io = await bench.open("F")
    with pytest.raises(OSError, match="Read-only"):
        io.write(0, bytes(4096))


@on_bench()
async def test_the_uuid_of_a_file_is_stable(bench: Bench, path) -> None:
    seen = set()
    for _ in range(2):
        await bench.rpc("bdev_uring_create", name="F", filename=str(path))
        seen.add(bench.registry.find("F").uuid)
        await bench.rpc("bdev_uring_delete", name="F")
    assert len(seen) == 1


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
@on_bench()
async def test_io_uring_that_is_asked_for_and_refused_is_one_clear_error(
    bench: Bench, path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Refusing:
        def __getattr__(self, name: str):
            return (lambda: -code) if name == "uring_probe" else getattr(lib, name)

    monkeypatch.setattr(engine, "lib", Refusing())
    wanted = {"name": "F", "filename": str(path), "engine": "io_uring"}
    message = await refused(bench, -errno.EINVAL, "bdev_uring_create", **wanted)
    assert "io_uring" in message
    assert "seccomp" in message


# --- configuration


@on_bench()
async def test_the_configuration_creates_the_same_disks_again(bench: Bench, path) -> None:
    await bench.rpc("bdev_malloc_create", name="M", physical_block_size=4096, **DISK)
    await bench.rpc("bdev_null_create", name="N", optimal_write_size=8, **DISK)
    await bench.rpc("bdev_uring_create", name="U", filename=str(path))
    before = await bench.rpc("bdev_get_bdevs")
    config = bench.registry.config()
    assert [call["method"].split("_")[1] for call in config] == ["malloc", "null", "uring"]
    for call in config:
        await bench.rpc(call["method"].replace("create", "delete"), name=call["params"]["name"])
    for call in config:
        await bench.rpc(call["method"], **call["params"])
    assert await bench.rpc("bdev_get_bdevs") == before
    assert bench.registry.config() == config


@on_bench()
async def test_a_configuration_that_spdk_saved_is_understood(bench: Bench) -> None:
    params = {
        "name": "M0",
        "num_blocks": 131072,
        "block_size": 512,
        "physical_block_size": 512,
        "uuid": "9f1edd9f-4c10-4b85-874c-e7d1453677b9",
        "optimal_io_boundary": 0,
        "md_size": 0,
        "dif_type": 0,
        "dif_is_head_of_md": False,
        "dif_pi_format": 0,
        "numa_id": -1,
    }
    assert await bench.rpc("bdev_malloc_create", **params) == "M0"
    assert bench.registry.find("M0").uuid == params["uuid"]


@on_bench()
async def test_a_lock_that_a_dead_process_has_left_is_waited_for(bench: Bench, path) -> None:
    """The kernel lets go of a killed process's files when its io_uring has come to an end."""
    fd = os.open(path, os.O_RDWR)  # which is what the kernel still has
    holder = await asyncio.create_subprocess_exec("flock", str(fd), pass_fds=[fd])
    assert await holder.wait() == 0
    creating = asyncio.create_task(bench.rpc("bdev_uring_create", name="U", filename=str(path)))
    await asyncio.sleep(0.02)
    assert not creating.done()
    os.close(fd)
    assert await creating == "U"


@on_bench()
async def test_a_lock_that_a_living_process_lets_go_is_waited_for(bench: Bench, path) -> None:
    """As io_uring does, which closes a file some time after it was given back."""
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    creating = asyncio.create_task(bench.rpc("bdev_uring_create", name="U", filename=str(path)))
    await asyncio.sleep(0.02)
    assert not creating.done()
    os.close(fd)
    assert await creating == "U"


@on_bench()
async def test_a_lock_that_stays_is_an_error_in_the_end(
    bench: Bench, path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "LETTING_GO", 0.05)
    fd = os.open(path, os.O_RDWR)
    holder = await asyncio.create_subprocess_exec("flock", str(fd), pass_fds=[fd])
    assert await holder.wait() == 0
    await refused(bench, -errno.EBUSY, "bdev_uring_create", name="U", filename=str(path))
    os.close(fd)


@on_bench()
async def test_creation_and_deletion_leave_no_descriptor(bench: Bench, path) -> None:
    before = open_fds()
    for _ in range(3):
        await bench.rpc("bdev_malloc_create", name="M", **DISK)
        await bench.rpc("bdev_uring_create", name="U", filename=str(path))
        for name in ("M", "U"):
            (await bench.open(name)).read(0, 4096)
            await bench.close(name)
        await bench.rpc("bdev_malloc_delete", name="M")
        await bench.rpc("bdev_uring_delete", name="U")
        await refused(
            bench, -errno.EINVAL, "bdev_malloc_create", name="X", block_size=1, num_blocks=1
        )
    assert open_fds() == before
