"""Functions that reactors run; loaded with ``--load tests.support.external``."""

from __future__ import annotations

import os
from typing import Any

import vhost
from vhost.external import VhostDevice


def setup(_reactor: Any) -> None:
    """Nothing but the functions below."""


@vhost.external_event
def where(device: VhostDevice | None, arg: Any) -> list[Any]:
    """Return the process that this runs in, the device's name, and the argument."""
    return [os.getpid(), None if device is None else vhost.dev_get_name(device), arg]


@vhost.external_event
async def look(device: VhostDevice, _: Any) -> dict[str, Any]:
    """Return what the device says of itself."""
    return {
        "cpumask": vhost.dev_get_cpumask(device),
        "coalescing": list(vhost.get_coalescing(device)),
        "bdev": vhost.blk_get_dev(device),
    }


@vhost.external_event
async def coalesce(device: VhostDevice, arg: list[int]) -> int:
    """Set it up, and return 0 or the errno."""
    try:
        await vhost.set_coalescing(device, *arg)
    except OSError as error:
        return error.errno or -1
    return 0


@vhost.external_event
async def remove(device: VhostDevice, force: bool) -> int:
    """Remove it, and return 0 or the errno."""
    try:
        await vhost.dev_remove(device, force)
    except OSError as error:
        return error.errno or -1
    return 0


@vhost.external_event
async def add_target(device: VhostDevice, arg: tuple[int, str]) -> int:
    """Add a target, and return its number or a negative errno."""
    number, bdev = arg
    try:
        return await vhost.scsi_dev_add_tgt(device, number, bdev)
    except OSError as error:
        return -(error.errno or 1)


@vhost.external_event
async def get_target(device: VhostDevice, number: int) -> Any:
    """Return what is known of a target, or a negative errno."""
    try:
        return await vhost.scsi_dev_get_tgt(device, number)
    except OSError as error:
        return -(error.errno or 1)


@vhost.external_event
async def remove_target(device: VhostDevice, number: int) -> list[Any]:
    """Remove a target; return 0 or a negative errno, and what the callback was called with."""
    called: list[Any] = []

    async def done(device: VhostDevice, arg: int) -> None:
        called.extend([vhost.dev_get_name(device), arg, await vhost.scsi_dev_get_tgt(device, arg)])

    try:
        await vhost.scsi_dev_remove_tgt(device, number, done, number)
    except OSError as error:
        return [-(error.errno or 1), called]
    return [0, called]


seen: list[str | None] = []


@vhost.external_event
def note(device: VhostDevice | None, _: Any) -> None:
    """Remember the order of calls in this process."""
    seen.append(None if device is None else vhost.dev_get_name(device))


def unmarked(_device: VhostDevice | None, _: Any) -> None:
    """Not to be reached by name."""
