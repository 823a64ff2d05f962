"""What SPDK's clients and saved configurations say about bdevs in general."""

from __future__ import annotations

from typing import Any

from reactor.operations import operation


class BdevOptions:
    """Operations on no bdev in particular."""

    @operation(aliases=["set_bdev_options"])
    def bdev_set_options(self, **options: Any) -> bool:  # noqa: ARG002
        """Accept the sizes of SPDK's pools: requests are preallocated with their queues here."""
        return True
