"""The table of operations that events, JSON-RPC and the command line reach alike.

An operation is a method marked with :func:`operation` on an object that is added to a process's
:class:`Operations`. Its signature is its schema: parameters are validated against their annotations
before the method runs, so nothing about an operation is described twice. Parameters that several
operations have in common are a TypedDict, ``**these: Unpack[Those]``, of which a method gets what
is given.
"""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

import msgspec

from reactor.errors import INVALID_PARAMS, METHOD_NOT_FOUND, OperationError

Method = TypeVar("Method", bound=Callable[..., Any])

_MARK = "_operation"
_ASKS = re.compile(r"(^|_)(get|ping|count|wait)(_|$)")


@dataclass(frozen=True)
class _Mark:
    aliases: tuple[str, ...]
    internal: bool
    touches: bool


class FileDescriptors(list[int]):
    """Descriptors that came with an event: closed with it unless the operation takes them over."""

    def take(self, index: int) -> int:
        """Return descriptor ``index``; from now on it is the caller's to close."""
        if not 0 <= index < len(self):
            raise OperationError(
                INVALID_PARAMS, f"file descriptor {index} is missing: {len(self)} came"
            )
        fd, self[index] = self[index], -1
        if fd < 0:
            raise OperationError(INVALID_PARAMS, f"file descriptor {index} was taken already")
        return fd

    def close(self) -> None:
        """Close those that nobody took."""
        for fd in self:
            if fd >= 0:
                os.close(fd)
        self.clear()

    def __enter__(self) -> FileDescriptors:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@overload
def operation(method: Method) -> Method: ...
@overload
def operation(
    *, aliases: Iterable[str] = (), internal: bool = False, touches: bool = False
) -> Callable[[Method], Method]: ...
def operation(
    method: Method | None = None,
    *,
    aliases: Iterable[str] = (),
    internal: bool = False,
    touches: bool = False,
) -> Method | Callable[[Method], Method]:
    """Mark a method as an operation under its own name, and under ``aliases``.

    One that is ``internal`` is for events between the processes of a cluster; JSON-RPC has it not.
    One that ``touches`` says itself which parts of the configuration it changes (reactor/saved.py).
    """

    def mark(function: Method) -> Method:
        setattr(function, _MARK, _Mark(tuple(aliases), internal, touches))
        return function

    return mark if method is None else mark(method)


class Operation:
    """One entry of the table: a bound method and what its signature says."""

    def __init__(self, name: str, method: Callable[..., Any]) -> None:
        mark: _Mark = getattr(method, _MARK)
        self.name = name
        self.method = method
        self.aliases = mark.aliases
        self.internal = mark.internal
        asks = _ASKS.search(name) is not None
        self.is_change = not mark.internal and not asks
        """Whether the configuration may be another one afterwards."""
        self.touches = mark.touches
        self.doc = inspect.getdoc(method) or ""
        self.is_async = inspect.iscoroutinefunction(method)
        hints = typing.get_type_hints(method)
        self._fds_parameter: str | None = None
        self._takes_any = False
        self._common: set[str] = set()  # parameters that a method gets only if they are given
        fields: list[Any] = []
        for parameter in inspect.signature(method).parameters.values():
            hint = hints[parameter.name]
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                common = _unpacked(hint)
                fields += [(name, one, None) for name, one in common.items()]
                self._common.update(common)
                self._takes_any = not common
            elif hint is FileDescriptors:
                self._fds_parameter = parameter.name
            elif parameter.default is inspect.Parameter.empty:
                fields.append((parameter.name, hint))
            else:
                fields.append((parameter.name, hint, parameter.default))
        self._arguments = msgspec.defstruct(
            name, fields, kw_only=True, forbid_unknown_fields=not self._takes_any
        )
        self._names = self._arguments.__struct_fields__

    def bind(self, args: Mapping[str, Any], fds: FileDescriptors | None) -> dict[str, Any]:
        """Return validated keyword arguments; OperationError(-32602) names the bad one."""
        if not (args or fds or self._names or self._fds_parameter):
            return {}
        try:
            parsed = msgspec.convert(args, self._arguments)
        except msgspec.ValidationError as error:
            raise OperationError(INVALID_PARAMS, f"{self.name}: {_explain(error)}") from None
        bound = {name: getattr(parsed, name) for name in self._names}
        for name in self._common:
            if bound[name] is None:
                del bound[name]
        if self._takes_any:
            bound |= {name: value for name, value in args.items() if name not in bound}
        if self._fds_parameter is not None:
            bound[self._fds_parameter] = FileDescriptors() if fds is None else fds
        elif fds:
            raise OperationError(INVALID_PARAMS, f"{self.name}: takes no file descriptors")
        return bound

    def parameters(self) -> list[dict[str, Any]]:
        """Return name, type and default of each parameter, for help texts and references."""
        described = []
        for field in msgspec.structs.fields(self._arguments):
            entry: dict[str, Any] = {
                "name": field.name,
                "type": _type_name(field.type),
                "required": field.required,
            }
            if not field.required:
                entry["default"] = field.default
            described.append(entry)
        return described


