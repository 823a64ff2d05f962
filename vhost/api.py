"""The public API of SPDK's vhost.h of 2018, in Python: docs/api.md is the table of names.

One target a process, as there. Functions that wait are coroutines; what returned -errno raises
OSError with that errno. A device is reachable only inside of a function that was called with it:
see :func:`call_external_event`.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from reactor.errors import OperationError
from vhost.external import VhostDevice, external_event, name_of, run

__all__ = [
    "VhostDevice",
    "blk_construct",
    "blk_get_dev",
    "call_external_event",
    "call_external_event_foreach",
    "config_json",
    "dev_get_cpumask",
    "dev_get_name",
    "dev_remove",
    "external_event",
    "fini",
    "get_coalescing",
    "init",
    "invoke",
    "scsi_dev_add_tgt",
    "scsi_dev_construct",
    "scsi_dev_get_tgt",
    "scsi_dev_remove_tgt",
    "set_coalescing",
    "set_socket_path",
    "shutdown_cb",
]

# What operations that answer as SPDK does, with the code for parameters, have in their texts.
_ERRNOS = ("ENODEV", "EEXIST", "EBUSY", "EPERM", "ENOSPC", "EALREADY", "ENOTSUP", "EADDRINUSE")


class _Target:
    """What runs between init() and fini()."""

    def __init__(self) -> None:
        self.socket_path: Path | None = None
        self.operations: Any = None
        self.stack: AsyncExitStack | None = None


_target = _Target()


def _os_error(error: OperationError) -> OSError:
    """Return the OSError that an operation's error stands for."""
    if -4096 < error.code < 0:
        return OSError(-error.code, error.message)
    codes = [getattr(errno, name) for name in _ERRNOS]
    found = [code for code in codes if error.message.startswith(os.strerror(code))]
    return OSError(found[0] if found else errno.EINVAL, error.message)


async def invoke(op: str, args: dict[str, Any] | None = None) -> Any:
    """Run any operation of the target, such as bdev_malloc_create; OSError."""
    if _target.operations is None:
        raise OSError(errno.ENXIO, "vhost is not initialised: call init() first")
    try:
        try:
            return await _target.operations.invoke(op, args or {})
        finally:
            await _target.operations.kept(op)
    except OperationError as error:
        raise _os_error(error) from None


async def _at(device: VhostDevice, op: str, args: dict[str, Any]) -> Any:
    """Run an operation on behalf of a device, from whatever process this is."""
    try:
        return await device.invoke(op, {"ctrlr": device.facts["ctrlr"], **args})
    except OperationError as error:
        raise _os_error(error) from None


# The target.


def set_socket_path(basename: str | os.PathLike[str]) -> None:
    """Have sockets made in this directory; to be called before init(), the default is its run_dir.

    OSError: ENOTDIR, ENOENT, EACCES; EBUSY after init().
    """
    from vhost.app import existing_directory

    if _target.stack is not None:
        raise OSError(errno.EBUSY, "the socket path must be set before init()")
    _target.socket_path = existing_directory(Path(basename))


