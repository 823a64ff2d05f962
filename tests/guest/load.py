"""Verified load in a guest, running while a test does something to the disk's server."""

from __future__ import annotations

import itertools

from tests.guest.guest import Guest, Result

_numbers = itertools.count(1)


class Load:
    """``blkverify`` (see rootfs/blkverify.c) in the background: random, direct, 8 requests deep.

    It owns ``blocks`` blocks of 4 KiB from byte ``offset`` of the device.
    """

    def __init__(
        self, guest: Guest, device: str, *, seconds: int, offset: int = 0, blocks: int = 4096
    ) -> None:
        self.device = device
        self._guest = guest
        self._seconds = seconds
        self._output = f"/tmp/load-{next(_numbers)}"
        self._progress = f"{self._output}.progress"
        guest.start(
            f"blkverify {device} {offset} {blocks} 8 {seconds} {self._progress}", self._output
        )

    def requests(self) -> int:
        """Return how many requests have completed."""
        # The file is there, and empty, a moment before it has its number.
        text = self._guest.run(f"od -An -t u8 {self._progress} 2>&1 || true").output.strip()
        return int(text) if text.isdigit() else 0

    def advance(self, count: int, timeout: float = 30.0) -> None:
        """Wait until ``count`` more requests have completed; GuestError if they do not in time."""
        goal = self.requests() + count
        self._guest.run(
            f"until [ $(($(od -An -t u8 {self._progress}))) -ge {goal} ]; do usleep 20000; done",
            timeout,
        )

    def finish(self) -> Result:
        """Wait for its end: status 0 if everything that it wrote was read back."""
        return self._guest.wait(self._output, self._seconds + 30)
