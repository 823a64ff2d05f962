"""What would serve itself: a controller whose disk is, by way of a virtio disk, that controller.

Each request would come back as another one, until no ring has room left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from bdev.kind import Bdev
from vhost.initiator import VirtioBdev

Served = Callable[[str], Iterable[Bdev]]


def serves_itself(bdev: Bdev, path: str, served: Served) -> bool:
    """Return whether requests to ``bdev`` come to the socket at ``path``, if we served it there.

    ``served`` has the bdevs that are behind a socket of this cluster, by its real path.
    """
    own = os.path.realpath(path)
    seen: set[Bdev] = set()
    waiting = [bdev]
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        waiting += at.bases
        if isinstance(at, VirtioBdev):
            server = os.path.realpath(at.controller.path)
            if server == own:
                return True
            waiting += served(server)
    return False
