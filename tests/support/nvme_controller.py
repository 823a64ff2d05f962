"""An NVMe controller of software: registers and queues in shared memory, faults on command.

It is written from the specification, not from the driver: PRPs, SGLs and structures are taken apart
by their offsets. ``step()`` does what there is to do, so that tests decide when that is.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

PAGE = 4096
VERSION = 0x10400
CAP, VS, CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_COMMAND = struct.Struct("<BBHIIIQQQIIIIII")
SGL_DATA, SGL_SEGMENT, SGL_LAST_SEGMENT = 0x00, 0x20, 0x30
FLUSH, WRITE, READ, COMPARE, ZEROES, DSM, VERIFY, COPY = 0, 1, 2, 5, 8, 9, 0x0C, 0x19
HAS_COMPARE, HAS_DSM, HAS_ZEROES, HAS_VERIFY, HAS_COPY = 0x1, 0x4, 0x8, 0x80, 0x100  # ONCS
# Status fields without the phase bit: do not retry | code type | code.
INVALID_FIELD, OUT_OF_RANGE, ABORTED, MEDIA_ERROR = 0x4002, 0x4080, 0x0007, 0x4281
INTERNAL_ERROR, COMPARE_FAILURE = 0x0006, 0x0285


class DmaFaultError(Exception):
    """The device touched an address where nothing is mapped."""


class SoftDma:
    """Device addresses, and the memory behind them."""

    def __init__(self) -> None:
        self.maps: dict[int, mmap.mmap] = {}
        self._next = 0x10_0000
        self.limit: int | None = None  # bytes that may be locked at once

    def map(self, fd: int, offset: int, size: int, iova: int | None = None) -> int:
        if iova is None:
            iova, self._next = self._next, self._next + size + PAGE
        if self.limit is not None and size > self.limit:
            raise OSError(12, "Cannot allocate memory")
        self.maps[iova] = mmap.mmap(fd, size, offset=offset)
        return iova

    def unmap(self, iova: int) -> None:
        self.maps.pop(iova).close()

    def _at(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        for iova, memory in self.maps.items():
            if iova <= address and address + length <= iova + len(memory):
                return memory, address - iova
        raise DmaFaultError(f"{length} bytes at {address:#x}")

    def read(self, address: int, length: int) -> bytes:
        memory, at = self._at(address, length)
        return memory[at : at + length]

    def write(self, address: int, data: bytes) -> None:
        memory, at = self._at(address, len(data))
        memory[at : at + len(data)] = data


@dataclass
class Command:
    """A submission queue entry."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    prp1: int
    prp2: int
    cdw: tuple[int, ...]  # 10 to 15

    @classmethod
    def unpack(cls, data: bytes) -> Command:
        opcode, flags, cid, nsid, _, _, _, prp1, prp2, *cdw = _COMMAND.unpack(data)
        return cls(opcode, flags, cid, nsid, prp1, prp2, tuple(cdw))

    @property
    def first(self) -> int:
        return self.cdw[0] | self.cdw[1] << 32

    @property
    def blocks(self) -> int:
        return (self.cdw[2] & 0xFFFF) + 1


@dataclass
class Queue:
    address: int
    depth: int
    index: int = 0  # head of a submission queue, tail of a completion queue
    phase: int = 1
    other: int = 0  # the completion queue of a submission queue
    vector: int = -1


@dataclass
class Faults:
    """What goes wrong. Each may be set and cleared at any time."""

    never_ready: bool = False
    never_disabled: bool = False
    fatal: bool = False
    gone: bool = False
    hold: bool = False  # I/O commands are taken and not completed until it is cleared
    lose: int = 0  # so many I/O commands are taken and forgotten
    ignore_aborts: bool = False
    fail: list[int] = field(default_factory=list)  # status of the next I/O commands
    admin_fail: dict[int, int] = field(default_factory=dict)  # status by opcode
    admin_lose: set[int] = field(default_factory=set)  # opcodes
    cid: Callable[[int], int] | None = None  # what the next I/O completion says
    twice: bool = False  # the next I/O completion comes twice
    garbage: bytes | None = None  # what data read are instead


