"""Requests that take too long: ``bdev_set_slow_request_limit``, ``bdev_set_timeout``."""

import dataclasses
import errno
import logging
from typing import Any, Literal

from bdev.kind import Bdev, Op, provider
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import lib
from reactor.operations import operation

log = logging.getLogger(__name__)

MAX_MICROSECONDS = 3600 * 10**6
Action = Literal["report", "abort"]


def check_limit(name: str, microseconds: int) -> int:
    """Return a limit in nanoseconds; OperationError(-22) if it cannot be one."""
    if not 0 <= microseconds <= MAX_MICROSECONDS:
        text = f"{name} {microseconds}: must be 0 (none) to {MAX_MICROSECONDS} microseconds"
        raise OperationError(-errno.EINVAL, text)
    return microseconds * 1000


@provider
class WatchOperations:
    """Limits on the time that a request may take."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._timeouts: dict[int, int] = {}
        registry.on_forgotten(self._forget)
        registry.add_device_settings(_calls)

    @operation
    async def bdev_set_slow_request_limit(self, name: str, limit_us: int) -> bool:
        """Have requests that take longer than so many microseconds remembered; 0 ends that."""
        await self._set(name, slow_ns=check_limit("limit_us", limit_us))
        return True

    @operation
    async def bdev_get_slow_requests(self, name: str) -> list[dict[str, Any]]:
        """Return the requests over the limit, the longest first: in flight, or that have ended.

        Of those that have ended every reactor remembers the last 64.
        """
        bdev = self._registry.find(name)
        tick = 10**6 / lib.reactor_tick_rate()
        found = [
            {
                "reactor": reactor,
                "operation": Op(one["op"]).name.lower(),
                "offset": one["offset"],
                "length": one["length"],
                "age_us": round(one["age"] * tick, 1),
                "stage": one["stage"],
                "state": "in_flight" if not one["ended"] else "ended",
                "timed_out": one["timed_out"],
                "status": one["status"],
            }
            for reactor, answer in (
                await self._registry.ask(bdev, "bdev_slow_requests", {})
            ).items()
            for one in answer
        ]
        return sorted(found, key=lambda one: one["age_us"], reverse=True)

    @operation
    async def bdev_set_timeout(self, name: str, timeout_us: int, action: Action = "report") -> bool:
        """Have requests that take longer reported, or aborted as well; 0 ends that.

        A line in the log and the notification ``bdev_timeout`` report them. What the device cannot
        take back goes on: memory that it may still write to stays its own.
        """
        nanoseconds = check_limit("timeout_us", timeout_us)
        await self._set(name, timeout_ns=nanoseconds, abort=action == "abort")
        return True

    @operation
    def bdev_get_timeouts(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the limits on the time of requests, and how many have gone over them."""
        bdevs = list(self._registry) if name is None else [self._registry.find(name)]
        return [
            {
                "name": bdev.name,
                "slow_limit_us": bdev.watch.slow_ns // 1000,
                "timeout_us": bdev.watch.timeout_ns // 1000,
                "action": "abort" if bdev.watch.abort else "report",
                "timeouts": self._timeouts.get(bdev.id, 0),
            }
            for bdev in bdevs
        ]

    @operation(internal=True)
    def bdev_timed_out(self, id: int, text: str) -> None:  # noqa: A002
        """Hear from a reactor that a request takes too long."""
        bdev = next((one for one in self._registry if one.id == id), None)
        if bdev is not None:
            log.warning("bdev %s: %s", bdev.name, text)
            self._timeouts[id] = self._timeouts.get(id, 0) + 1
            self._registry.notify("bdev_timeout", bdev.name, text=text)

    def _forget(self, bdev: Bdev) -> None:
        self._timeouts.pop(bdev.id, None)

    async def _set(self, name: str, **changes: Any) -> None:
        bdev = self._registry.find(name)
        bdev.watch = dataclasses.replace(bdev.watch, **changes)
        await self._registry.ask(bdev, "bdev_watch", {"watch": dataclasses.asdict(bdev.watch)})


def _calls(bdev: Bdev) -> list[dict[str, Any]]:
    calls = []
    if bdev.watch.slow_ns:
        params: dict[str, Any] = {"name": bdev.name, "limit_us": bdev.watch.slow_ns // 1000}
        calls.append({"method": "bdev_set_slow_request_limit", "params": params})
    if bdev.watch.timeout_ns:
        action = "abort" if bdev.watch.abort else "report"
        params = {
            "name": bdev.name,
            "timeout_us": bdev.watch.timeout_ns // 1000,
            "action": action,
        }
        calls.append({"method": "bdev_set_timeout", "params": params})
    return calls
