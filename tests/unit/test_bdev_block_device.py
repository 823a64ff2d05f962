"""File disks on block devices of the system: loop devices, where root may make them."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reactor.errors import OperationError
from tests.support.bdevs import Bench, on_bench, pages

SIZE = 4 << 20


def command(*words: str) -> str:
    """Run a command and return what it prints; skip the test where it does not work."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no {words[0]} command")
    if done.returncode != 0:
        pytest.skip(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def contents(device: str) -> bytes:
    return Path(device).read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"\xff" * SIZE)
    return path


@pytest.fixture
def loop(image: Path) -> Iterator[Callable[[int], str]]:
    """Make a block device of an image, with logical blocks of some size."""
    devices = []

    def make(block_size: int) -> str:
        options = ("--direct-io=on", f"--sector-size={block_size}")
        devices.append(command("losetup", "--find", "--show", *options, str(image)))
        return devices[-1]

    yield make
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("block_size", [512, 4096])
@on_bench()
async def test_a_block_device_is_served_in_its_own_blocks(
    bench: Bench, loop: Callable[[int], str], block_size: int
) -> None:
    device = loop(block_size)
    await bench.rpc("bdev_uring_create", name="B", filename=device)
    (entry,) = await bench.rpc("bdev_get_bdevs", name="B")
    assert entry["block_size"] == block_size
    assert entry["num_blocks"] == SIZE // block_size
    assert entry["driver_specific"]["uring"]["direct"] is True
    io = await bench.open("B")
    data = memoryview(pages(8192))[1:4097]
    data[:] = b"block!!!" * 512
    io.write(8192, data, fua=True)
    io.flush()
    assert contents(device)[8192:12288] == data


@on_bench()
async def test_blocks_smaller_than_the_devices_are_refused(
    bench: Bench, loop: Callable[[int], str]
) -> None:
    with pytest.raises(OperationError, match="has blocks of 4096 bytes") as caught:
        await bench.rpc("bdev_uring_create", name="B", filename=loop(4096), block_size=512)
    assert caught.value.code == -errno.EINVAL


@on_bench()
async def test_ranges_of_a_block_device_are_unmapped_and_zeroed(
    bench: Bench, loop: Callable[[int], str], image: Path
) -> None:
    device = loop(512)
    await bench.rpc("bdev_uring_create", name="B", filename=device)
    io = await bench.open("B")
    before = allocated(image)
    io.unmap(1 << 20, 1 << 20)
    assert allocated(image) == before - (1 << 20)
    io.write_zeroes(512, 4096)
    io.write_zeroes(2 << 20, 1 << 20, unmap=True)
    expected = bytearray(b"\xff" * SIZE)
    for first, end in ((1 << 20, 2 << 20), (512, 4608), (2 << 20, 3 << 20)):
        expected[first:end] = bytes(end - first)
    assert io.read(0, SIZE) == expected


@pytest.fixture
def mounted(loop: Callable[[int], str], tmp_path: Path) -> Iterator[str]:
    """A block device with a file system that is in use."""
    device = loop(512)
    folder = tmp_path / "mounted"
    folder.mkdir()
    command("mkfs.ext4", "-q", device)
    command("mount", device, str(folder))
    yield device
    subprocess.run(["umount", str(folder)], check=True)


@on_bench()
async def test_a_mounted_device_is_refused(bench: Bench, mounted: str) -> None:
    with pytest.raises(OperationError, match="in use by the system") as caught:
        await bench.rpc("bdev_uring_create", name="B", filename=mounted)
    assert caught.value.code == -errno.EBUSY
