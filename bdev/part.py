"""What kinds that are parts of another device have in common: bdev.split and bdev.gpt."""

from typing import Any

from bdev.kind import Bdev, OpenContext
from bdev.stacked import StackedBdev
from reactor.native import CData, lib


class PartBdev(StackedBdev):
    """Blocks ``first`` to ``first + num_blocks - 1`` of ``base``."""

    def __init__(
        self, name: str, base: Bdev, *, first: int, num_blocks: int, uuid: str = ""
    ) -> None:
        super().__init__(name, [base], num_blocks=num_blocks, uuid=uuid)
        self.first = first
        self._length = num_blocks

    @property
    def owner(self) -> str:
        """All parts of a kind share the base."""
        return f"{self.kind} of {self.bases[0].name}"

    def blocks_now(self) -> int:
        """Return as much as is left where the base has shrunk: 0 where all of the part is gone."""
        return max(0, min(self._length, self.bases[0].num_blocks - self.first))

    def open_args(self) -> dict[str, Any]:
        """Add where it begins."""
        return {**super().open_args(), "first": self.first}


def open_part(context: OpenContext) -> CData:
    """Open a part in a reactor."""
    return lib.part_bdev_open(
        context.id,
        context.slot,
        context.args["first"],
        context.args["num_blocks"],
        context.bases[0],
    )