class Namespace:
    """Blocks in memory."""

    def __init__(self, blocks: int = 2048, block_size: int = 512) -> None:
        self.block_size = block_size
        self.data = bytearray(blocks * block_size)
        self.metadata = 0
        self.readonly = False
        self.size: int | None = None  # as identify says, if not the truth
        self.shift: int | None = None
        self.nguid = bytes(16)
        self.shared = False
        self.mssrl, self.mcl, self.msrc = 8, 20, 2  # blocks of a source range, of a copy; ranges

    @property
    def blocks(self) -> int:
        return len(self.data) // self.block_size

    def identify(self) -> bytes:
        page = bytearray(PAGE)
        size = self.blocks if self.size is None else self.size
        struct.pack_into("<QQQ", page, 0, size, size, size)
        page[30] = self.shared
        struct.pack_into("<HIB", page, 74, self.mssrl, self.mcl, self.msrc)
        page[99] = self.readonly
        page[104:120] = self.nguid
        shift = self.block_size.bit_length() - 1 if self.shift is None else self.shift
        struct.pack_into("<HBB", page, 128, self.metadata, shift, 0)
        return bytes(page)


class SoftController:
    """The device. Its registers are ``registers_fd``."""

    def __init__(self, dma: SoftDma, namespaces: dict[int, Namespace] | None = None) -> None:
        self.dma = dma
        self.namespaces = {1: Namespace()} if namespaces is None else namespaces
        self.faults = Faults()
        self.size = 0x2000
        self.registers_fd = os.memfd_create("nvme-registers")
        os.ftruncate(self.registers_fd, self.size)
        self._registers = mmap.mmap(self.registers_fd, self.size)
        self.max_entries, self.timeout, self.stride = 1024, 1, 4  # of CAP; half seconds
        self.css, self.min_page = 1, 0
        self.mdts, self.sgls, self.oncs, self.vwc, self.oacs = 5, 0, 0xC, 1, 0
        self.ocfs = 1
        self.nn, self.controller_type, self.entry_sizes = 16, 1, (0x66, 0x44)
        self.serial = b"SOFT0001"
        self.queue_limit: int | None = 8  # None: the answer is reserved
        self.master = True  # set by the transport
        self.interrupts: Sequence[int] = ()
        self.log: list[Command] = []  # I/O commands, as they were taken
        self.admin_log: list[Command] = []
        self.aborted: list[tuple[int, int]] = []
        self.dma_faults: list[str] = []
        self.segments = 0  # of the longest SGL
        self.signals = 0
        self.shutdowns = 0
        self._enabled = False
        self._reset()
        self.write64(CAP, self.capabilities())
        self.write32(VS, VERSION)

    def capabilities(self) -> int:
        stride = (self.stride // 4).bit_length() - 1
        low = (self.max_entries - 1) | 1 << 16 | self.timeout << 24
        return low | stride << 32 | self.css << 37 | self.min_page << 48

    def close(self) -> None:
        self._registers.close()
        os.close(self.registers_fd)

    # --- registers

    def read32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._registers, at)[0])

    def write32(self, at: int, value: int) -> None:
        struct.pack_into("<I", self._registers, at, value)

    def write64(self, at: int, value: int) -> None:
        struct.pack_into("<Q", self._registers, at, value)

    def _doorbell(self, qid: int, completion: bool) -> int:
        at = (2 * qid + completion) * self.stride
        if self._shadow and qid:
            return int(struct.unpack("<I", self.dma.read(self._shadow[0] + at, 4))[0])
        return self.read32(DOORBELLS + at)

    def _reset(self) -> None:
        self._submission: dict[int, Queue] = {}
        self._completion: dict[int, Queue] = {}
        self._held: list[tuple[int, Command]] = []
        self._lost: set[tuple[int, int]] = set()
        self._events: list[int] = []  # identifiers of waiting requests
        self._pending_events: list[int] = []
        self._shadow: tuple[int, int] | None = None
        self.changed: list[int] = []
        self._registers[DOORBELLS : self.size] = bytes(self.size - DOORBELLS)

    def step(self) -> int:
        """Do what there is to do; return how many commands were taken."""
        if self.faults.gone:
            self._registers[:] = b"\xff" * self.size
            return 0
        self._follow_cc()
        if not self._enabled or not self.master or self.read32(CSTS) & 2:
            return 0
        taken = 0
        for qid in list(self._submission):
            taken += self._take(qid) if qid in self._submission else 0
        if not self.faults.hold:
            held, self._held = self._held, []
            for qid, command in held:
                self._carry_out(qid, command)
        return taken

    def _follow_cc(self) -> None:
        cc = self.read32(CC)
        if cc & 1 and not self._enabled:
            self._reset()
            self._enabled = True
            aqa = self.read32(AQA)
            asq, acq = struct.unpack_from("<QQ", self._registers, ASQ)
            self._submission[0] = Queue(asq, (aqa & 0xFFF) + 1)
            self._completion[0] = Queue(acq, (aqa >> 16 & 0xFFF) + 1, vector=0)
        elif not cc & 1 and self._enabled:
            self._enabled = False
            self._reset()
        ready = self._enabled and not self.faults.never_ready
        ready = ready or (self.faults.never_disabled and bool(self.read32(CSTS) & 1))
        shutdown = 8 if cc & 0xC000 else 0
        self.shutdowns += bool(shutdown and not self.read32(CSTS) & 8)
        self.write32(CSTS, ready | self.faults.fatal << 1 | shutdown)

    # --- queues

    def _take(self, qid: int) -> int:
        queue, count = self._submission[qid], 0
        while (tail := self._doorbell(qid, completion=False)) != queue.index:
            assert tail < queue.depth, f"doorbell of queue {qid}: {tail} of {queue.depth}"
            data = self.dma.read(queue.address + queue.index * 64, 64)
            queue.index = (queue.index + 1) % queue.depth
            if self._shadow and qid:
                at = self._shadow[1] + 2 * qid * self.stride
                self.dma.write(at, struct.pack("<I", queue.index))
            count += 1
            command = Command.unpack(data)
            if qid == 0:
                self.admin_log.append(command)
                self._admin(command)
                if qid not in self._submission:
                    break
            else:
                self.log.append(command)
                self._held.append((qid, command))
        return count

    def complete(self, qid: int, cid: int, status: int = 0, result: int = 0) -> None:
        """Post a completion to the queue of submission queue ``qid``."""
        submission = self._submission[qid]
        queue = self._completion[submission.other]
        field = status << 1 | queue.phase
        entry = struct.pack("<IIHHHH", result, 0, submission.index, qid, cid, field)
        self.dma.write(queue.address + queue.index * 16, entry)
        queue.index = (queue.index + 1) % queue.depth
        queue.phase ^= queue.index == 0
        if 0 <= queue.vector < len(self.interrupts) and self.interrupts[queue.vector] >= 0:
            os.eventfd_write(self.interrupts[queue.vector], 1)
            self.signals += 1

    def _carry_out(self, qid: int, command: Command) -> None:
        faults = self.faults
        if qid not in self._submission:
            return
        if faults.lose:
            faults.lose -= 1
            self._lost.add((qid, command.cid))
            return
        try:
            status = faults.fail.pop(0) if faults.fail else self._execute(command)
        except DmaFaultError as fault:
            self.dma_faults.append(str(fault))
            status = INTERNAL_ERROR
        cid, faults.cid = faults.cid(command.cid) if faults.cid else command.cid, None
        self.complete(qid, cid, status)
        if faults.twice:
            faults.twice = False
            self.complete(qid, cid, status)

    # --- data

    def _pieces(self, command: Command, length: int) -> list[tuple[int, int]]:
        """Return addresses and lengths of a command's data."""
        if command.flags & 0xC0:
            return self._sgl_pieces(command, length)
        first = min(PAGE - command.prp1 % PAGE, length)
        pieces = [(command.prp1, first)]
        left = length - first
        if 0 < left <= PAGE:
            pieces.append((command.prp2, left))
        else:
            for entry in self._prp_entries(command.prp2, -(-left // PAGE)):
                pieces.append((entry, min(left, PAGE)))
                left -= PAGE
        assert command.prp1 % 4 == 0
        assert all(address % PAGE == 0 for address, _ in pieces[1:]), "PRPs begin at pages"
        return pieces

    def _prp_entries(self, address: int, count: int) -> Iterator[int]:
        """Follow a PRP list: a page that does not hold all ends with the address of the next."""
        while count > 0:
            room = (PAGE - address % PAGE) // 8
            here = count if count <= room else room - 1
            yield from struct.unpack(f"<{here}Q", self.dma.read(address, here * 8))
            count -= here
            if count:
                (address,) = struct.unpack("<Q", self.dma.read(address + here * 8, 8))
                assert address % PAGE == 0

    def _sgl_pieces(self, command: Command, length: int) -> list[tuple[int, int]]:
        """Follow the segments, of which the last is pointed to as such."""
        assert self.sgls, "SGLs for a controller without"
        address, size, kind = command.prp1, command.prp2 & 0xFFFF_FFFF, command.prp2 >> 56
        pieces, segments = [], 0
        while kind in (SGL_SEGMENT, SGL_LAST_SEGMENT):
            assert size
            assert size % 16 == 0
            data, last = self.dma.read(address, size), kind == SGL_LAST_SEGMENT
            segments += 1
            for at in range(0, size, 16):
                address, size, kind = struct.unpack_from("<QI3xB", data, at)
                assert (kind == SGL_DATA) == (last or at < len(data) - 16), (
                    "only the last points on"
                )
                if kind == SGL_DATA:
                    pieces.append((address, size))
        if not segments:
            pieces = [(address, size)]
        self.segments = max(self.segments, segments)
        assert all((a | n) % (4 if self.sgls == 2 else 1) == 0 for a, n in pieces)
        assert sum(n for _, n in pieces) == length
        return pieces

    def _gather(self, command: Command, length: int) -> bytes:
        return b"".join(self.dma.read(*piece) for piece in self._pieces(command, length))

    def _scatter(self, command: Command, data: bytes) -> None:
        at = 0
        for address, length in self._pieces(command, len(data)):
            self.dma.write(address, data[at : at + length])
            at += length

    def _execute(self, command: Command) -> int:
        namespace = self.namespaces.get(command.nsid)
        if namespace is None:
            return 0x400B
        if command.opcode == FLUSH:
            return 0
        if command.opcode == DSM:
            return self._deallocate(command, namespace)
        if command.opcode == COPY:
            return self._copy(command, namespace)
        size = namespace.block_size
        begin, end = command.first * size, (command.first + command.blocks) * size
        if end > len(namespace.data):
            return OUT_OF_RANGE
        if command.opcode == ZEROES:
            namespace.data[begin:end] = bytes(end - begin)
            return 0
        if self.mdts and end - begin > PAGE << self.mdts:
            return INVALID_FIELD
        return self._move(command, namespace, begin, end)

    def _move(self, command: Command, namespace: Namespace, begin: int, end: int) -> int:
        if command.opcode == READ:
            self._scatter(command, self.faults.garbage or bytes(namespace.data[begin:end]))
        elif command.opcode == WRITE:
            namespace.data[begin:end] = self._gather(command, end - begin)
        elif command.opcode == VERIFY and self.oncs & HAS_VERIFY:
            return 0  # all of it can be read
        elif command.opcode == COMPARE and self.oncs & HAS_COMPARE:
            same = namespace.data[begin:end] == self._gather(command, end - begin)
            return 0 if same else COMPARE_FAILURE
        else:
            return 0x4001
        return 0

    def _deallocate(self, command: Command, namespace: Namespace) -> int:
        count = (command.cdw[0] & 0xFF) + 1
        for at in range(count):
            _, blocks, first = struct.unpack("<IIQ", self.dma.read(command.prp1 + 16 * at, 16))
            if first + blocks > namespace.blocks:
                return OUT_OF_RANGE
            begin, end = first * namespace.block_size, (first + blocks) * namespace.block_size
            namespace.data[begin:end] = bytes(end - begin)
        return 0

    def _copy(self, command: Command, namespace: Namespace) -> int:
        if not self.oncs & HAS_COPY or command.cdw[2] >> 8 & 0xF:
            return 0x4002
        count, size = (command.cdw[2] & 0xFF) + 1, namespace.block_size
        table = self.dma.read(command.prp1, 32 * count)
        sources = [struct.unpack_from("<QH", table, 32 * i + 8) for i in range(count)]
        blocks = [less + 1 for _, less in sources]
        if count > namespace.msrc + 1 or max(blocks) > namespace.mssrl:
            return 0x4183  # command size limit exceeded
        if sum(blocks) > namespace.mcl:
            return 0x4183
        data = b""
        for (first, _), n in zip(sources, blocks, strict=True):
            if first + n > namespace.blocks:
                return OUT_OF_RANGE
            assert first + n <= command.first or first >= command.first + sum(blocks), "overlap"
            data += namespace.data[first * size : (first + n) * size]
        begin = command.first * size
        if begin + len(data) > len(namespace.data):
            return OUT_OF_RANGE
        namespace.data[begin : begin + len(data)] = data
        return 0

    # --- admin commands

    def _admin(self, command: Command) -> None:
        if command.opcode in self.faults.admin_lose:
            return
        if command.opcode in self.faults.admin_fail:
            self.complete(0, command.cid, self.faults.admin_fail[command.opcode])
            return
        if command.opcode == 0x0C:
            self._events.append(command.cid)
            self._send_events()
            return
        handlers = {
            0x00: self._delete_sq,
            0x01: self._create_sq,
            0x02: self._log_page,
            0x04: self._delete_cq,
            0x05: self._create_cq,
            0x06: self._identify,
            0x08: self._abort,
            0x09: self._set_features,
            0x7C: self._shadow_doorbells,
        }
        handler = handlers.get(command.opcode)
        status, result = handler(command) if handler else (0x4001, 0)
        self.complete(0, command.cid, status, result)

    def _create_cq(self, command: Command) -> tuple[int, int]:
        qid, depth = command.cdw[0] & 0xFFFF, (command.cdw[0] >> 16) + 1
        if qid in self._completion or qid == 0:
            return 0x4101, 0
        if depth > self.max_entries or depth < 2:
            return 0x4102, 0
        vector = command.cdw[1] >> 16 if command.cdw[1] & 2 else -1
        self._completion[qid] = Queue(command.prp1, depth, vector=vector)
        return 0, 0

    def _create_sq(self, command: Command) -> tuple[int, int]:
        qid, depth, other = (
            command.cdw[0] & 0xFFFF,
            (command.cdw[0] >> 16) + 1,
            command.cdw[1] >> 16,
        )
        if qid in self._submission or qid == 0:
            return 0x4101, 0
        if other not in self._completion:
            return 0x4100, 0
        self._submission[qid] = Queue(command.prp1, depth, other=other)
        return 0, 0

    def _delete_sq(self, command: Command) -> tuple[int, int]:
        qid = command.cdw[0] & 0xFFFF
        if qid == 0 or qid not in self._submission:
            return 0x4101, 0
        self._held = [(q, c) for q, c in self._held if q != qid]
        del self._submission[qid]
        return 0, 0

    def _delete_cq(self, command: Command) -> tuple[int, int]:
        qid = command.cdw[0] & 0xFFFF
        if qid == 0 or qid not in self._completion:
            return 0x4101, 0
        if any(queue.other == qid for queue in self._submission.values()):
            return 0x410C, 0
        del self._completion[qid]
        at = DOORBELLS + 2 * qid * self.stride
        self._registers[at : at + 2 * self.stride] = bytes(2 * self.stride)
        return 0, 0

    def _abort(self, command: Command) -> tuple[int, int]:
        qid, cid = command.cdw[0] & 0xFFFF, command.cdw[0] >> 16
        self.aborted.append((qid, cid))
        if self.faults.ignore_aborts:
            return 0, 1
        for entry in [(q, c) for q, c in self._held if (q, c.cid) == (qid, cid)]:
            self._held.remove(entry)
            self.complete(qid, cid, ABORTED)
        if (qid, cid) in self._lost:
            self._lost.discard((qid, cid))
            self.complete(qid, cid, ABORTED)
        return 0, 0

    def _set_features(self, command: Command) -> tuple[int, int]:
        if command.cdw[0] & 0xFF != 7:
            return 0, 0
        if self.queue_limit is None:
            return 0, 0xFFFF_FFFF
        return 0, (self.queue_limit - 1) << 16 | (self.queue_limit - 1)

    def _shadow_doorbells(self, command: Command) -> tuple[int, int]:
        self._shadow = (command.prp1, command.prp2)
        return 0, 0

    def _identify(self, command: Command) -> tuple[int, int]:
        cns = command.cdw[0] & 0xFF
        if cns == 0:
            found = self.namespaces.get(command.nsid)
            page = found.identify() if found else bytes(PAGE)
        elif cns == 1:
            page = self.identify()
        else:
            active = [n for n in sorted(self.namespaces) if n > command.nsid][:1024]
            page = struct.pack(f"<{len(active)}I", *active).ljust(PAGE, b"\0")
        self.dma.write(command.prp1, page)
        return 0, 0

    def identify(self) -> bytes:
        page = bytearray(PAGE)
        struct.pack_into("<HH20s40s8s", page, 0, 0x1B36, 0x1AF4, self.serial, b"Soft NVMe", b"1.0")
        page[77] = self.mdts
        struct.pack_into("<I", page, 80, VERSION)
        struct.pack_into("<I", page, 92, 0x100)
        page[111] = self.controller_type
        struct.pack_into("<HBB", page, 256, self.oacs, 3, 3)
        page[512:514] = bytes(self.entry_sizes)
        struct.pack_into("<I", page, 516, self.nn)
        struct.pack_into("<H", page, 520, self.oncs)
        page[525] = self.vwc
        struct.pack_into("<HI", page, 534, self.ocfs, self.sgls)
        return bytes(page)

    def _log_page(self, command: Command) -> tuple[int, int]:
        page, length = command.cdw[0] & 0xFF, ((command.cdw[0] >> 16) + 1) * 4
        data = bytearray(length)
        if page == 2:
            struct.pack_into("<BHBBB", data, 0, 0, 300, 99, 10, 7)
            data[112:114] = (513).to_bytes(2, "little")
        elif page == 4:
            struct.pack_into(f"<{len(self.changed)}I", data, 0, *self.changed)
            self.changed = []
        self.dma.write(command.prp1, bytes(data))
        return 0, 0

    # --- events

    def namespaces_changed(self, *nsids: int) -> None:
        """Send the notice that these namespaces have changed."""
        self.changed = list(nsids)
        self._pending_events.append(2 | 0 << 8 | 4 << 16)
        self._send_events()

    def _send_events(self) -> None:
        while self._events and self._pending_events:
            self.complete(0, self._events.pop(0), 0, self._pending_events.pop(0))


class SoftTransport:
    """``bdev.nvme_transport.Transport`` on a software controller."""

    address = "0000:01:00.0"

    def __init__(self, controller: SoftController, vectors: int = 9) -> None:
        self.controller = controller
        self.dma = controller.dma
        self.registers = (controller.registers_fd, 0, controller.size)
        self.vectors = vectors
        self.closed = False
        self.calls: list[str] = []
        self.request = -1

    def set_interrupts(self, eventfds: Sequence[int]) -> None:
        self.controller.interrupts = list(eventfds)

    def set_request(self, eventfd: int) -> None:
        self.request = eventfd

    def enable(self) -> None:
        self.calls.append("enable")
        self.controller.master = True

    def quiesce(self) -> None:
        self.calls.append("quiesce")
        self.controller.master = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True
