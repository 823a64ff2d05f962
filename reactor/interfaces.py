"""What others ask of reactors, and of whoever runs them: :class:`reactor.cluster.Cluster`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from reactor.vault import NoVault


class Reactor(Protocol):
    """One reactor; its name is the same after a restart."""

    @property
    def name(self) -> str:
        """As ``reactor-0``."""
        ...

    @property
    def cpu(self) -> int:
        """The CPU that it is pinned on."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        ...

    @property
    def stats(self) -> Any:
        """Its :class:`reactor.stats.StatsArea`, as the control process maps it."""
        ...


class Caller(Protocol):
    """Runs operations in reactors."""

    @property
    def reactors(self) -> Sequence[Any]:
        """Every :class:`Reactor`, dead or alive."""
        ...

    @property
    def vault(self) -> NoVault:
        """Where what outlives the control process is put."""
        ...

    @property
    def modules(self) -> Sequence[str]:
        """What every reactor has loaded."""
        ...

    async def call(
        self,
        reactor: Any,
        op: str,
        args: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        timeout: float | None = ...,
    ) -> Any:
        """Run an operation in a reactor; ConnectionResetError if it dies meanwhile."""
        ...


class Cluster(Caller, Protocol):
    """And tells when they start and die."""

    def on_started(self, fn: Callable[[Any], Awaitable[None]]) -> object:
        """Have ``fn`` run after each start of a reactor."""
        ...

    def on_lost(self, fn: Callable[[Any], Awaitable[None]]) -> object:
        """Have ``fn`` run when a reactor has died, before it is replaced."""
        ...


class Slots(Protocol):
    """See :class:`reactor.stats.SlotAllocator`."""

    def allocate(self) -> int:
        """Return a free slot number."""
        ...

    def free(self, slot: int) -> None:
        """Give it back."""
        ...
