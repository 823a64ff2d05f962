"""What SCSI devices answer, in words. For people: nothing here decides anything."""

from __future__ import annotations

STATUS = {
    0x00: "GOOD",
    0x02: "CHECK CONDITION",
    0x04: "CONDITION MET",
    0x08: "BUSY",
    0x18: "RESERVATION CONFLICT",
    0x28: "TASK SET FULL",
    0x30: "ACA ACTIVE",
    0x40: "TASK ABORTED",
}

KEYS = (
    *("NO SENSE", "RECOVERED ERROR", "NOT READY", "MEDIUM ERROR", "HARDWARE ERROR"),
    *("ILLEGAL REQUEST", "UNIT ATTENTION", "DATA PROTECT", "BLANK CHECK", "VENDOR SPECIFIC"),
    *("COPY ABORTED", "ABORTED COMMAND", "RESERVED", "VOLUME OVERFLOW", "MISCOMPARE", "COMPLETED"),
)

# Additional sense codes that our units use, with their qualifiers: SPC-5 annex F.
CODES = {
    0x0000: "no additional sense information",
    0x0402: "logical unit not ready, initializing command required",
    0x0C00: "write error",
    0x1100: "unrecovered read error",
    0x1A00: "parameter list length error",
    0x1D00: "miscompare during verify operation",
    0x2000: "invalid command operation code",
    0x2100: "logical block address out of range",
    0x2400: "invalid field in CDB",
    0x2500: "logical unit not supported",
    0x2600: "invalid field in parameter list",
    0x2604: "invalid release of persistent reservation",
    0x2700: "write protected",
    0x2707: "space allocation failed write protect",
    0x2900: "power on, reset, or bus device reset occurred",
    0x2903: "bus device reset function occurred",
    0x2907: "I_T nexus loss occurred",
    0x2A01: "mode parameters changed",
    0x2A03: "reservations preempted",
    0x2A04: "reservations released",
    0x2A05: "registrations preempted",
    0x2A09: "capacity data has changed",
    0x2F00: "commands cleared by another initiator",
    0x3900: "saving parameters not supported",
    0x3F0E: "reported LUNs data has changed",
    0x4400: "internal target failure",
    0x4900: "invalid message error",
}


def status_name(status: int) -> str:
    """Return the name of a status."""
    return STATUS.get(status, f"{status:#04x}")


def describe_sense(sense: bytes) -> str:
    """Return sense data of either format in one line; short data as far as it goes."""
    data = sense.ljust(18, b"\0")
    if data[0] & 0x7F in (0x72, 0x73):
        key, code = data[1] & 0xF, data[2] << 8 | data[3]
        specific = _descriptor(sense, 0x02)
        specific = specific[4:7] if specific else b""
    else:
        key, code = data[2] & 0xF, data[12] << 8 | data[13]
        specific = data[15:18]
    text = f"{KEYS[key]}: {CODES.get(code, '')} ({code >> 8:02x}/{code & 0xFF:02x})"
    if key == 5 and specific and specific[0] & 0x80:
        where = "CDB" if specific[0] & 0x40 else "parameter list"
        text += f", at byte {int.from_bytes(specific[1:3], 'big')}"
        text += f" bit {specific[0] & 7}" if specific[0] & 8 else ""
        text += f" of the {where}"
    return text


def _descriptor(sense: bytes, kind: int) -> bytes:
    at = 8
    while at + 2 <= len(sense):
        size = 2 + sense[at + 1]
        if sense[at] == kind:
            return sense[at : at + size].ljust(7, b"\0")
        at += size
    return b""


def describe_inquiry(data: bytes) -> str:
    """Return who a device says it is."""
    data = data.ljust(36, b"\0")
    fields = (data[8:16], data[16:32], data[32:36])
    vendor, product, revision = (part.decode("ascii", "replace").strip() for part in fields)
    return f"device type {data[0] & 0x1F:#x}, {vendor!r} {product!r} revision {revision!r}"


def describe_luns(data: bytes) -> str:
    """Return the numbers of logical units."""
    length = min(int.from_bytes(data[:4], "big"), len(data) - 8)
    names = []
    for at in range(8, 8 + length, 8):
        first, second = data[at : at + 8].ljust(8, b"\0")[:2]
        if first == 0xC1:
            names.append(f"well-known {second:#x}")
        else:
            names.append(str((first & 0x3F) << 8 | second))
    return f"logical units: {', '.join(names) or 'none'}"
