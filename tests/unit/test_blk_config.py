"""What a guest is told of a disk: features and configuration space, virtio 1.2 section 5.2."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from vhost.blk import (
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEGMENTS,
    SEG_MAX,
    SIZE_MAX,
    DiskFacts,
    check_serial,
    is_writeback,
)
from vhost.messages import MAX_FD_QUEUES, MAX_QUEUES, Feature
from vhost.virtio_blk import BlkConfig, BlkFeature

DISK = DiskFacts(
    block_size=512,
    num_blocks=2048,
    physical_block_size=512,
    readonly=False,
    flush=True,
    discard=True,
    write_zeroes=True,
)


def config(facts: DiskFacts) -> BlkConfig:
    return BlkConfig.from_bytes(facts.config())


def test_the_layout_is_that_of_the_specification() -> None:
    facts = replace(DISK, block_size=4096, num_blocks=3, physical_block_size=16384)
    raw = facts.config()
    assert len(raw) == 60
    assert struct.unpack_from("<Q", raw, 0) == (24,)  # capacity, in sectors of 512 bytes
    assert struct.unpack_from("<II", raw, 8) == (SIZE_MAX, SEG_MAX)
    assert struct.unpack_from("<I", raw, 20) == (4096,)  # blk_size
    assert struct.unpack_from("<BBHI", raw, 24) == (2, 0, 1, 0)  # topology
    assert raw[32] == 1  # writeback
    assert struct.unpack_from("<H", raw, 34) == (MAX_FD_QUEUES,)
    assert BlkConfig.from_bytes(facts.config(queues=MAX_QUEUES)).num_queues == MAX_QUEUES
    segments = (MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS)
    assert struct.unpack_from("<IIIIIB", raw, 36) == (*segments, 8, *segments, 1)


@pytest.mark.parametrize("blocks", [1, 1 << 40])
def test_capacity_is_in_sectors_whatever_the_block_size(blocks: int) -> None:
    assert config(replace(DISK, num_blocks=blocks)).capacity == blocks
    assert config(replace(DISK, num_blocks=blocks, block_size=4096)).capacity == blocks * 8


def test_the_blocks_of_the_largest_request_fit_in_16_bits() -> None:
    """SeaBIOS counts them so, and hangs if the lower 16 bits are zero."""
    assert 0 < SEG_MAX * SIZE_MAX // DISK.block_size <= 0xFFFF


def test_what_is_always_offered() -> None:
    offered = DISK.features()
    for feature in (
        Feature.VERSION_1,
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        BlkFeature.SIZE_MAX,
        BlkFeature.SEG_MAX,
        BlkFeature.BLK_SIZE,
        BlkFeature.TOPOLOGY,
        BlkFeature.MQ,
        BlkFeature.CONFIG_WCE,
        Feature.NOTIFY_ON_EMPTY,
        Feature.ANY_LAYOUT,
        Feature.RING_RESET,
    ):
        assert offered & feature
    for feature in (BlkFeature.GEOMETRY, Feature.RING_PACKED, Feature.IN_ORDER):
        assert not offered & feature


@pytest.mark.parametrize(
    ("fact", "feature"),
    [
        ("readonly", BlkFeature.RO),
        ("flush", BlkFeature.FLUSH),
        ("discard", BlkFeature.DISCARD),
        ("write_zeroes", BlkFeature.WRITE_ZEROES),
    ],
)
def test_what_depends_on_the_disk(fact: str, feature: BlkFeature) -> None:
    assert replace(DISK, **{fact: True}).features() & feature
    assert not replace(DISK, **{fact: False}).features() & feature


def test_limits_of_what_is_not_offered_are_zero() -> None:
    told = config(replace(DISK, discard=False, write_zeroes=False))
    assert (told.max_discard_sectors, told.max_discard_seg, told.discard_sector_alignment) == (
        0,
        0,
        0,
    )
    assert (told.max_write_zeroes_sectors, told.max_write_zeroes_seg) == (0, 0)
    assert told.write_zeroes_may_unmap == 0


def test_write_zeroes_unmaps_only_where_discard_does() -> None:
    assert config(DISK).write_zeroes_may_unmap == 1
    assert config(replace(DISK, discard=False)).write_zeroes_may_unmap == 0


def test_the_serial_number_is_the_name_of_the_bdev_as_far_as_it_fits() -> None:
    assert check_serial("", "M0") == "M0"
    assert check_serial("", "a-name-with-more-than-20-characters") == "a-name-with-more-tha"
    assert check_serial("S-1", "M0") == "S-1"


@pytest.mark.parametrize("serial", ["x" * 21, "größe", "a\n"])
def test_a_serial_number_that_cannot_be_one(serial: str) -> None:
    with pytest.raises(ValueError, match="at most 20 printable ASCII characters"):
        check_serial(serial, "M0")


WCE, FLUSH = int(BlkFeature.CONFIG_WCE), int(BlkFeature.FLUSH)


@pytest.mark.parametrize(
    ("features", "written", "expected"),
    [
        (0, {}, False),  # a driver that cannot flush relies on completed writes
        (FLUSH, {}, True),
        (WCE, {}, False),
        (WCE | FLUSH, {}, True),
        (WCE | FLUSH, {32: 0}, False),
        (WCE, {32: 1}, True),
        (FLUSH, {32: 0}, True),  # written under features that no longer hold
    ],
)
def test_the_cache_mode_is_what_the_driver_relies_on(
    features: int, written: dict[int, int], expected: bool
) -> None:
    assert is_writeback(features, written) is expected