def _unpacked(annotation: Any) -> dict[str, Any]:
    """Return the members of ``Unpack[SomeTypedDict]``; of any other annotation, nothing."""
    if typing.get_origin(annotation) is not typing.Unpack:
        return {}
    (common,) = typing.get_args(annotation)
    return typing.get_type_hints(common)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _explain(error: msgspec.ValidationError) -> str:
    """Turn "Expected `int`, got `str` - at `$.num_blocks`" into "num_blocks: Expected ..."."""
    text, separator, where = str(error).partition(" - at `$.")
    return f"{where.rstrip('`')}: {text}" if separator else text


class Saved(Protocol):
    """What keeps the configuration as it is: reactor.saved."""

    def changed(self) -> None:
        """Take note that anything of it may have changed."""

    async def saved(self) -> None:
        """Return when what has changed until now is kept."""


class Operations:
    """The operations of one process.

    ``saved`` keeps what they change, which is to be so before one is answered: see ``kept``.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Operation] = {}
        self.saved: Saved | None = None

    def is_kept(self, name: str) -> bool:
        """Tell whether nothing that an operation changes has to be kept.

        Those that only ask have it in their names; those between processes tell what has happened.
        """
        entry = self._by_name.get(name)
        return self.saved is None or entry is None or not entry.is_change

    async def kept(self, name: str) -> None:
        """Return when what an operation has changed is kept, and it may be answered."""
        if self.saved is not None and not self.is_kept(name):
            await self.saved.saved()

    def done(self, entry: Operation) -> None:
        """Take note that an operation is over, however it ended."""
        if self.saved is not None and entry.is_change and not entry.touches:
            self.saved.changed()

    def add(self, *providers: object) -> None:
        """Add every marked method of each provider; ValueError if a name is there already."""
        for provider in providers:
            for name, function in inspect.getmembers(type(provider), inspect.isfunction):
                if hasattr(function, _MARK):
                    self._register(Operation(name, getattr(provider, name)))

    def _register(self, entry: Operation) -> None:
        for name in (entry.name, *entry.aliases):
            if name in self._by_name:
                raise ValueError(f"operation {name} is registered twice")
            self._by_name[name] = entry

    def find(self, name: str, *, internal: bool = True) -> Operation:
        """Return the operation called ``name``; OperationError(-32601) if there is none.

        Without ``internal``, those that are internal are as if they were not there.
        """
        entry = self._by_name.get(name)
        if entry is None or (entry.internal and not internal):
            raise OperationError(METHOD_NOT_FOUND, f"Method not found: {name}")
        return entry

    def names(self, *, aliases: bool = True) -> list[str]:
        """Return the names of those that are not internal, sorted."""
        return sorted(
            name
            for name, entry in self._by_name.items()
            if not entry.internal and (aliases or name == entry.name)
        )

    async def invoke(
        self,
        name: str,
        args: Mapping[str, Any] | None = None,
        fds: FileDescriptors | None = None,
        *,
        internal: bool = True,
    ) -> Any:
        """Validate, run, and return the result, which may be told when it is ``kept``.

        Raises OperationError, or whatever the method raises. Descriptors that it did not take are
        closed in any case.
        """
        try:
            entry = self.find(name, internal=internal)
            bound = entry.bind(args or {}, fds)
            try:
                result = entry.method(**bound)
                return await result if entry.is_async else result
            finally:
                self.done(entry)
        finally:
            if fds:
                fds.close()
