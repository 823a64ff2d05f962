"""Functions of users that run where a vhost device is served.

A function is marked with :func:`external_event` in a module that reactors load (``start --load
MODULE``). Its name, never code, travels to the reactor; what is not marked in a module that was
loaded there is refused. It gets a :class:`VhostDevice`, which is reachable nowhere else.
"""

from __future__ import annotations

import errno
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from reactor.errors import OperationError
from reactor.operations import Operations, operation

Function = TypeVar("Function", bound=Callable[..., Any])
Invoke = Callable[[str, dict[str, Any]], Awaitable[Any]]

_functions: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class VhostDevice:
    """A vhost device as a function sees it while it runs; see vhost.api for what it is good for.

    ``facts`` is its entry in vhost_get_controllers when the function was called; ``invoke`` runs an
    operation in the control process.
    """

    facts: dict[str, Any]
    invoke: Invoke


def name_of(function: Callable[..., Any]) -> str:
    """Return the name that a function has in every process."""
    return f"{function.__module__}:{function.__qualname__}"


def external_event(function: Function) -> Function:
    """Let ``function(device, arg)`` be called where a device is served; it may be asynchronous."""
    _functions[name_of(function)] = function
    return function


async def run(function: str, device: VhostDevice | None, arg: Any) -> Any:
    """Run a function here; OperationError(-ENOENT) if none of that name is marked."""
    if function not in _functions:
        text = f"function {function!r:.100} is not marked with external_event in a loaded module"
        raise OperationError(-errno.ENOENT, text)
    result = _functions[function](device, arg)
    return await result if inspect.isawaitable(result) else result


class ReactorContext(Protocol):
    """The part of reactor.process.ReactorContext that is needed."""

    operations: Operations
    node: Any


class ReactorSide:
    """The operation of a reactor."""

    def __init__(self, node: Any) -> None:
        self._node = node

    @operation(internal=True)
    async def vhost_external_event(self, function: str, device: dict[str, Any], arg: Any) -> Any:
        """Run a function with a device that is served here."""

        async def invoke(op: str, args: dict[str, Any]) -> Any:
            return await self._node.call("control", op, args, timeout=None)

        return await run(function, VhostDevice(device, invoke), arg)


class ExternalEvents:
    """The operation of the control process."""

    def __init__(self, vhost: Any, cluster: Any) -> None:
        """Find devices in a VhostService, and call reactors of a Cluster."""
        self._vhost = vhost
        self._cluster = cluster

    @operation(internal=True)
    async def vhost_call_external_event(
        self, ctrlr: str, function: str, arg: Any = None
    ) -> dict[str, Any]:
        """Run a function in the reactor that serves a device; say which it was.

        ``reactor`` is None where the caller has to run it itself: nothing serves the device, or
        (``device`` is None, too) there is none of that name.
        """
        found = [one for one in self._vhost.controllers() if one.name == ctrlr]
        if not found:
            return {"reactor": None, "device": None, "result": None}
        device, places = found[0].describe(), found[0].places()
        if not places:
            return {"reactor": None, "device": device, "result": None}
        reactor = next(one for one in self._cluster.everyone if one.cpu == places[0]["cpu"])
        args = {"function": function, "device": device, "arg": arg}
        result = await self._cluster.call(reactor, "vhost_external_event", args, timeout=None)
        return {"reactor": reactor.name, "device": device, "result": result}


def setup(reactor: ReactorContext) -> None:
    """Add the operation to a reactor process."""
    reactor.operations.add(ReactorSide(reactor.node))
