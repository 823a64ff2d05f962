"""SCSI controllers of a whole target, and CDBs that several tests send to them."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.stack import CPUS, Stack, stack
from vhost.frontend_scsi import Answer, ScsiFrontend

BLOCKS = 32768
INQUIRY = bytes.fromhex("12 00 00 00 ff 00")
READY = bytes(6)


def write_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, 0, lba, 0, blocks, 0)


def read_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)


def code(answer: Answer) -> tuple[int, int]:
    """Return sense key, and additional sense code with its qualifier, of fixed sense data."""
    assert answer.status == 2
    return answer.sense[2] & 15, answer.sense[12] << 8 | answer.sense[13]


@asynccontextmanager
async def controller(
    *names: str, cpus: list[int] = CPUS[:1], targets: int = 1
) -> AsyncIterator[Stack]:
    """Serve a malloc disk of 16 MiB on SCSI controllers."""
    async with stack(cpus) as made:
        await made.call("bdev_malloc_create", name="M0", num_blocks=BLOCKS, block_size=512)
        for name in names or ("s0",):
            await made.call("vhost_create_scsi_controller", ctrlr=name)
            for target in range(targets):
                await made.call(
                    "vhost_scsi_controller_add_target",
                    ctrlr=name,
                    scsi_target_num=target,
                    bdev_name="M0",
                )
        yield made


async def connect(target: Stack, name: str = "s0", **options: int) -> ScsiFrontend:
    """Return a front-end that has heard of the power-on of LUN 0."""
    front = await target.in_thread(lambda: ScsiFrontend.connect(target.socket(name), **options))
    answer = await target.in_thread(lambda: front.command(0, 0, READY))
    assert code(answer) == (6, 0x2900)
    return front


async def close(target: Stack, *fronts: ScsiFrontend) -> None:
    gone = len(target.sessions()) - len(fronts)
    for front in fronts:
        await target.in_thread(front.close)
    await target.until(lambda: len(target.sessions()) <= gone)


def register(key: int) -> tuple[bytes, bytes]:
    return bytes([0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0]), struct.pack(">QQ8x", 0, key)


def reserve(key: int, kind: int) -> tuple[bytes, bytes]:
    return bytes([0x5F, 1, kind, 0, 0, 0, 0, 0, 24, 0]), struct.pack(">QQ8x", key, 0)


def preempt(key: int, other: int, kind: int) -> tuple[bytes, bytes]:
    return bytes([0x5F, 5, kind, 0, 0, 0, 0, 0, 24, 0]), struct.pack(">QQ8x", key, other)
