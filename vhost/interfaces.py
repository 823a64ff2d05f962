"""What the parts of the back-end ask of each other and of what they stand on.

A session knows a Device and a QueueHost; vhost.session_queues, which has that, knows a ServedDevice
and the cluster. So sessions can be tested without reactors, and another kind of device needs only
its own features, configuration space and arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from vhost.iotlb import Translation
from vhost.record import QueueRecord


class Device(Protocol):
    """What a session asks of the device that it is a connection to."""

    virtio_id: int
    """What kind of device it is: virtio 1.2, section 5."""

    @property
    def features(self) -> int:
        """Virtio feature bits to offer."""
        ...

    def config(self, features: int, written: Mapping[int, int], queues: int) -> bytes:
        """Return the configuration space as a front-end sees it.

        ``features`` are those that it negotiated, ``written`` what it has changed (see
        ``accept_config``), ``queues`` how many it may have.
        """
        ...

    def accept_config(
        self, offset: int, data: bytes, features: int, queues: int, *, migration: bool
    ) -> dict[int, int]:
        """Return what a write to the configuration space changes: values by their offsets.

        Raises ProtocolError if it is not allowed.
        """
        ...


class QueueHost(Protocol):
    """Who serves the queues of one session. All methods raise OperationError or OSError."""

    async def start(self, queue: QueueRecord) -> None:
        """Serve a queue, and go on with what its log says is in flight."""
        ...

    async def stop(self, queue: QueueRecord, *, suspend: bool = False) -> int:
        """Finish all requests in flight, serve no more, and return the next avail entry.

        ``suspend``: requests that have not been begun stay in the queue's log.
        """
        ...

    async def set_call(self, queue: QueueRecord) -> None:
        """Signal the driver of a running queue through the record's call eventfd from now on."""
        ...

    async def set_memory(self) -> None:
        """Use the record's memory from now on; the former is mapped nowhere any more."""
        ...

    async def update_iotlb(
        self,
        forgotten: Sequence[tuple[int, int]],
        learnt: Sequence[Translation],
        *,
        settle: bool = False,
    ) -> None:
        """Forget translations in ranges (first and last address), then learn others.

        ``settle``: return when no request uses any more what was forgotten.
        """
        ...

    async def begin_postcopy(self) -> int:
        """Serve queues in a process of their own from now on.

        Returns its userfaultfd, which is the caller's.
        """
        ...

    def addresses(self) -> Mapping[int, int]:
        """Return by guest-physical address where that process has mapped each region."""
        ...

    async def end_postcopy(self) -> None:
        """Serve queues where all others are served, and end that process."""
        ...

    async def abandon_postcopy(self) -> None:
        """Kill that process, whatever it waits for."""
        ...

    async def resume(self, queue: QueueRecord) -> None:
        """Try again to take the request of a queue that waits for a translation."""
        ...

    async def fault(self, queue: QueueRecord) -> None:
        """Break a queue that waits for a translation: there is none."""
        ...

    async def drop(self) -> None:
        """Stop all queues and forget the session. Never raises."""
        ...


class ServedDevice(Protocol):
    """What serving a queue takes from its device."""

    @property
    def cpus(self) -> Collection[int]:
        """Where its queues may be served."""
        ...

    @property
    def registered_buffers(self) -> bool:
        """Whether guest memory is to be registered with the reactors' io_uring."""
        ...

    async def open(self, reactor: Any) -> int | None:
        """Make the device available to a reactor, for one queue; return its id there, or None."""
        ...

    async def close(self, reactor: Any, handle: int) -> None:
        """Undo an ``open`` that has returned ``handle``."""
        ...

    def queue_args(
        self, features: int, written: Mapping[int, int], slot: int, handle: int | None
    ) -> dict[str, Any]:
        """Return the arguments of vhost_queue_start that are the device's."""
        ...
