"""What others ask of reactors, and of whoever runs them: :class:`reactor.cluster.Cluster`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from reactor.operations import FileDescriptors
from reactor.vault import NoVault


class Reactor(Protocol):
    """One reactor; its name is the same after a restart."""

    @property
    def name(self) -> str:
        """As ``reactor-0``."""
        ...

    @property
    def cpu(self) -> int:
        """The CPU by which it is known, or another number of one that was lent."""
        ...

    @property
    def pin(self) -> int:
        """The CPU that it is pinned on."""
        ...

    @property
    def number(self) -> int:
        """Its place among all that run, from 0 on, which no other has."""
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
        """The :class:`Reactor` of every CPU, dead or alive."""
        ...

    @property
    def everyone(self) -> Sequence[Any]:
        """Those, and what was lent for a while."""
        ...

    @property
    def counting(self) -> Sequence[Any]:
        """Those whose statistics together are what was done."""
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
    """And tells when they start and die, and lends more of them."""

    async def lend(self, cpu: int, purpose: str) -> Any:
        """Start one more reactor, for one user."""
        ...

    async def take_back(self, reactor: Any, *, kill: bool = False) -> None:
        """End a reactor that was lent."""
        ...

    async def call_for_fds(
        self, reactor: Any, op: str, count: int, timeout: float = 10.0
    ) -> tuple[Any, FileDescriptors]:
        """Run an operation that sends descriptors back."""
        ...

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
