"""Error: a device that fails, withholds or corrupts requests to another one, as it is told."""

import random
from typing import Any, Literal

from bdev.kind import DEVICE_OPS, EINVAL, Bdev, Op, OpenContext, command, opener, provider
from bdev.registry import BdevRegistry
from bdev.shared import Shared
from bdev.stacked import LayerBdev
from reactor.errors import OperationError
from reactor.native import CData, lib
from reactor.operations import operation

IoType = Literal["clear", "read", "write", "unmap", "flush", "write_zeroes", "reset", "all"]
ErrorType = Literal["failure", "nvme_failure", "pending", "corrupt_data", "nomem"]

_TYPES = {
    "failure": lib.ERROR_FAILURE,
    "pending": lib.ERROR_PENDING,
    "corrupt_data": lib.ERROR_CORRUPT,
    "nomem": lib.ERROR_NOMEM,
}
_ALL: tuple[Op, ...] = tuple(sorted(DEVICE_OPS - {Op.RESET}))
_DATA = (Op.READ, Op.WRITE)


class ErrorBdev(LayerBdev):
    """A device whose faults are described in shared memory: reactors count them together."""

    kind = "error"
    product_name = "Error Injection Disk"

    def __init__(self, base: Bdev, *, uuid: str) -> None:
        super().__init__(f"EE_{base.name}", base, uuid=uuid)
        self._rules = Shared("bdev-error", "struct error_rules")

    def inject(
        self,
        ops: tuple[Op, ...],
        error_type: int,
        *,
        left: int,
        rate: float,
        queue_depth: int,
        corrupt_offset: int,
        corrupt_value: int,
    ) -> None:
        """Have so many of the next ``ops`` hit, or each with a chance of ``rate`` percent."""
        for op in ops:
            rule = self._rules.struct.rule[op]
            rule.type = lib.ERROR_NONE
            rule.rate = min(int(rate / 100 * 2**32), 2**32 - 1)
            rule.left = left
            rule.queue_depth = queue_depth
            rule.corrupt_offset = corrupt_offset
            rule.corrupt_value = corrupt_value
            rule.type = error_type

    def clear(self) -> None:
        """Have nothing happen any more; what is withheld stays so."""
        for op in DEVICE_OPS:
            self._rules.struct.rule[op].type = lib.ERROR_NONE

    def open_args(self) -> dict[str, Any]:
        """Add a seed, for a chance of its own in every reactor."""
        return {**super().open_args(), "seed": random.getrandbits(32)}

    def open_fds(self) -> list[int]:
        """Lend the rules."""
        return [self._rules.fd]

    def close(self) -> None:
        """Release the rules."""
        self._rules.close()

    def driver_specific(self) -> dict[str, Any]:
        """Return what is going to happen."""
        names = {number: name for name, number in _TYPES.items()}
        rules = {}
        for op in DEVICE_OPS:
            rule = self._rules.struct.rule[op]
            if rule.type != lib.ERROR_NONE and rule.left:
                left = None if rule.left == lib.ERROR_NO_END else rule.left
                rules[op.name.lower()] = {"error_type": names[rule.type], "left": left}
        return {"error": {"base_bdev": self.bases[0].name, "rules": rules}}

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device; what it does to requests is not saved."""
        return {
            "method": "bdev_error_create",
            "params": {"base_name": self.bases[0].name, "uuid": self.uuid},
        }


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise OperationError(EINVAL, f"{name} {value}: must be {low} to {high}")


@provider
class ErrorOperations:
    """``bdev_error_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry

    @operation(aliases=["construct_error_bdev"])
    async def bdev_error_create(self, base_name: str, uuid: str | None = None) -> bool:
        """Create a device ``EE_base_name`` on ``base_name``, whose requests can be made to fail."""
        base = self._registry.find(base_name)
        await self._registry.register(ErrorBdev(base, uuid=uuid or ""))
        return True

    @operation(aliases=["delete_error_bdev"])
    async def bdev_error_delete(self, name: str) -> bool:
        """Delete an error device; its base stays."""
        await self._registry.remove(name, kind="error")
        return True

    @operation
    def bdev_error_inject_error(
        self,
        name: str,
        io_type: IoType,
        error_type: ErrorType = "failure",
        num: int | None = None,
        queue_depth: int = 0,
        corrupt_offset: int = 0,
        corrupt_value: int = 0,
        nvme_sct: int | None = None,
        nvme_sc: int | None = None,
        rate: float = 0.0,
    ) -> bool:
        """Have the next ``num`` requests of a type hit; ``clear`` ends that.

        With ``rate`` (percent) each is hit by chance; ``num`` then bounds how many, if it is given.
        """
        bdev = self._registry.find_as(name, ErrorBdev)
        if io_type == "clear":
            bdev.clear()
            return True
        if error_type == "nvme_failure" or nvme_sct or nvme_sc:
            raise OperationError(EINVAL, "nvme_failure: not supported; use failure")
        ops: tuple[Op, ...] = _ALL if io_type == "all" else (Op[io_type.upper()],)
        if error_type == "corrupt_data":
            _check_range("corrupt_value", corrupt_value, 1, 255)
            ops = tuple(op for op in ops if op in _DATA)
            if not ops:
                raise OperationError(EINVAL, f"io_type {io_type}: has no data to corrupt")
        _check_range("corrupt_offset", corrupt_offset, 0, 2**62)
        _check_range("queue_depth", queue_depth, 0, 2**32 - 1)
        if not 0 <= rate <= 100:
            raise OperationError(EINVAL, f"rate {rate}: must be 0 to 100 percent")
        if num is None:
            left = lib.ERROR_NO_END if rate else 1
        else:
            _check_range("num", num, 0, 2**32 - 1)
            left = num
        bdev.inject(
            ops,
            _TYPES[error_type],
            left=left,
            rate=0.0 if rate == 100 else rate,
            queue_depth=queue_depth,
            corrupt_offset=corrupt_offset,
            corrupt_value=corrupt_value,
        )
        return True

    @operation
    async def bdev_error_resume_pending(self, name: str) -> bool:
        """Carry out what is withheld."""
        await self._registry.command(self._registry.find_as(name, ErrorBdev), {})
        return True


@opener("error")
def open_error(context: OpenContext) -> CData:
    """Open an error device in a reactor."""
    return lib.error_bdev_open(
        context.id,
        context.slot,
        context.args["num_blocks"],
        context.bases[0],
        context.fds[0],
        context.args["seed"],
    )


@command("error")
def resume(handle: CData, args: dict[str, Any]) -> None:
    """Let go of what a handle withholds."""
    del args
    lib.error_bdev_resume(handle)
