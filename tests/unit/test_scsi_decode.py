"""What SCSI devices answer, in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scsi.decode import describe_inquiry, describe_luns, describe_sense, status_name

FIXED = bytes.fromhex("70 00 05 00000000 0a 00000000 24 00 00 c8 00 01")
DESCRIPTORS = bytes.fromhex("72 05 24 00 000000 08 02 06 0000 c8 0001 00")
EXPECTED = "ILLEGAL REQUEST: invalid field in CDB (24/00), at byte 1 bit 0 of the CDB"


@pytest.mark.parametrize("sense", [FIXED, DESCRIPTORS], ids=["fixed", "descriptors"])
def test_sense_data_says_which_field_is_wrong(sense: bytes) -> None:
    assert describe_sense(sense) == EXPECTED


def test_status_without_a_name_is_a_number() -> None:
    assert status_name(0x18) == "RESERVATION CONFLICT"
    assert status_name(0x99) == "0x99"


def test_luns() -> None:
    data = (
        bytes.fromhex("00000018 00000000") + bytes(8) + b"\x41\5" + bytes(6) + b"\xc1\1" + bytes(6)
    )
    assert describe_luns(data) == "logical units: 0, 261, well-known 0x1"


@given(st.binary(max_size=64))
def test_any_bytes_are_described(data: bytes) -> None:
    assert describe_sense(data)
    assert describe_inquiry(data)
    assert describe_luns(data.ljust(8, b"\0"))