async def init(
    run_dir: str | os.PathLike[str],
    cpumask: str | None = None,
    *,
    load: tuple[str, ...] = (),
    lock_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Start reactors, with the modules of ``load``, and serve; OSError, EALREADY if it runs."""
    from reactor import cpumask as cpumasks
    from reactor.operations import Operations
    from reactor.rundir import RunDir
    from reactor.vault import NoVault
    from vhost.app import Options, choose_cpus, start_services

    if _target.stack is not None:
        raise OSError(errno.EALREADY, "vhost is initialised already")
    async with AsyncExitStack() as stack:
        try:
            cpus = choose_cpus(cpumask)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        directory = stack.enter_context(RunDir(Path(run_dir))).path
        locks = Path(lock_dir or cpumasks.LOCK_DIR)
        stack.enter_context(cpumasks.claim(cpus, f"vhost in {directory}", locks))
        operations = Operations()
        sockets = _target.socket_path or directory
        options = Options(cpumask=cpumask, load=load)
        # The reactors end with the program that this is part of.
        services = await start_services(
            options, stack, operations, NoVault(), directory, cpus, sockets
        )
        services.framework.initialised()
        _target.operations = operations
        _target.stack = stack.pop_all()


async def fini(done: Callable[[], None] | None = None) -> None:
    """Remove every device once its I/O is done, end the reactors, then call ``done``."""
    stack, _target.stack, _target.operations = _target.stack, None, None
    _target.socket_path = None
    if stack is not None:
        await stack.aclose()
    if done is not None:
        done()


async def shutdown_cb() -> None:
    """End the target, as an application's last call does: fini() without a callback."""
    await fini()


async def config_json() -> list[dict[str, Any]]:
    """Return the subsystems of a saved configuration that build all vhost devices again."""
    return [
        {"subsystem": name, "config": await invoke("framework_get_config", {"name": name})}
        for name in ("vhost_blk", "vhost_scsi")
    ]


# Devices by name.


async def blk_construct(
    name: str, cpumask: str | None, dev_name: str, readonly: bool = False
) -> None:
    """Serve a bdev as a virtio-blk device on socket ``name``; OSError EEXIST, ENODEV, EINVAL."""
    args = {"ctrlr": name, "dev_name": dev_name, "cpumask": cpumask, "readonly": readonly}
    await invoke("vhost_create_blk_controller", args)


async def scsi_dev_construct(name: str, cpumask: str | None = None) -> None:
    """Make a virtio-scsi device without targets on the socket ``name``; OSError."""
    args = {"ctrlr": name} if cpumask is None else {"ctrlr": name, "cpumask": cpumask}
    await invoke("vhost_create_scsi_controller", args)


async def call_external_event(
    vdev_name: str, fn: Callable[[VhostDevice | None, Any], Any], arg: Any = None
) -> Any:
    """Run ``fn(device, arg)`` in the reactor that serves a device, and return what it returns.

    ``fn`` is marked with external_event, in a module that reactors load; ``arg`` and the result are
    what msgpack can express. It runs here and at once if nothing serves the device, and with None
    if there is no device of that name. OSError(ENOENT) where it is not marked.
    """
    args = {"ctrlr": vdev_name, "function": name_of(fn), "arg": arg}
    answer = await invoke("vhost_call_external_event", args)
    if answer["reactor"] is not None:
        return answer["result"]
    known = answer["device"]
    device = None if known is None else VhostDevice(known, _target.operations.invoke)
    try:
        return await run(name_of(fn), device, arg)
    except OperationError as error:
        raise _os_error(error) from None


async def call_external_event_foreach(
    fn: Callable[[VhostDevice | None, Any], Any], arg: Any = None
) -> None:
    """Do so for each device, one after another, and last call ``fn(None, arg)`` here.

    A device that is removed meanwhile is left out; what ``fn`` returns is ignored.
    """
    for controller in await invoke("vhost_get_controllers"):
        names = {one["ctrlr"] for one in await invoke("vhost_get_controllers")}
        if controller["ctrlr"] in names:
            await call_external_event(controller["ctrlr"], fn, arg)
    try:
        await run(name_of(fn), None, arg)
    except OperationError as error:
        raise _os_error(error) from None


# Devices, inside of such a function.


def dev_get_name(device: VhostDevice) -> str:
    """Return its name, which is that of its socket."""
    return str(device.facts["ctrlr"])


def dev_get_cpumask(device: VhostDevice) -> str:
    """Return the CPUs of the reactors that may serve it, as a hexadecimal mask."""
    return str(device.facts["cpumask"])


async def set_coalescing(device: VhostDevice, delay_base_us: int, iops_threshold: int) -> None:
    """Signal guests less often above a rate; see docs/operations.md. OSError(EINVAL)."""
    args = {"delay_base_us": delay_base_us, "iops_threshold": iops_threshold}
    await _at(device, "vhost_controller_set_coalescing", args)
    device.facts.update(args)


def get_coalescing(device: VhostDevice) -> tuple[int, int]:
    """Return delay_base_us and iops_threshold as they were set."""
    return device.facts["delay_base_us"], device.facts["iops_threshold"]


def blk_get_dev(device: VhostDevice) -> str | None:
    """Return the name of a virtio-blk device's bdev; None after its hot removal.

    OSError(EINVAL) for a device of another kind.
    """
    specific = device.facts["backend_specific"]
    if "block" not in specific:
        raise OSError(errno.EINVAL, f"{dev_get_name(device)} is no virtio-blk device")
    name: str | None = specific["block"]["bdev"]
    return name


async def dev_remove(device: VhostDevice, force: bool = False) -> None:
    """Remove a device; OSError(EBUSY) while front-ends are connected.

    With ``force`` they are disconnected once their I/O is done.
    """
    await _at(device, "vhost_delete_controller", {"force": force})


async def scsi_dev_add_tgt(device: VhostDevice, scsi_tgt_num: int, bdev_name: str) -> int:
    """Attach a bdev as LUN 0 of a target, -1 for the first free one; return its number. OSError."""
    args = {"scsi_target_num": scsi_tgt_num, "bdev_name": bdev_name}
    return int(await _at(device, "vhost_scsi_controller_add_target", args))


async def scsi_dev_get_tgt(device: VhostDevice, num: int) -> dict[str, Any] | None:
    """Return what is known of a target, or None. OSError(EINVAL) for a device of another kind."""
    args = {"name": dev_get_name(device)}
    try:
        (now,) = await device.invoke("vhost_get_controllers", args)
    except OperationError as error:
        raise _os_error(error) from None
    if "scsi" not in now["backend_specific"]:
        raise OSError(errno.EINVAL, f"{dev_get_name(device)} is no virtio-scsi device")
    targets = now["backend_specific"]["scsi"]
    return next((one for one in targets if one["scsi_dev_num"] == num), None)


async def scsi_dev_remove_tgt(
    device: VhostDevice,
    scsi_tgt_num: int,
    cb_fn: Callable[[VhostDevice, Any], Any] | None = None,
    cb_arg: Any = None,
) -> None:
    """Remove a target once its I/O is done, then call ``cb_fn(device, cb_arg)``. OSError."""
    args = {"scsi_target_num": scsi_tgt_num}
    await _at(device, "vhost_scsi_controller_remove_target", args)
    if cb_fn is not None:
        result = cb_fn(device, cb_arg)
        if inspect.isawaitable(result):
            await result
