"""GPT: the partitions of a device, found when it is created.

A partition is in nobody's way: it claims its base while it is open, and goes with it. So a disk
that is given to a guest as a whole may well have partitions.
"""

import logging
import uuid as uuids
from typing import Any

from bdev.gpt_table import Partition, TableError, read_table
from bdev.kind import Bdev, opener, provider
from bdev.part import PartBdev, open_part
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.operations import operation

log = logging.getLogger(__name__)


class GptBdev(PartBdev):
    """One partition."""

    kind = "gpt"
    product_name = "GPT Disk"
    automatic = True

    def __init__(self, base: Bdev, partition: Partition, uuid: str) -> None:
        super().__init__(
            f"{base.name}p{partition.index}",
            base,
            first=partition.first,
            num_blocks=partition.num_blocks,
            uuid=uuid,
        )
        self.partition = partition

    def driver_specific(self) -> dict[str, Any]:
        """Return what the table says."""
        return {
            "gpt": {
                "base_bdev": self.bases[0].name,
                "offset_blocks": self.first,
                "partition_type_guid": str(self.partition.type),
                "unique_partition_guid": str(self.partition.uuid),
                "partition_name": self.partition.name,
            }
        }

    def config(self) -> dict[str, Any]:
        """Return nothing: it is found again."""
        return {}


@provider
class GptExaminer:
    """``bdev_examine``, and what happens to every new device."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        registry.on_created(self._created)

    async def _created(self, bdev: Bdev) -> None:
        """Look for partitions where there may be data of earlier days."""
        if bdev.has_history and not isinstance(bdev, GptBdev):
            try:
                await self._examine(bdev)
            except (TableError, OperationError, OSError) as error:
                log.warning("bdev %s: no partitions: %s", bdev.name, error)

    async def _examine(self, base: Bdev) -> list[str]:
        async def read(first: int, count: int) -> bytes:
            size = base.block_size
            return await self._registry.read(base, first * size, count * size)

        names = []
        for partition in await read_table(read, base.num_blocks, base.block_size):
            part = GptBdev(base, partition, self._uuid(base, partition))
            try:
                await self._registry.register(part)
            except OperationError as error:
                log.warning("partition %d of bdev %s: %s", partition.index, base.name, error)
            else:
                names.append(part.name)
        return names

    def _uuid(self, base: Bdev, partition: Partition) -> str:
        """Return the partition's own, or one made of the base's where a copy of the disk has it."""
        own = str(partition.uuid)
        try:
            self._registry.check_unused("", own)
        except OperationError:
            return str(uuids.uuid5(uuids.UUID(base.uuid), own))
        return own

    @operation
    async def bdev_examine(self, name: str) -> bool:
        """Look for partitions on a device now; those that were found before stay as they are."""
        base = self._registry.find(name)
        if not any(isinstance(above, GptBdev) for above in self._registry.above(base)):
            try:
                await self._examine(base)
            except TableError as error:
                raise OperationError(
                    -22, f"bdev {name}: damaged partition table: {error}"
                ) from None
        return True

    @operation
    def bdev_wait_for_examine(self) -> bool:
        """Return at once: a call that creates a device ends when it has been examined."""
        return True


opener("gpt")(open_part)
