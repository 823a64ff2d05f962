"""The structures on the wire: sizes, round trips, and what validators refuse."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost import messages
from vhost.messages import (
    MAX_FDS,
    MAX_PAYLOAD,
    MAX_QUEUES,
    MESSAGES,
    U64,
    VERSION,
    Config,
    Header,
    Inflight,
    Log,
    MemoryTable,
    Payload,
    ProtocolError,
    Region,
    Request,
    SingleRegion,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
    decode,
    decode_request,
)

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
regions = st.builds(Region, u64, u64, u64, u64)
configs = st.binary(max_size=300).flatmap(
    lambda data: st.builds(Config, u32, st.just(len(data)), u32, st.just(data))
)
payloads: st.SearchStrategy[Payload] = st.one_of(
    st.builds(U64, u64),
    st.builds(VringFd, st.integers(0, 255), st.booleans()),
    st.builds(VringState, u32, u32),
    st.builds(VringAddr, u32, u32, u64, u64, u64, u64),
    regions,
    st.builds(MemoryTable, st.lists(regions, max_size=32).map(tuple)),
    st.builds(SingleRegion, regions),
    st.builds(Log, u64, u64),
    configs,
    st.builds(Inflight, u64, u64, u16, u16, st.booleans()),
)


@given(payloads)
def test_a_payload_survives_the_wire(payload: Payload) -> None:
    assert type(payload).from_bytes(payload.to_bytes(), "test") == payload


@given(u32, st.integers(0, MAX_PAYLOAD), st.sampled_from([0, messages.REPLY, messages.NEED_REPLY]))
def test_a_header_survives_the_wire(request: int, size: int, flags: int) -> None:
    header = Header(request, VERSION | flags, size)
    assert Header.from_bytes(header.to_bytes()) == header


@given(st.sampled_from(sorted(MESSAGES)) | u32, st.binary(max_size=400), st.integers(0, MAX_FDS))
def test_garbage_is_refused_or_decoded_but_never_anything_else(
    request: int, data: bytes, fds: int
) -> None:
    try:
        decoded = decode_request(request, data, fds)
    except ProtocolError:
        return
    payload = MESSAGES[request].payload
    assert (decoded is None) if payload is None else isinstance(decoded, payload)


def test_layouts_are_those_of_the_specification() -> None:
    region = Region(0x1000, 0x2000, 0x7000_0000, 0x4000)
    raw = struct.pack("=QQQQ", 0x1000, 0x2000, 0x7000_0000, 0x4000)
    assert region.to_bytes() == raw
    assert MemoryTable((region,)).to_bytes() == struct.pack("=II", 1, 0) + raw
    assert SingleRegion(region).to_bytes() == bytes(8) + raw
    assert VringAddr(1, 0, 16, 32, 48, 64).to_bytes() == struct.pack(
        "=IIQQQQ", 1, 0, 16, 32, 48, 64
    )
    assert VringFd(7, no_fd=True).to_bytes() == struct.pack("=Q", 0x107)
    assert Config(4, 2, 1, b"ab").to_bytes() == struct.pack("=III", 4, 2, 1) + b"ab"
    assert Inflight(1, 2, 3, 4).to_bytes() == struct.pack("=QQHHI", 1, 2, 3, 4, 0)


def test_the_inflight_structure_keeps_the_size_that_it_came_with() -> None:
    for size in (20, 24):
        data = struct.pack("=QQHH", 4096, 0, 1, 128).ljust(size, b"\0")
        assert Inflight.from_bytes(data, "test").to_bytes() == data


def test_a_memory_table_may_come_in_a_longer_structure() -> None:
    table = MemoryTable((Region(0, 4096, 1 << 40, 0),))
    assert MemoryTable.from_bytes(table.to_bytes() + bytes(7 * 32), "test") == table


def test_bytes_of_a_configuration_past_its_size_are_dropped() -> None:
    assert Config.from_bytes(struct.pack("=III", 0, 2, 0) + b"abcd", "test").data == b"ab"


@pytest.mark.parametrize(
    ("flags", "size", "field"),
    [(0, 8, "flags"), (2, 8, "flags"), (VERSION, MAX_PAYLOAD + 1, "size")],
)
def test_an_impossible_header_is_refused(flags: int, size: int, field: str) -> None:
    with pytest.raises(ProtocolError, match=f"^GET_FEATURES: {field} is"):
        Header.from_bytes(struct.pack("=III", Request.GET_FEATURES, flags, size))


TOP = (1 << 64) - 1
REFUSED: list[tuple[Request, Payload, int, str]] = [
    (Request.SET_VRING_NUM, VringState(0, 0), 0, "num is 0"),
    (Request.SET_VRING_NUM, VringState(0, 65536), 0, "num is 65536"),
    (Request.SET_VRING_NUM, VringState(MAX_QUEUES, 128), 0, f"index is {MAX_QUEUES}"),
    (Request.SET_VRING_ENABLE, VringState(0, 2), 0, "num is 2"),
    (Request.SET_DEVICE_STATE_FD, StateTransfer(2, 0), 1, "direction is 2"),
    (Request.SET_DEVICE_STATE_FD, StateTransfer(0, 1), 1, "phase is 1"),
    (Request.SET_DEVICE_STATE_FD, StateTransfer(0, 0), 0, "number of descriptors is 0"),
    (Request.SET_DEVICE_STATE_FD, U64(0), 2, "number of descriptors is 2"),
    (Request.CHECK_DEVICE_STATE, U64(0), 0, "size is 8"),
    (Request.VRING_KICK, VringState(0, 1), 0, "num is 1"),
    (Request.VRING_KICK, VringState(MAX_QUEUES, 0), 0, f"index is {MAX_QUEUES}"),
    (Request.VRING_KICK, VringState(0, 0), 1, "number of descriptors is 1"),
    (Request.SET_VRING_ADDR, VringAddr(0, 0, 8, 0, 0, 0), 0, "desc is 0x8"),
    (Request.SET_VRING_ADDR, VringAddr(0, 0, 0, 2, 0, 0), 0, "used is 0x2"),
    (Request.SET_VRING_ADDR, VringAddr(0, 0, 0, 0, 1, 0), 0, "avail is 0x1"),
    (Request.SET_VRING_ADDR, VringAddr(0, 2, 0, 0, 0, 0), 0, "flags is 0x2"),
    (Request.SET_VRING_KICK, VringFd(0), 0, "number of descriptors is 0"),
    (Request.SET_VRING_KICK, VringFd(0, no_fd=True), 1, "number of descriptors is 1"),
    (Request.SET_VRING_CALL, U64(0x200), 1, "payload is 0x200"),
    (Request.SET_FEATURES, U64(0), 1, "number of descriptors is 1"),
    (Request.SET_MEM_TABLE, MemoryTable((Region(0, 4096, 0, 0),)), 0, "number of descriptors is 0"),
    (Request.SET_MEM_TABLE, MemoryTable((Region(0, 0, 0, 0),)), 1, "region 0.size is 0"),
    (Request.SET_MEM_TABLE, MemoryTable((Region(TOP, 2, 0, 0),)), 1, "region 0.guest is"),
    (Request.SET_MEM_TABLE, MemoryTable((Region(0, 2, TOP, 0),)), 1, "region 0.user is"),
    (Request.SET_MEM_TABLE, MemoryTable((Region(0, 2, 0, TOP),)), 1, "region 0.offset is"),
    (
        Request.SET_MEM_TABLE,
        MemoryTable((Region(0, 8192, 0, 0), Region(4096, 4096, 1 << 30, 0))),
        2,
        "region 1 is 0x1000",
    ),
    (Request.ADD_MEM_REG, SingleRegion(Region(0, 4096, 0, 0)), 0, "number of descriptors is 0"),
    (Request.GET_CONFIG, Config(0, 0), 0, "config size is 0"),
    (Request.GET_CONFIG, Config(0, MAX_PAYLOAD), 0, "config size is 4096"),
    (Request.SET_CONFIG, Config(0, 4), 0, "size is 12"),
    (Request.GET_INFLIGHT_FD, Inflight(0, 0, 0, 128), 0, "num queues is 0"),
    (Request.SET_INFLIGHT_FD, Inflight(64, 0, 1, 40000), 1, "queue size is 40000"),
    (Request.SET_INFLIGHT_FD, Inflight(64, TOP, 1, 128), 1, "mmap offset is"),
    (Request.SET_LOG_BASE, Log(0, 0), 1, "log size is 0"),
    (Request.SEND_RARP, U64(0), 0, "request is 19"),
]


@pytest.mark.parametrize(("request_", "payload", "fds", "text"), REFUSED)
def test_a_wrong_value_is_refused_by_name(
    request_: Request, payload: Payload, fds: int, text: str
) -> None:
    with pytest.raises(ProtocolError, match=f"^{request_.name}: {text}"):
        decode_request(request_, payload.to_bytes(), fds)


@pytest.mark.parametrize("request_", [r for r, known in MESSAGES.items() if known.payload is None])
def test_a_message_without_payload_may_have_none(request_: Request) -> None:
    with pytest.raises(ProtocolError, match="no payload"):
        decode_request(request_, b"x", MESSAGES[request_].fds[0])


@pytest.mark.parametrize(
    ("payload", "size"), [(U64, 7), (VringState, 12), (VringAddr, 39), (Log, 8), (Inflight, 23)]
)
def test_a_payload_of_another_size_is_refused(payload: Any, size: int) -> None:
    with pytest.raises(ProtocolError, match=f"size is {size}"):
        decode(payload, bytes(size), "test")


def test_a_log_ends_within_64_bits() -> None:
    decode(Log, Log(16, 0).to_bytes(), "test")
    for log in (Log(0, 0), Log(2, TOP)):
        with pytest.raises(ProtocolError, match=r"^test: log"):
            decode(Log, log.to_bytes(), "test")
