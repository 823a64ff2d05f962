"""Encrypted disks: the ciphertext is the standard's, and keys are where they should be."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bdev.crypto import CryptoBdev
from bdev.io import BdevIO, Op
from bdev.kind import OperationError
from reactor.native import lib
from tests.support.bdevs import Bench, on_bench
from tests.support.conformance import outcome

BLOCKS = 512

# IEEE 1619-2018, annex B: both keys, the number of a data unit of 512 bytes (00 to ff, twice), and
# the first 16 bytes of its ciphertext. Vector 4 is AES-128, vector 10 AES-256.
VECTORS = {
    "vector 4": (
        "27182818284590452353602874713526",
        "31415926535897932384626433832795",
        0,
        "27a7479befa1d476489f308cd4cfa6e2",
    ),
    "vector 10": (
        "2718281828459045235360287471352662497757247093699959574966967627",
        "3141592653589793238462643383279502884197169399375105820974944592",
        0xFF,
        "1c3b3a102f770386e4836c99e370cf9b",
    ),
}


def ecb(key: bytes, data: bytes) -> bytes:
    """Return what the command line encrypts whole blocks of AES to (it has no XTS)."""
    command = ["openssl", "enc", "-e", f"-aes-{len(key) * 8}-ecb", "-K", key.hex(), "-nopad"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def xts(key: str, block: int, data: bytes) -> bytes:
    """Return a block as IEEE 1619-2018, section 5.3, encrypts it, on AES by openssl's tool."""
    raw = bytes.fromhex(key)
    first, second = raw[: len(raw) // 2], raw[len(raw) // 2 :]
    tweak = int.from_bytes(ecb(second, block.to_bytes(16, "little")), "little")
    tweaks = []
    for _ in range(0, len(data), 16):
        tweaks.append(tweak.to_bytes(16, "little"))
        tweak = tweak << 1 & (1 << 128) - 1 ^ (0x87 if tweak >> 127 else 0)
    mask = b"".join(tweaks)
    whitened = bytes(a ^ b for a, b in zip(data, mask, strict=True))
    return bytes(a ^ b for a, b in zip(ecb(first, whitened), mask, strict=True))


def write_key(path: Path, key: str, mode: int = 0o600) -> str:
    path.touch(mode=0o600)
    path.write_text(key)
    path.chmod(mode)
    return str(path)


async def make(
    bench: Bench, path: Path, key: str, block_size: int = 512, blocks: int = BLOCKS
) -> tuple[BdevIO, BdevIO]:
    """Return the plain and the encrypted side of a disk."""
    await bench.rpc("bdev_malloc_create", name="M", block_size=block_size, num_blocks=blocks)
    await bench.rpc("accel_crypto_key_create", name="K", key_file=write_key(path / "key", key))
    await bench.rpc("bdev_crypto_create", base_bdev_name="M", name="C", key_name="K")
    return await bench.open("C"), await bench.open("M")


async def close(bench: Bench) -> None:
    await bench.close("M")
    await bench.close("C")


@pytest.mark.parametrize("name", VECTORS)
def test_the_standards_own_vectors(name: str, tmp_path: Path) -> None:
    key1, key2, block, first = VECTORS[name]

    @on_bench()
    async def check(bench: Bench) -> None:
        plain, cipher = await make(bench, tmp_path, key1 + key2)
        plain.write(block * 512, bytes(range(256)) * 2)
        assert cipher.read(block * 512, 512)[:16].hex() == first
        await close(bench)

    check()


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("bits", [128, 256])
def test_it_is_what_openssl_makes_of_it(bits: int, block_size: int, tmp_path: Path) -> None:
    """A block at a time; the number of the block is the tweak."""
    chance = random.Random(bits + block_size)
    key = chance.randbytes(bits // 4).hex()

    @on_bench()
    async def check(bench: Bench) -> None:
        plain, cipher = await make(bench, tmp_path, key, block_size)
        data = chance.randbytes(5 * block_size)
        plain.write(7 * block_size, data[:1000], data[1000:])
        stored = cipher.read(7 * block_size, len(data))
        for i in range(5):
            at = i * block_size
            expected = xts(key, 7 + i, data[at : at + block_size])
            assert stored[at : at + block_size] == expected
        assert plain.read(7 * block_size, len(data)) == data
        await close(bench)

    check()


@on_bench()
async def test_what_was_encrypted_elsewhere_is_read(bench: Bench, tmp_path: Path) -> None:
    key = os.urandom(64).hex()
    plain, cipher = await make(bench, tmp_path, key)
    data = os.urandom(512)
    cipher.write(300 * 512, xts(key, 300, data))
    assert plain.read(300 * 512, 512) == data
    await close(bench)


@on_bench()
async def test_blocks_may_lie_in_any_buffers(bench: Bench, tmp_path: Path) -> None:
    """Those in one buffer go straight between it and the ciphertext, others by way of a copy."""
    plain, _ = await make(bench, tmp_path, os.urandom(64).hex())
    numbers = random.Random(1)
    for _ in range(50):
        data = os.urandom(8 * 512)
        places = (numbers.choice((0, 16, 500, 512, 1024, len(data))) for _ in range(3))
        cuts = [0, *sorted(places), len(data)]
        parts = [data[begin:end] for begin, end in itertools.pairwise(cuts)]
        plain.write(0, *parts)
        assert plain.read(0, len(data)) == data
        there = [bytearray(len(part)) for part in parts]
        plain.read_into(0, *there)
        assert there == parts
    await close(bench)


@on_bench()
async def test_memory_of_the_caller_stays_as_it_is(bench: Bench, tmp_path: Path) -> None:
    """A guest's memory may be written once more, or looked at, while it is written to the disk."""
    plain, _ = await make(bench, tmp_path, os.urandom(64).hex())
    data = bytearray(os.urandom(100 * 512))
    before = bytes(data)
    plain.write(0, data)
    assert data == before
    await close(bench)


@on_bench()
async def test_zeroes_are_encrypted(bench: Bench, tmp_path: Path) -> None:
    plain, cipher = await make(bench, tmp_path, os.urandom(64).hex())
    plain.write_zeroes(0, BLOCKS * 512, unmap=True)
    assert plain.read(0, BLOCKS * 512) == bytes(BLOCKS * 512)
    assert bytes(16) not in cipher.read(0, BLOCKS * 512)
    await close(bench)


@on_bench()
async def test_more_requests_than_buffers_wait(bench: Bench, tmp_path: Path) -> None:
    """Each holds a buffer while the base takes its time, and 64 do at most."""
    key = write_key(tmp_path / "key", os.urandom(64).hex())
    await bench.rpc("bdev_malloc_create", name="M", block_size=512, num_blocks=BLOCKS)
    latency = dict.fromkeys(["avg_read_latency", "p99_read_latency"], 0)
    latency |= dict.fromkeys(["avg_write_latency", "p99_write_latency"], 2000)
    await bench.rpc("bdev_delay_create", name="D", base_bdev_name="M", **latency)
    await bench.rpc("accel_crypto_key_create", name="K", key_file=key)
    await bench.rpc("bdev_crypto_create", base_bdev_name="D", name="C", key_name="K")
    io = await bench.open("C")
    below = bench.reactor.handles[bench.registry.find("D").id]
    data = os.urandom(BLOCKS * 512)
    writes = [
        io.start(Op.WRITE, i * 512, 0, [data[i * 512 : (i + 1) * 512]]) for i in range(BLOCKS)
    ]
    assert lib.bdev_in_flight(below) == 64
    aborted = writes.pop()
    assert aborted.abort()
    assert await outcome(aborted) == errno.ECANCELED
    assert {await outcome(write) for write in writes} == {0}
    assert io.read(0, len(data) - 512) == data[:-512]
    await bench.close("C")


@on_bench()
async def test_a_request_longer_than_a_buffer_goes_in_pieces(bench: Bench, tmp_path: Path) -> None:
    plain, _ = await make(bench, tmp_path, os.urandom(32).hex(), blocks=32768)
    data = os.urandom(16 << 20)
    plain.write(0, data[: 1 << 20], data[1 << 20 :])
    assert plain.read(0, len(data)) == data
    await close(bench)


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        ("", "must have 64 hexadecimal digits"),
        ("ab" * 31, "must have 64 hexadecimal digits"),
        ("ab" * 65, "must have 64 hexadecimal digits"),
        ("ab" * 10000, "must have 64 hexadecimal digits"),
        ("xy" * 64, "no hexadecimal digit"),
        ("0x" + "12" * 63, "no hexadecimal digit"),
        ("12" * 32, "both halves are the same"),
        ("0123456789abcdef" * 8, "both halves are the same"),
    ],
)
def test_what_is_no_key_is_refused(contents: str, text: str, tmp_path: Path) -> None:
    @on_bench()
    async def refused(bench: Bench) -> None:
        path = write_key(tmp_path / "key", contents)
        with pytest.raises(OperationError, match=text):
            await bench.rpc("accel_crypto_key_create", name="K", key_file=path)
        assert await bench.rpc("accel_crypto_keys_get") == []

    refused()


