"""What records of stacked devices have in common: they stand on other devices, their bases.

The registry does what all of them need: it claims the bases, opens their handles before and closes
them after those of the stacked device, has removal and resizing travel up, and saves bases first.
A record names bases that exist when it is made; one that takes another base later is looked at for
cycles then.
"""

from collections.abc import Collection, Sequence

from bdev.kind import CHANGE_DATA, EINVAL, Bdev, Op
from reactor.errors import OperationError

ELOOP = -40
MAX_DEPTH = 16  # devices on top of each other: requests go down by calls, on one C stack


class StackedBdev(Bdev):
    """A device on ``bases``, which has what all of them support."""

    def __init__(
        self,
        name: str,
        bases: Sequence[Bdev],
        *,
        num_blocks: int,
        uuid: str = "",
    ) -> None:
        check_depth(name, bases)
        super().__init__(
            name,
            block_size=common_block_size(bases),
            num_blocks=num_blocks,
            uuid=uuid,
            readonly=any(base.readonly for base in bases),
        )
        self.bases = tuple(bases)
        self.uses_registered_memory = any(base.uses_registered_memory for base in bases)
        for base in bases:
            self.supported &= base.supported | {Op.RESET}
        if self.readonly:
            self.supported -= CHANGE_DATA
        self.physical_block_size = max(
            getattr(base, "physical_block_size", 0) or base.block_size for base in bases
        )

    def blocks_now(self) -> int:
        """Return how many blocks this device has now that one of its bases has another size."""
        return self.num_blocks


class LayerBdev(StackedBdev):
    """A device on one base, of the same size."""

    def __init__(self, name: str, base: Bdev, *, uuid: str) -> None:
        super().__init__(name, [base], num_blocks=base.num_blocks, uuid=uuid)

    def blocks_now(self) -> int:
        """Return the size of the base."""
        return self.bases[0].num_blocks


def depth(bdev: Bdev) -> int:
    """Return how many devices stand on top of each other, up to ``bdev``."""
    return 1 + max(map(depth, bdev.bases), default=0)


def check_depth(name: str, bases: Sequence[Bdev]) -> None:
    """Raise OperationError(-40) if a device on ``bases`` would be too high a stack."""
    if max(map(depth, bases)) >= MAX_DEPTH:
        raise OperationError(ELOOP, f"bdev {name}: would be more than {MAX_DEPTH} layers")


def check_addition(bdev: Bdev, base: Bdev, everything: Collection[Bdev]) -> None:
    """Raise OperationError(-40) if ``bdev`` cannot stand on ``base``, too.

    That is so if ``base`` stands on ``bdev`` itself, or if the highest stack of ``everything`` that
    has both in it would be too high.
    """
    if _stands_on(base, bdev):
        raise OperationError(
            ELOOP, f"bdev {base.name}: stands on {bdev.name}, which cannot stand on itself"
        )

    def layers(one: Bdev) -> int:
        return 1 + max((layers(other) for other in everything if one in other.bases), default=0)

    if layers(bdev) + depth(base) > MAX_DEPTH:
        raise OperationError(
            ELOOP, f"bdev {base.name}: under {bdev.name} would be more than {MAX_DEPTH} layers"
        )


def _stands_on(bdev: Bdev, below: Bdev) -> bool:
    return bdev is below or any(_stands_on(base, below) for base in bdev.bases)


def common_block_size(bases: Sequence[Bdev]) -> int:
    """Return the block size of all ``bases``; OperationError(-22) if they differ."""
    first = bases[0]
    for base in bases:
        if base.block_size != first.block_size:
            raise OperationError(
                EINVAL,
                f"bdev {base.name} has blocks of {base.block_size} bytes, bdev {first.name} of "
                f"{first.block_size}: they must be the same",
            )
    return first.block_size
