"""Python: a device that a user's class is (bdev/device.py), in a process of its own."""

import errno
from typing import Any

from bdev.kind import EINVAL, Bdev, OpenContext, opener, provider
from bdev.parameters import check_name, check_uuid
from bdev.python_process import Area, HostProcess
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import CData, ffi, lib
from reactor.operations import operation

DEFAULT_TIMEOUT = 10.0  # seconds
GRACE = 1.0  # seconds that the process has to answer that a request has timed out
MAX_TIMEOUT = 3600.0


class PythonBdev(Bdev):
    """A device whose requests are methods of an object in another process."""

    kind = "python"
    product_name = "Python disk"

    def __init__(
        self,
        name: str,
        host: HostProcess,
        described: dict[str, Any],
        *,
        params: dict[str, Any],
        uuid: str,
    ) -> None:
        super().__init__(
            name,
            block_size=described["block_size"],
            num_blocks=described["num_blocks"],
            uuid=uuid,
            readonly=described["readonly"],
            unmap=described["discard"],
        )
        self.host = host
        self._params = params
        self._areas: dict[str, Area] = {}  # by reactor

    async def lend(self, reactor: Any) -> tuple[dict[str, Any], list[int]]:
        """Give a reactor a way of its own to the process."""
        area = self._areas[reactor.name] = await self.host.attach()
        args = {
            **self.open_args(),
            "readonly": self.readonly,
            "supported": sum(1 << op for op in self.native),
            "timeout": self._params["timeout"] + GRACE,
        }
        return args, area.fds

    async def take_back(self, reactor: Any) -> None:
        """End what a reactor had under way, as far as there is anything."""
        area = self._areas.pop(reactor.name, None)
        if area is not None:
            await self.host.detach(area)

    async def fence(self, reactor: Any) -> None:
        """Wait until all that a dead reactor had asked for has ended, or was cancelled."""
        await self.take_back(reactor)

    def close(self) -> None:
        """End the process."""
        self.host.close()

    @property
    def has_history(self) -> bool:
        """Return that a class may serve what was there before."""
        return True

    def driver_specific(self) -> dict[str, Any]:
        """Return the class, and the process."""
        return {
            "python": {**self._params, "pid": self.host.pid, "restarts": self.host.restarts},
        }

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device."""
        params = {"name": self.name, "uuid": self.uuid, **self._params}
        return {"method": "bdev_python_create", "params": params}


@provider
class PythonOperations:
    """``bdev_python_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._hosts: set[HostProcess] = set()
        registry.at_end(self._end_all)

    @operation
    async def bdev_python_create(
        self,
        name: str,
        device: str,
        args: dict[str, Any] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        uuid: str | None = None,
    ) -> str:
        """Create a device of a class that a loaded module registered, and return its name.

        ``args`` are those of the class; a request that takes longer than ``timeout`` s fails.
        """
        check_name(name)
        self._registry.check_unused(name, check_uuid(uuid or ""))
        if not 0 < timeout <= MAX_TIMEOUT:
            raise OperationError(
                EINVAL, f"timeout {timeout:g}: must be more than 0 and at most {MAX_TIMEOUT:g} s"
            )
        params = {"device": device, "args": args or {}, "timeout": timeout}
        host = HostProcess(name, device, args or {}, timeout, self._registry.cluster.modules)
        self._hosts.add(host)
        try:
            described = await host.start()
            bdev = PythonBdev(name, host, described, params=params, uuid=uuid or "")
            await self._registry.register(bdev)
        except BaseException:
            await self._end(host)
            raise
        return name

    @operation
    async def bdev_python_delete(self, name: str) -> bool:
        """Delete a Python device, and end its process."""
        bdev = self._find(name)
        await self._registry.remove(name, kind="python")
        await self._end(bdev.host)
        return True

    @operation
    async def bdev_python_rescan(self, name: str) -> bool:
        """Look at a device's size again, and let guests know of a change."""
        bdev = self._find(name)
        described = await bdev.host.call("describe", {}, timeout=DEFAULT_TIMEOUT)
        if described["block_size"] != bdev.block_size or described["num_blocks"] < 1:
            raise OperationError(
                EINVAL,
                f"bdev {name}: has {described['num_blocks']} blocks of {described['block_size']} "
                f"bytes now; it had blocks of {bdev.block_size}",
            )
        await self._registry.resize(bdev, described["num_blocks"])
        return True

    def _find(self, name: str) -> PythonBdev:
        bdev = self._registry.find(name)
        if not isinstance(bdev, PythonBdev):
            raise OperationError(-errno.ENODEV, f"No such device: python bdev {name!r:.80}")
        return bdev

    async def _end(self, host: HostProcess) -> None:
        await host.end()
        self._hosts.discard(host)

    def _end_all(self) -> None:
        for host in self._hosts:
            host.end_blocking()
        self._hosts.clear()


@opener("python")
def open_python(context: OpenContext) -> CData:
    """Open a Python device in a reactor."""
    args, fds = context.args, context.fds
    setup = ffi.new(
        "struct python_setup *",
        {
            "memory_fd": fds[0],
            "ask_fd": fds[1],
            "answer_fd": fds[2],
            "block_size": args["block_size"],
            "block_count": args["num_blocks"],
            "supported": args["supported"],
            "readonly": args["readonly"],
            "timeout_ns": int(args["timeout"] * 1e9),
        },
    )
    handle = lib.python_bdev_open(context.reactor, context.id, context.slot, setup)
    if handle != ffi.NULL:
        for index in range(3):
            context.fds.take(index)
    return handle
