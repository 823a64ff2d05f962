"""Verified load in a guest, running while a test does something to the disk's server."""

from __future__ import annotations

import itertools

from tests.guest.guest import PATIENCE, Guest, Result

_numbers = itertools.count(1)


class Load:
    """``blkverify`` (see rootfs/blkverify.c) in the background: random, direct, 8 requests deep.

    It owns the first ``blocks`` blocks of 4 KiB of the device, and runs until it is stopped.
    """

    def __init__(self, guest: Guest, device: str, *, blocks: int = 4096) -> None:
        self.device = device
        self._guest = guest
        self._output = f"/tmp/load-{next(_numbers)}"
        self._control = f"{self._output}.control"
        guest.start(f"blkverify {device} 0 {blocks} 8 {self._control}", self._output)
        guest.run(f"until [ -s {self._control} ] || [ -e {self._output}.status ]; do :; done")

    def requests(self) -> int:
        """Return how many requests have completed."""
        return int(self._guest.run(f"od -An -t u8 -N 8 {self._control}").output)

    def advance(self, count: int, timeout: float = PATIENCE) -> None:
        """Wait until ``count`` more requests have completed; GuestError if they do not in time."""
        goal = self.requests() + count
        done = f"$(($(od -An -t u8 -N 8 {self._control})))"
        ended = f"[ ! -e {self._output}.status ] || {{ cat {self._output}; exit 1; }}"
        self._guest.run(f"until [ {done} -ge {goal} ]; do {ended}; usleep 20000; done", timeout)

    def move(self, guest: Guest) -> None:
        """Take note that the guest runs in another QEMU."""
        self._guest = guest

    def stop(self) -> Result:
        """End it; status 0 if everything that it wrote is there."""
        self._guest.run(f"printf x | dd of={self._control} bs=1 seek=8 conv=notrunc")
        return self.wait()

    def wait(self) -> Result:
        """Wait until it ends of itself, as it does when a request fails."""
        return self._guest.wait(self._output)