GOOD = "01" * 32 + "23" * 32 + "\n"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"key": "01" * 16}, "a key on the wire"),
        ({}, "key_file: is missing"),
        ({"key_file": "/no/such/file"}, "No such file"),
        ({"key_file": "/"}, "Is a directory"),
        ({"key_file": "KEY", "cipher": "AES_CBC"}, "must be AES_XTS"),
        ({"key_file": "KEY", "tweak_mode": "INCR_512_FULL_LBA"}, "must be SIMPLE_LBA"),
        ({"key_file": "KEY", "name": ""}, "must have 1 to 255"),
    ],
)
def test_other_ways_to_a_key_are_refused(params: dict[str, Any], text: str, tmp_path: Path) -> None:
    @on_bench()
    async def refused(bench: Bench) -> None:
        path = write_key(tmp_path / "key", GOOD)
        given = {k: path if v == "KEY" else v for k, v in params.items()}
        with pytest.raises(OperationError, match=text):
            await bench.rpc("accel_crypto_key_create", **{"name": "K", **given})
        assert await bench.rpc("accel_crypto_keys_get") == []

    refused()


@on_bench()
async def test_a_key_that_others_can_read_is_refused(bench: Bench, tmp_path: Path) -> None:
    path = write_key(tmp_path / "key", GOOD, mode=0o640)
    with pytest.raises(OperationError, match=r"mode 0640.*chmod 600"):
        await bench.rpc("accel_crypto_key_create", name="K", key_file=path)


