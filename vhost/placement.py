"""Which reactor serves a queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection


class Placement:
    """Counts queues by CPU; a new one goes where there are fewest.

    The queues of one controller may be on several reactors: none of them knows of another.
    """

    def __init__(self) -> None:
        self._queues: Counter[int] = Counter()

    def place(self, cpus: Collection[int]) -> int:
        """Return the CPU for one more queue, of those given; ValueError if there are none.

        Among equals the lowest number wins, so that the outcome can be told beforehand.
        """
        cpu = self.best(cpus)
        self._queues[cpu] += 1
        return cpu

    def best(self, cpus: Collection[int]) -> int:
        """Return the CPU that ``place`` would choose."""
        return min(cpus, key=lambda candidate: (self._queues[candidate], candidate))

    def move(self, source: int, target: int) -> None:
        """Take note that a queue is on ``target`` now."""
        self._queues[source] -= 1
        self._queues[target] += 1

    def release(self, cpu: int) -> None:
        """Take note that a queue has left ``cpu``."""
        self._queues[cpu] -= 1

    def load(self, cpu: int) -> int:
        """Return how many queues are on ``cpu``."""
        return self._queues[cpu]
