"""What a controller says of itself and its namespaces, checked before anything relies on it."""

import uuid as uuids
from dataclasses import dataclass

from bdev.nvme_admin import structure
from bdev.nvme_transport import PAGE, ControllerError
from bdev.parameters import BLOCK_SIZES, MAX_SIZE
from reactor.native import CData, ffi

MAX_TRANSFER = 8 << 20  # bytes a command, where the controller would take more
MAX_MDTS = 20  # 2^20 pages: beyond what a count of blocks can say


@dataclass(frozen=True)
class Capabilities:
    """The register CAP (Base 3.1.3.1)."""

    max_entries: int
    timeout: float  # seconds that CSTS.RDY may take to follow CC.EN
    stride: int  # bytes between doorbells
    min_page: int  # bytes
    nvm: bool  # has the NVM command set


def read_capabilities(value: int) -> Capabilities:
    """Take CAP apart."""
    return Capabilities(
        max_entries=(value & 0xFFFF) + 1,
        timeout=max(value >> 24 & 0xFF, 1) * 0.5,
        stride=4 << (value >> 32 & 0xF),
        min_page=4096 << (value >> 48 & 0xF),
        nvm=bool(value >> 37 & 1),
    )


def check_capabilities(capabilities: Capabilities) -> None:
    """Raise ControllerError if this driver, or anyone, cannot work with them."""
    if capabilities.max_entries < 2:
        raise ControllerError("CAP: queues of one entry; two is the least that NVMe has")
    if capabilities.min_page > PAGE:
        raise ControllerError(
            f"CAP: pages of {capabilities.min_page} bytes or more; this driver has {PAGE}"
        )
    if not capabilities.nvm:
        raise ControllerError("CAP: the controller does not have the NVM command set")


@dataclass(frozen=True)
class Identity:
    """Identify Controller (Base figure 275), as far as the driver uses it."""

    vendor: int
    subsystem_vendor: int
    serial: str
    model: str
    firmware: str
    subnqn: str
    oui: int
    controller_id: int
    version: int
    max_transfer: int  # bytes
    unmap: bool
    write_zeroes: bool
    compare: bool
    verify: bool
    copy: bool
    cache: bool
    sgl: int  # alignment that SGLs demand, 0 without them
    shadow_doorbells: bool
    namespaces: int  # the largest identifier
    events: int  # how many Asynchronous Event Requests it takes
    namespace_events: bool
    abort_limit: int


def _text(field: CData) -> str:
    return bytes(ffi.buffer(field)).split(b"\0")[0].decode("ascii", "replace").strip()


def parse_controller(data: bytes) -> Identity:
    """Return what 4096 bytes of Identify Controller say; ControllerError if that is nonsense."""
    raw = structure("struct nvme_identify_controller", data)
    if raw.cntrltype not in (0, 1):
        kind = {2: "a discovery", 3: "an administrative"}.get(raw.cntrltype, "not an I/O")
        raise ControllerError(f"controller type {raw.cntrltype}: {kind} controller has no disks")
    if raw.sqes & 0xF > 6 or raw.sqes >> 4 < 6 or raw.cqes & 0xF > 4 or raw.cqes >> 4 < 4:
        raise ControllerError(
            f"SQES {raw.sqes:#x}, CQES {raw.cqes:#x}: does not take entries of 64 and 16 bytes"
        )
    if raw.nn == 0:
        raise ControllerError("NN 0: the controller cannot have namespaces")
    limit = PAGE << raw.mdts if 0 < raw.mdts <= MAX_MDTS else MAX_TRANSFER
    return Identity(
        vendor=raw.vid,
        subsystem_vendor=raw.ssvid,
        serial=_text(raw.serial),
        model=_text(raw.model),
        firmware=_text(raw.firmware),
        subnqn=_text(raw.subnqn),
        oui=int.from_bytes(bytes(raw.ieee), "little"),
        controller_id=raw.cntlid,
        version=raw.ver,
        max_transfer=min(limit, MAX_TRANSFER),
        unmap=bool(raw.oncs & 0x4),
        write_zeroes=bool(raw.oncs & 0x8),
        compare=bool(raw.oncs & 0x1),
        verify=bool(raw.oncs & 0x80),
        copy=bool(raw.oncs & 0x100 and raw.ocfs & 1),
        cache=bool(raw.vwc & 1),
        sgl={1: 1, 2: 4}.get(raw.sgls & 3, 0),
        shadow_doorbells=bool(raw.oacs & 0x100),
        namespaces=raw.nn,
        events=raw.aerl + 1,
        namespace_events=bool(raw.oaes & 0x100),
        abort_limit=raw.acl + 1,
    )


