"""Claims: who holds a device, for itself or to read it as others may."""

import errno

from bdev.kind import Bdev
from reactor.errors import OperationError


def claim(bdev: Bdev, owner: str, *, shared: bool = False) -> None:
    """Note that ``owner`` holds the device; the same owner may claim it again.

    OperationError(-16), with the owner's name, if another has it.
    """
    if bdev.claims and bdev.claims[0] != owner and not (shared and bdev.claims_shared):
        how = "shared, for reading" if bdev.claims_shared else "for itself"
        raise OperationError(
            -errno.EBUSY, f"bdev {bdev.name} is claimed already, by {bdev.claims[0]} {how}"
        )
    bdev.claims.append(owner)
    bdev.claims_shared = shared


def release(bdev: Bdev, owner: str) -> None:
    """End a claim."""
    if owner in bdev.claims:
        bdev.claims.remove(owner)


def release_bases(bdev: Bdev) -> None:
    """End the claims of a device on what it stands on."""
    for base in bdev.bases:
        release(base, bdev.owner)
