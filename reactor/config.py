"""Saved configurations: read from a file, checked as a whole, and carried out in order.

The form is SPDK's ``save_config`` and ``--json``::

    {"subsystems": [{"subsystem": "bdev", "config": [{"method": "...", "params": {}}]}]}

``params`` and a subsystem's ``config`` may be null or absent, and calls may stand in nested arrays.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from reactor.errors import INVALID_PARAMS, OperationError, to_operation_error
from reactor.operations import Operations


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """One operation and its arguments."""

    method: str
    params: dict[str, Any] | None = None


class Section(msgspec.Struct, forbid_unknown_fields=True):
    """The calls of one subsystem; a nested array is a batch."""

    subsystem: str
    config: list[Call | list[Call]] | None = None

    def calls(self) -> Iterator[Call]:
        """Yield the calls, batches flattened."""
        for element in self.config or ():
            if isinstance(element, list):
                yield from element
            else:
                yield element


class Configuration(msgspec.Struct, forbid_unknown_fields=True):
    """A whole configuration."""

    subsystems: list[Section]


def read_config(path: str | os.PathLike[str]) -> Any:
    """Return the JSON document in a file; OSError if unreadable, ValueError if not JSON."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from None


OnFailure = Callable[[OperationError], None]


def _raise(error: OperationError) -> None:
    raise error


async def load_config(operations: Operations, document: Any, on_failure: OnFailure = _raise) -> int:
    """Run the calls of a configuration in order and return how many they were.

    Raises OperationError that names subsystem and method. Nothing has been run if the document has
    the wrong form or names a method that does not exist; the calls before the failed one stay done.
    With another ``on_failure`` those after it are run, too.
    """
    configuration = _check(operations, document)
    count = 0
    for section in configuration.subsystems:
        for call in section.calls():
            try:
                await operations.invoke(call.method, call.params)
            except Exception as error:
                on_failure(_explain(section, call, to_operation_error(error)))
            count += 1
    return count


def _check(operations: Operations, document: Any) -> Configuration:
    try:
        configuration = msgspec.convert(document, Configuration)
    except msgspec.ValidationError as error:
        raise OperationError(INVALID_PARAMS, f"configuration: {error}") from None
    for section in configuration.subsystems:
        for call in section.calls():
            try:
                operations.find(call.method)
            except OperationError as error:
                raise _explain(section, call, error) from None
    return configuration


def _explain(section: Section, call: Call, error: OperationError) -> OperationError:
    reason = error.message.removeprefix(f"{call.method}: ")
    message = f"configuration: subsystem {section.subsystem}: {call.method}: {reason}"
    return OperationError(error.code, message, error.data)