@on_bench()
async def test_a_key_comes_from_a_descriptor(bench: Bench) -> None:
    reader, writer = os.pipe()
    os.write(writer, GOOD.encode())
    os.close(writer)
    await bench.rpc("accel_crypto_key_create", name="K", key_file=f"/dev/fd/{reader}")
    os.close(reader)
    (key,) = await bench.rpc("accel_crypto_keys_get", key_name="K")
    assert key["bits"] == 256


@on_bench()
async def test_a_key_in_use_stays(bench: Bench, tmp_path: Path) -> None:
    await make(bench, tmp_path, GOOD)
    with pytest.raises(OperationError, match="is used by C"):
        await bench.rpc("accel_crypto_key_destroy", key_name="K")
    with pytest.raises(OperationError, match="File exists"):
        await bench.rpc("bdev_crypto_create", base_bdev_name="M", name="C", key_name="K")
    await close(bench)
    await bench.rpc("bdev_crypto_delete", name="C")
    await bench.rpc("accel_crypto_key_destroy", key_name="K")
    with pytest.raises(OperationError, match="there is none"):
        await bench.rpc("bdev_crypto_create", base_bdev_name="M", name="C", key_name="K")


@on_bench()
async def test_a_key_is_wiped_and_shown_to_nobody(bench: Bench, tmp_path: Path) -> None:
    secret = os.urandom(64)
    await make(bench, tmp_path, secret.hex())
    bdev = bench.registry.find("C")
    assert isinstance(bdev, CryptoBdev)
    held = os.dup(bdev.key.fd)
    assert secret in os.pread(held, 4096, 0)
    shown = json.dumps(
        [
            await bench.rpc("bdev_get_bdevs"),
            await bench.rpc("accel_crypto_keys_get"),
            bench.registry.config(),
        ]
    )
    assert secret.hex() not in shown
    assert str(tmp_path / "key") in shown
    await close(bench)
    await bench.rpc("bdev_crypto_delete", name="C")
    await bench.rpc("accel_crypto_key_destroy", key_name="K")
    assert not any(os.pread(held, 4096, 0))
    os.close(held)


@on_bench()
async def test_saved_disks_come_back_with_their_keys(bench: Bench, tmp_path: Path) -> None:
    plain, _ = await make(bench, tmp_path, GOOD)
    plain.write(0, b"s" * 512)
    calls = bench.registry.config()
    await close(bench)
    await bench.rpc("bdev_crypto_delete", name="C")
    await bench.rpc("accel_crypto_key_destroy", key_name="K")
    for call in calls:
        if call["method"] != "bdev_malloc_create":
            await bench.rpc(call["method"], **call["params"])
    assert bench.registry.config() == calls
    assert (await bench.open("C")).read(0, 512) == b"s" * 512
    await bench.close("C")
