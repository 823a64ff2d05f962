"""A front-end whose driver names its memory by I/O virtual addresses, and which is their IOMMU."""

from __future__ import annotations

import select
import threading
import time
from dataclasses import replace
from typing import Any

from reactor.native import CData, ffi
from vhost.frontend import WANTED_FEATURES, BlkFrontend
from vhost.frontend_link import FrontendError
from vhost.frontend_memory import PAGE, FrontendMemory
from vhost.messages import BackendRequest, Feature, IotlbMessage, Request, SingleRegion

_GUEST_OFFSET = 1 << 40  # between a page's IOVA and what the memory table says of it


class IommuMemory(FrontendMemory):
    """Its addresses are IOVAs; the back-end is told other ones, guest-physical, for its regions."""

    def user(self, address: int) -> int:
        """Return what SET_VRING_ADDR says: rings are known by IOVAs, too."""
        return address

    def pointer(self, address: int) -> CData:
        """See FrontendMemory."""
        return ffi.cast("void *", self.translate(address))

    def translate(self, iova: int) -> int:
        """Return the front-end's address; ValueError outside of memory."""
        return super().user(iova)


class IommuFrontend(BlkFrontend):
    """Answers every miss with one page, as far as ``allowed`` permits."""

    memory: IommuMemory

    def __init__(self, path: str, **options: Any) -> None:
        self.misses: list[IotlbMessage] = []
        self.failures: list[IotlbMessage] = []
        self.allowed: dict[int, int] = {}
        """Access by page, of those that may not both be read and written; 0: not translated."""
        self._ended = threading.Event()
        super().__init__(path, features=WANTED_FEATURES | Feature.ACCESS_PLATFORM, **options)
        assert self.channel is not None
        self.channel.handlers[BackendRequest.IOTLB_MSG] = self._asked
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: str, *, queues: int = 1, regions: int = 2, **options: Any) -> IommuFrontend:
        """Connect, and start queues of 64 entries."""
        front = cls(path, **options)
        front.set_up(queues, 64, IommuMemory(8 << 20, regions=regions))
        return front

    def invalidate(self, iova: int, size: int) -> None:
        """Take translations away; returns when the back-end says that it has forgotten them."""
        gone = IotlbMessage(iova, size, 0, 0, IotlbMessage.INVALIDATE)
        self.raw.tell(Request.IOTLB_MSG, gone)

    def close(self) -> None:
        """See Frontend."""
        self._ended.set()
        self._thread.join()
        super().close()

    def _share_memory(self) -> None:
        for region, fd in zip(self.memory.regions, self.memory.fds, strict=True):
            told = replace(region, guest=region.guest + _GUEST_OFFSET)
            self.raw.tell(Request.ADD_MEM_REG, SingleRegion(told), [fd])

    def _serve(self) -> None:
        assert self.channel is not None
        while not self._ended.is_set():
            try:
                if select.select([self.channel], [], [], 0.02)[0]:
                    self.channel.take(time.monotonic() + 5)
            except FrontendError:
                return

    def _asked(self, payload: bytes) -> None:
        miss = IotlbMessage.from_bytes(payload, "IOTLB_MSG")
        if miss.kind == IotlbMessage.ACCESS_FAIL:
            self.failures.append(miss)
            return
        self.misses.append(miss)
        page = miss.iova // PAGE * PAGE
        access = self.allowed.get(page, IotlbMessage.READ | IotlbMessage.WRITE)
        if access:
            user = self.memory.translate(page)
            update = IotlbMessage(page, PAGE, user, access, IotlbMessage.UPDATE)
            self.raw.tell(Request.IOTLB_MSG, update)
