"""The admin queue of an NVMe controller: a few commands, driven from the control process."""

import asyncio
import errno
from typing import NamedTuple

from bdev.nvme_transport import ControllerError, DmaMemory, DmaSpace, Registers
from reactor.native import CData, ffi, lib

DEPTH = 32  # entries of each queue; the least that Base 3.3 lets a controller refuse is 2
_SUBMISSION, _COMPLETION = 0, 4096
_FIRST_DELAY, _LAST_DELAY = 0.0002, 0.02  # seconds between looks, where no interrupt tells
GENERIC, SPECIFIC = 0, 1  # types of status codes

# What a status says (Base figures 94 and 96), of those that are likely to be seen.
_STATUS = {
    (0, 0x01): "invalid opcode",
    (0, 0x02): "invalid field in the command",
    (0, 0x04): "data transfer error",
    (0, 0x06): "internal error",
    (0, 0x07): "aborted",
    (0, 0x0B): "invalid namespace or format",
    (1, 0x00): "invalid completion queue",
    (1, 0x01): "invalid queue identifier",
    (1, 0x02): "invalid queue size",
    (1, 0x05): "asynchronous event limit exceeded",
    (1, 0x08): "invalid interrupt vector",
}


class CommandError(ControllerError):
    """A command ended with an error status."""

    def __init__(self, what: str, kind: int, code: int) -> None:
        text = _STATUS.get((kind, code), "see the NVMe specification")
        super().__init__(f"{what} failed with status {kind}/{code:#04x}: {text}")
        self.kind = kind
        self.status = code


class _Pending(NamedTuple):
    what: str
    future: asyncio.Future[int]


class AdminQueue:
    """Submits commands and matches their completions.

    ``poll()`` looks for completions; whoever awaits a command calls it, and so should the owner of
    an interrupt.
    """

    def __init__(self, registers: Registers, dma: DmaSpace) -> None:
        self._registers = registers
        self.memory = DmaMemory(dma, "nvme-admin", 8192)
        self._commands = self.memory.at("struct nvme_command *", _SUBMISSION)
        self._completions = self.memory.at("struct nvme_completion *", _COMPLETION)
        self._pending: dict[int, _Pending] = {}
        self._room = asyncio.Semaphore(DEPTH - 1)
        self._head = self._tail = 0
        self._phase = 1
        self._stride = 4

    def install(self, stride: int) -> None:
        """Tell a disabled controller where the queue is; doorbells are ``stride`` bytes apart."""
        self.abandon("the controller was reset")
        self.memory.clear()
        self._head = self._tail = 0
        self._phase = 1
        self._stride = stride
        self._registers.write32(lib.NVME_REG_AQA, (DEPTH - 1) << 16 | (DEPTH - 1))
        self._registers.write64(lib.NVME_REG_ASQ, self.memory.iova + _SUBMISSION)
        self._registers.write64(lib.NVME_REG_ACQ, self.memory.iova + _COMPLETION)

    def abandon(self, why: str) -> None:
        """Fail every command in flight: the controller will not complete any."""
        pending, self._pending = self._pending, {}
        for entry in pending.values():
            self._room.release()
            if not entry.future.done():
                entry.future.set_exception(
                    ControllerError(f"{entry.what}: {why}", -errno.ECANCELED)
                )
                entry.future.exception()  # one that nobody awaits any more is not worth a warning

    async def submit(self, what: str, **command: int) -> asyncio.Future[int]:
        """Submit a command of these fields; the future has dword 0 of its completion."""
        await self._room.acquire()
        cid = next(i for i in range(DEPTH) if i not in self._pending)
        future = asyncio.get_running_loop().create_future()
        self._pending[cid] = _Pending(what, future)
        self._commands[self._tail] = ffi.new("struct nvme_command *", {"cid": cid, **command})[0]
        self._tail = (self._tail + 1) % DEPTH
        self._registers.write32(lib.NVME_REG_DOORBELLS, self._tail)
        return future

    async def run(self, what: str, timeout: float, **command: int) -> int:
        """Submit a command and return dword 0 of its completion.

        CommandError if it ended with an error; ControllerError(-110) after ``timeout`` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        future = await self.submit(what, **command)
        delay = _FIRST_DELAY
        while not future.done():
            self.poll()
            if future.done():
                break
            if loop.time() >= deadline:
                future.cancel()
                raise ControllerError(f"{what}: no completion in {timeout:g} s", -errno.ETIMEDOUT)
            await asyncio.wait([future], timeout=delay)
            delay = min(delay * 2, _LAST_DELAY)
        return future.result()

    def poll(self) -> int:
        """Take what has completed, and return how many; ControllerError if it makes no sense."""
        count = 0
        while (entry := self._completions[self._head]).status & 1 == self._phase:
            cid, status, result = entry.cid, entry.status >> 1, entry.result
            count += 1
            self._head = (self._head + 1) % DEPTH
            self._phase ^= self._head == 0
            self._complete(cid, status, result)
        if count:
            self._registers.write32(lib.NVME_REG_DOORBELLS + self._stride, self._head)
        return count

    def _complete(self, cid: int, status: int, result: int) -> None:
        pending = self._pending.pop(cid, None)
        if pending is None:
            raise ControllerError(
                f"the device completed admin command {cid}, which is not in flight"
            )
        self._room.release()
        kind, code = status >> 8 & 7, status & 0xFF
        if pending.future.done():
            return  # nobody waits any more
        if kind or code:
            pending.future.set_exception(CommandError(pending.what, kind, code))
        else:
            pending.future.set_result(result)

    def close(self) -> None:
        """Give the memory back; the controller is disabled."""
        self.abandon("the controller was detached")
        self.memory.close()


def identify(cns: int, nsid: int, prp: int) -> dict[str, int]:
    """Return the fields of an Identify command (Base 5.17)."""
    return {"opcode": lib.NVME_ADMIN_IDENTIFY, "nsid": nsid, "cdw10": cns, "prp1": prp}


def log_page(page: int, length: int, prp: int, nsid: int = 0xFFFF_FFFF) -> dict[str, int]:
    """Return the fields of a Get Log Page command (Base 5.16); ``length`` in bytes."""
    dwords = length // 4 - 1
    return {
        "opcode": lib.NVME_ADMIN_GET_LOG_PAGE,
        "nsid": nsid,
        "prp1": prp,
        "cdw10": page | (dwords & 0xFFFF) << 16,
        "cdw11": dwords >> 16,
    }


def set_features(feature: int, value: int) -> dict[str, int]:
    """Return the fields of a Set Features command (Base 5.27)."""
    return {"opcode": lib.NVME_ADMIN_SET_FEATURES, "cdw10": feature, "cdw11": value}


def structure(ctype: str, data: bytes) -> CData:
    """Return a copy of ``data`` as a structure of C."""
    value = ffi.new(f"{ctype} *")
    ffi.memmove(value, data, ffi.sizeof(ctype))
    return value
