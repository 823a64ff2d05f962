"""The reactor's side of NVMe drives: namespaces, and what becomes of queue pairs."""

from collections.abc import Callable

from bdev.kind import OpenContext, opener, worker_provider
from reactor.native import CData, ffi, lib
from reactor.operations import operation


@opener("nvme")
def open_nvme(context: OpenContext) -> CData:
    """Open a namespace in a reactor, on the queue pair that the reactor has for the controller."""
    args, fds = context.args, context.fds
    lent = {"memory": fds[0], "registers": fds[1], "interrupt": -1, "shadow": -1}
    lent.update(zip(args["with"], fds[2:], strict=False))  # others may follow: those of limits
    queue = ffi.new("struct nvme_queue_setup *", {**args["queue"], **lent})
    disk = ffi.new("struct nvme_disk_setup *", args["disk"])
    return lib.nvme_disk_open(context.reactor, context.id, context.slot, disk, queue)


@worker_provider
class NvmeWorker:
    """What the control process has a reactor do with a queue pair, if it has it open."""

    def _do(self, key: int, function: Callable[[CData], None]) -> bool:
        queue = lib.nvme_queue_find(key)
        if queue != ffi.NULL:
            function(queue)
        return True

    @operation
    def bdev_nvme_queue_pause(self, key: int) -> bool:
        """Submit nothing and look at no completion any more."""
        return self._do(key, lib.nvme_queue_pause)

    @operation
    def bdev_nvme_queue_resume(self, key: int) -> bool:
        """Begin anew, and submit again what was in flight."""
        return self._do(key, lib.nvme_queue_resume)

    @operation
    def bdev_nvme_queue_fail(self, key: int) -> bool:
        """Fail what is in flight, and everything until it is resumed."""
        return self._do(key, lib.nvme_queue_fail)

    @operation
    def bdev_nvme_queue_detach(self, key: int) -> bool:
        """Fail everything, and let go of the device."""
        return self._do(key, lib.nvme_queue_detach)
