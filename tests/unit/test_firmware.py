"""What firmware makes of a disk's configuration."""

from __future__ import annotations

import pytest

from vhost.blk import SEG_MAX, SIZE_MAX


@pytest.mark.parametrize("block_size", [512, 4096])
def test_seabios_reads_some_blocks_at_a_time(block_size: int) -> None:
    """SeaBIOS keeps size_max * seg_max / block size in 16 bits, and reads that many blocks.

    Of 0 it would read none, for ever, and no guest would boot.
    """
    assert SEG_MAX * SIZE_MAX // block_size & 0xFFFF >= 64
