"""The destination of a post-copy migration: a driver whose memory is still to come.

The memory of a front-end that has stopped is the image of the source. In its place, at the same
addresses, comes memory without a page, as in the virtual machine monitor that the guest moves to.
This plays its part: it gives each page when somebody waits for it, and all of them in the end.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
import threading
from dataclasses import replace

from vhost.frontend import BlkFrontend
from vhost.frontend_link import Link
from vhost.frontend_memory import PAGE, FrontendMemory
from vhost.messages import MemoryTable, Request, SingleRegion
from vhost.payloads import U64

_UFFDIO_COPY = 0xC028AA03  # of linux/userfaultfd.h
_UFFDIO_WAKE = 0x8010AA02
_EVENT_PAGEFAULT = 0x12
_MESSAGE = 32  # bytes of struct uffd_msg: the address is at 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_MAP_FIXED = 0x10


class Image:
    """The contents of a front-end's memory, which is empty from then on."""

    def __init__(self, memory: FrontendMemory) -> None:
        self.parts = [
            ctypes.create_string_buffer(memory.read(region.guest, region.size), region.size)
            for region in memory.regions
        ]
        for place, region in enumerate(memory.regions):
            fd = os.memfd_create(f"destination-{place}", os.MFD_CLOEXEC)
            os.ftruncate(fd, region.size)
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
            got = _libc.mmap(region.user, region.size, protection, flags, fd, 0)
            assert got == region.user, os.strerror(ctypes.get_errno())
            os.close(memory.fds[place])
            memory.fds[place] = fd


class Destination:
    """Gives pages of ``image`` through the userfaultfd ``faults``, which it owns.

    ``withheld`` pages, (region, offset), are asked for in vain until they are ``release``d.
    """

    def __init__(self, image: Image, faults: int) -> None:
        self.image = image
        self.faults = faults
        self.bases: list[int] = []  # where the back-end has mapped each region
        self.asked: list[tuple[int, int]] = []
        self.withheld: set[tuple[int, int]] = set()
        self._placed: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give no more pages; who waits for one goes on with what is there."""
        self._ended.set()
        self._thread.join()
        os.close(self.faults)

    def give_all(self) -> None:
        """Give what has not been asked for, as the source sends it without being asked."""
        for region, part in enumerate(self.image.parts):
            for offset in range(0, len(part), PAGE):
                self._give(region, offset)

    def give(self, offset: int) -> None:
        """Give a page of the first region, since we are going to access it."""
        self._give(0, offset // PAGE * PAGE)

    def release(self) -> None:
        """Give what was withheld."""
        pages, self.withheld = self.withheld, set()
        for region, offset in pages:
            self._give(region, offset)

    def _serve(self) -> None:
        while not self._ended.is_set():
            if not select.select([self.faults], [], [], 0.02)[0]:
                continue
            try:
                message = os.read(self.faults, _MESSAGE)
            except BlockingIOError:
                continue  # that page has come meanwhile, from another thread
            assert message[0] == _EVENT_PAGEFAULT
            (address,) = struct.unpack_from("=Q", message, 16)
            place = self._find(address & -PAGE)
            self.asked.append(place)
            if place not in self.withheld:
                self._give(*place)

    def _find(self, address: int) -> tuple[int, int]:
        for region, base in enumerate(self.bases):
            if base <= address < base + len(self.image.parts[region]):
                return region, address - base
        raise AssertionError(f"{address:#x} is in no region: {self.bases}")

    def _give(self, region: int, offset: int) -> None:
        target = self.bases[region] + offset
        with self._lock:
            if (region, offset) not in self._placed:
                source = ctypes.addressof(self.image.parts[region]) + offset
                copy = bytearray(struct.pack("=QQQQq", target, source, PAGE, 0, 0))
                # EEXIST would tell that somebody has made a page of zeroes of it too early.
                fcntl.ioctl(self.faults, _UFFDIO_COPY, copy)
                self._placed.add((region, offset))
            else:  # two have asked
                fcntl.ioctl(self.faults, _UFFDIO_WAKE, struct.pack("=QQ", target, PAGE))


def go_on(front: BlkFrontend, image: Image, *, slots: bool = True) -> Destination:
    """Connect again as the destination of what has stopped, whose memory ``image`` was made of.

    ``slots``: regions are told one by one (ADD_MEM_REG), not in a table.
    """
    front._disconnect()
    front.raw = Link(front.path, timeout=front.timeout)
    front._negotiate()
    link, memory = front.raw, front.memory
    _, (faults,) = link.ask_with_fds(Request.POSTCOPY_ADVISE)
    link.tell(Request.POSTCOPY_LISTEN)
    destination = Destination(image, faults)
    if slots:
        for region, fd in zip(memory.regions, memory.fds, strict=True):
            link.send(Request.ADD_MEM_REG, SingleRegion(region), [fd])
            answer = SingleRegion.from_bytes(link.receive().data, "ADD_MEM_REG")
            assert replace(answer.region, user=region.user) == region
            destination.bases.append(answer.region.user)
        link.send(Request.ADD_MEM_REG, U64(0))
    else:
        link.send(Request.SET_MEM_TABLE, MemoryTable(tuple(memory.regions)), memory.fds)
        table = MemoryTable.from_bytes(link.receive().data, "SET_MEM_TABLE")
        destination.bases += [region.user for region in table.regions]
        link.send(Request.SET_MEM_TABLE, U64(0))
    if not front.packed:
        for queue in front.queues:  # the driver looks where the device stands
            destination.give(queue.used - memory.regions[0].guest)
    return destination
