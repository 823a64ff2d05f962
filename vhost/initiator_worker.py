"""The reactor's side of the kind ``virtio``: queues, as the control process lends them."""

from __future__ import annotations

import errno
from typing import Any

from bdev.kind import OpenContext, opener, worker_provider
from reactor.errors import check
from reactor.native import CData, ffi, lib
from reactor.operations import FileDescriptors, operation


def make_link(args: dict[str, Any], fds: FileDescriptors) -> CData:
    """Return a ``struct initiator_link *``."""
    places = {"memory_fd": fds[0], "kick_fd": fds[1], "call_fd": fds[2]}
    return ffi.new("struct initiator_link *", {**args, **places})


@opener("virtio")
def open_virtio(context: OpenContext) -> CData:
    """Open a disk in a reactor, on a queue of its own if the server is there."""
    args = context.args
    setup = ffi.new("struct initiator_setup *", args["setup"])
    link = make_link(args["link"], context.fds) if args["link"] else ffi.NULL
    handle = lib.initiator_bdev_open(context.reactor, context.id, context.slot, setup, link)
    if handle != ffi.NULL and link != ffi.NULL:
        for index in (1, 2):
            context.fds.take(index)
    return handle


@worker_provider
class VirtioWorker:
    """What the control process tells of a server."""

    @operation
    def bdev_virtio_connect(self, key: int, link: dict[str, Any], fds: FileDescriptors) -> bool:
        """Go on with another connection, if the handle is there still."""
        rc = lib.initiator_connect(key, make_link(link, fds))
        if rc != -errno.ENOENT:
            check(rc, "virtio queue")
            for index in (1, 2):
                fds.take(index)
        return True

    @operation
    def bdev_virtio_disconnect(self, key: int) -> bool:
        """Have requests wait."""
        lib.initiator_disconnect(key)
        return True