@dataclass(frozen=True)
class Namespace:
    """Identify Namespace (NVM Command Set figure 97), as far as the driver uses it."""

    nsid: int
    block_size: int
    num_blocks: int
    uuid: str  # "" if it does not say
    readonly: bool
    shared: bool = False  # other controllers, and so other hosts, may have it
    copy_blocks: int = 0  # of a copy, at most; 0: none
    copy_range_blocks: int = 0  # of one of its source ranges
    copy_ranges: int = 0


def parse_namespace(nsid: int, data: bytes) -> Namespace:
    """Return what 4096 bytes of Identify Namespace say; ControllerError if it cannot be served."""
    raw = structure("struct nvme_identify_namespace", data)
    what = f"namespace {nsid}"
    index = raw.format & 0xF | (raw.format >> 1 & 0x30 if raw.formats > 15 else 0)
    if index > raw.formats:
        raise ControllerError(f"{what}: uses format {index} of {raw.formats + 1}")
    chosen = raw.lba_formats[index]
    if chosen.metadata_size:
        raise ControllerError(
            f"{what}: is formatted with {chosen.metadata_size} bytes of metadata a block, which is "
            "not supported; format it without (nvme format --lbaf=...)"
        )
    block_size = 1 << chosen.data_size if chosen.data_size < 32 else 0
    if block_size not in BLOCK_SIZES:
        raise ControllerError(
            f"{what}: has blocks of 2^{chosen.data_size} bytes; 512 and 4096 are supported"
        )
    if not 0 < raw.size <= MAX_SIZE // block_size:
        raise ControllerError(f"{what}: has {raw.size} blocks")
    return Namespace(
        nsid,
        block_size,
        raw.size,
        _namespace_uuid(raw),
        readonly=bool(raw.nsattr & 1),
        shared=bool(raw.nmic & 1),
        copy_blocks=raw.mcl if raw.mssrl else 0,
        copy_range_blocks=raw.mssrl,
        copy_ranges=raw.msrc + 1,
    )


def _namespace_uuid(raw: CData) -> str:
    """Return the NGUID, which is one, or "": an EUI-64 is too short, a name must be unique."""
    nguid = bytes(raw.nguid)
    return str(uuids.UUID(bytes=nguid)) if any(nguid) else ""


def parse_health(data: bytes) -> dict[str, int | list[int]]:
    """Return the SMART / Health Information log under the names that SPDK gives it."""
    raw = structure("struct nvme_health_log", data)

    def number(field: CData) -> int:
        return int.from_bytes(bytes(field), "little")

    return {
        "temperature_celsius": number(raw.temperature) - 273,
        "available_spare_percentage": raw.available_spare,
        "available_spare_threshold_percentage": raw.available_spare_threshold,
        "percentage_used": raw.percentage_used,
        "critical_warning": raw.critical_warning,
        "data_units_read": number(raw.data_units_read),
        "data_units_written": number(raw.data_units_written),
        "host_read_commands": number(raw.host_read_commands),
        "host_write_commands": number(raw.host_write_commands),
        "controller_busy_time": number(raw.controller_busy_time),
        "power_cycles": number(raw.power_cycles),
        "power_on_hours": number(raw.power_on_hours),
        "unsafe_shutdowns": number(raw.unsafe_shutdowns),
        "media_errors": number(raw.media_errors),
        "num_err_log_entries": number(raw.error_log_entries),
        "warning_temperature_time_minutes": raw.warning_temperature_time,
        "critical_composite_temperature_time_minutes": raw.critical_temperature_time,
    }


def changed_namespaces(data: bytes) -> list[int]:
    """Return the identifiers in a list of them (Base 5.16.1.5), which a zero ends."""
    words = memoryview(data).cast("I")
    return [nsid for nsid in words[: words.tolist().index(0) if 0 in words else None] if nsid]
