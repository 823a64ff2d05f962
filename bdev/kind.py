"""What a kind of block device is made of.

A kind is one module of this package (with its C beside it) that nothing else names. It contains

* a subclass of :class:`Bdev`: the control process's record of one device, which owns what the
  device consists of and says what a reactor needs to open it;
* a class of operations that create and delete such devices, marked :func:`provider`;
* a function that opens one in a reactor, marked :func:`opener`.
"""

import dataclasses
import enum
import functools
import importlib
import pkgutil
import uuid as uuids
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import bdev
from bdev.limits import Limits
from bdev.parameters import check_block_size, check_name, check_num_blocks, check_uuid
from bdev.ranges import RangeTable
from reactor.errors import OperationError
from reactor.native import CData, lib
from reactor.operations import FileDescriptors

EEXIST, EINVAL = -17, -22


class Op(enum.IntEnum):
    """What can be asked of a block device; see bdev/bdev.h."""

    READ = lib.BDEV_READ
    WRITE = lib.BDEV_WRITE
    FLUSH = lib.BDEV_FLUSH
    UNMAP = lib.BDEV_UNMAP
    WRITE_ZEROES = lib.BDEV_WRITE_ZEROES
    RESET = lib.BDEV_RESET
    COMPARE = lib.BDEV_COMPARE
    COMPARE_AND_WRITE = lib.BDEV_COMPARE_AND_WRITE
    COPY = lib.BDEV_COPY
    VERIFY = lib.BDEV_VERIFY


# What a device itself is asked for; the others are made of these where it has them not.
DEVICE_OPS = frozenset(op for op in Op if op < lib.BDEV_OPS)
CHANGE_DATA = frozenset({Op.WRITE, Op.UNMAP, Op.WRITE_ZEROES, Op.COMPARE_AND_WRITE, Op.COPY})


def with_emulated(native: frozenset[Op]) -> frozenset[Op]:
    """Add what is made of ``native`` operations where a device has them not: bdev/emulate.h."""
    emulated: set[Op] = set()
    if Op.READ in native:
        emulated |= {Op.COMPARE, Op.VERIFY}
    if Op.WRITE in native:
        emulated.add(Op.WRITE_ZEROES)
    if {Op.READ, Op.WRITE} <= native:
        emulated |= {Op.COPY, Op.COMPARE_AND_WRITE}
    return native | emulated


@dataclasses.dataclass(frozen=True)
class Watch:
    """How long requests may take: ``struct bdev_watch_setup``; 0: any time."""

    slow_ns: int = 0
    timeout_ns: int = 0
    abort: bool = False


class Bdev:
    """The control process's record of one block device.

    ``id`` and ``slot`` (of the statistics areas) are given by the registry, -1 before.
    """

    kind: ClassVar[str]
    product_name: ClassVar[str]
    # Comes and goes with what it stands on, and claims that only while it is open.
    automatic: ClassVar[bool] = False
    uses_registered_memory: bool = False  # see bdev/memory.py

    def __init__(
        self,
        name: str,
        *,
        block_size: int,
        num_blocks: int,
        uuid: str = "",
        readonly: bool = False,
        unmap: bool = True,
    ) -> None:
        self.name = check_name(name)
        self.uuid = check_uuid(uuid) or str(uuids.uuid4())
        self.block_size = check_block_size(block_size)
        self.num_blocks = check_num_blocks(num_blocks, block_size)
        self.readonly = readonly
        self.supported = frozenset(Op) - ({Op.UNMAP} if not unmap else frozenset())
        if readonly:
            self.supported -= CHANGE_DATA
        self.id = -1
        self.slot = -1
        self.claims: list[str] = []  # who holds it, for itself or shared
        self.claims_shared = False
        self.limits: Limits | None = None  # from the first bdev_set_qos_limit on
        self.ranges: RangeTable | None = None  # from the first use_ranges() on
        self.watch = Watch()
        # What reactors with the device open share, by name: a descriptor, and a number that goes
        # with it; None: the reactor's. See BdevRegistry.share().
        self.shares: dict[str, tuple[int, int | None]] = {}
        self.bases: tuple[Bdev, ...] = ()  # what it stands on: bdev.stacked
        self.private_bases: tuple[Bdev, ...] = ()  # those that go with it

    @property
    def supported(self) -> frozenset[Op]:
        """What can be asked of it. Set what the kind can, and the rest is added."""
        return self._supported

    @supported.setter
    def supported(self, native: frozenset[Op]) -> None:
        self.native = native & DEVICE_OPS
        self._supported = with_emulated(native)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.block_size * self.num_blocks

    @property
    def owner(self) -> str:
        """Who its bases are told holds them; devices with the same owner may share a base."""
        return f"{self.kind} {self.name}"

    def blocks_now(self) -> int:
        """Return how many blocks what it consists of has at this moment."""
        return self.num_blocks

    @property
    def has_history(self) -> bool:
        """Whether a new one may hold data, which then is examined."""
        return any(base.has_history for base in self.bases)

    def open_args(self) -> dict[str, Any]:
        """Return what the kind's opener gets as ``args`` in a reactor (msgpack-able)."""
        return {"block_size": self.block_size, "num_blocks": self.num_blocks}

    def open_fds(self) -> list[int]:
        """Return the descriptors that are lent to the kind's opener."""
        return []

    async def lend(self, reactor: Any) -> tuple[dict[str, Any], list[int]]:
        """Return what the opener in ``reactor`` gets: its arguments and descriptors.

        Called before a reactor's first handle is opened. For kinds that give each reactor something
        of its own, until ``take_back`` or ``fence``.
        """
        del reactor
        return self.open_args(), self.open_fds()

    async def take_back(self, reactor: Any) -> None:
        """Note that ``reactor`` has no handle any more, or could not open one."""

    async def opened(self, cluster: Any, reactor: Any) -> None:
        """``reactor`` has just opened a handle: get what fence() will need."""

    def closed(self, reactor: Any) -> None:
        """``reactor`` has closed its handle: fence() will not be called for it."""

    async def fence(self, reactor: Any) -> None:
        """Return when nothing that a reactor had begun, which is dead, can happen any more.

        Then, and not before, another one may take up its requests: docs/recovery.md.
        """

    async def lose_base(self, base: "Bdev") -> bool:
        """Do without ``base``, which goes away by itself; False if that is not possible."""
        del base
        return False

    def keepsake(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return what is to outlive the control process: by what it is recognised; descriptors.

        The next one gets it back when it creates a device of the same kind and name:
        :meth:`bdev.registry.BdevRegistry.inherit`.
        """
        return None

    async def recovered(self, reactor: Any) -> None:
        """Put right what ``reactor`` left behind in shared memory; it is dead and fenced.

        Called after the fences of all devices, before anybody takes up its requests.
        """

    def let_go(self) -> None:
        """Give up what keeps others away, before close(): the device is removed, not handed on."""

    def close(self) -> None:
        """Release what the device consists of; no reactor uses it any more."""

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device: ``{"method": ..., "params": ...}``.

        Devices that one call creates together return the same; ``{}`` is for those that come by
        themselves.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return members of its ``bdev_get_bdevs`` entry that differ from the usual."""
        return {}

    def driver_specific(self) -> dict[str, Any]:
        """Return what only this kind has to say in ``bdev_get_bdevs``."""
        return {}


# --- reactor side ---------------------------------------------------------------------------------


class OpenContext(NamedTuple):
    """What a new handle is made with."""

    reactor: CData  # struct reactor *
    id: int
    slot: int
    args: Mapping[str, Any]
    fds: FileDescriptors  # closed afterwards, unless taken
    bases: Sequence[CData] = ()  # struct bdev *; open for as long as the new handle


Opener = Callable[[OpenContext], CData]
_openers: dict[str, Opener] = {}
OpenerT = TypeVar("OpenerT", bound=Opener)


def opener(kind: str) -> Callable[[OpenerT], OpenerT]:
    """Mark the function that opens a bdev of ``kind`` in a reactor.

    It returns a ``struct bdev *``, or NULL with ``ffi.errno`` set, or raises OSError.
    """

    def mark(function: OpenerT) -> OpenerT:
        _openers[kind] = function
        return function

    return mark


def find_opener(kind: str) -> Opener:
    """Return the opener of ``kind``; OperationError(-22) if there is no such kind."""
    load_kinds()
    try:
        return _openers[kind]
    except KeyError:
        known = ", ".join(sorted(_openers))
        raise OperationError(EINVAL, f"bdev kind {kind!r:.40} is none of {known}") from None


Command = Callable[[CData, dict[str, Any]], None]
_commands: dict[str, Command] = {}
CommandT = TypeVar("CommandT", bound=Command)


def command(kind: str) -> Callable[[CommandT], CommandT]:
    """Mark the function that tells an open handle of ``kind`` something: registry.command()."""

    def mark(function: CommandT) -> CommandT:
        _commands[kind] = function
        return function

    return mark


def find_command(kind: str) -> Command:
    """Return the function for ``kind``; OperationError(-22) if it has none."""
    load_kinds()
    if kind not in _commands:
        raise OperationError(EINVAL, f"bdev kind {kind!r:.40} takes no commands")
    return _commands[kind]


class TaskContext(Protocol):
    """What a task in a reactor is given: the open handle, and further ones that it was told of."""

    @property
    def handle(self) -> CData:
        """The ``struct bdev *`` that it is about."""
        ...

    @property
    def others(self) -> Sequence[CData]:
        """Those of ``registry.task(bases=...)``."""
        ...

    async def ended(self, start: Callable[[int], int], what: str) -> int:
        """Call ``start(id)``, and return the code of the NOTICE_DRAINED that ``id`` sends later.

        OSError, about ``what``, if ``start`` returns -errno.
        """
        ...


Task = Callable[[TaskContext, dict[str, Any]], Awaitable[Any]]
_tasks: dict[str, Task] = {}
TaskT = TypeVar("TaskT", bound=Task)


def task(kind: str) -> Callable[[TaskT], TaskT]:
    """Mark the coroutine that does work of its own on a handle of ``kind``: registry.task()."""

    def mark(function: TaskT) -> TaskT:
        _tasks[kind] = function
        return function

    return mark


def find_task(kind: str) -> Task:
    """Return the task of ``kind``; OperationError(-22) if it has none."""
    load_kinds()
    if kind not in _tasks:
        raise OperationError(EINVAL, f"bdev kind {kind!r:.40} has no tasks")
    return _tasks[kind]


# --- control side ---------------------------------------------------------------------------------

_providers: list[Callable[[Any], object]] = []
ProviderT = TypeVar("ProviderT", bound=Callable[[Any], object])


def provider(cls: ProviderT) -> ProviderT:
    """Mark a class of operations; it is called with the :class:`bdev.registry.BdevRegistry`."""
    _providers.append(cls)
    return cls


def make_providers(registry: Any) -> list[object]:
    """Return one object of each marked class, to be added to the table of operations."""
    load_kinds()
    return [make(registry) for make in _providers]


_worker_providers: list[Callable[[], object]] = []
WorkerProviderT = TypeVar("WorkerProviderT", bound=Callable[[], object])


def worker_provider(cls: WorkerProviderT) -> WorkerProviderT:
    """Mark a class of operations that a kind needs in every reactor."""
    _worker_providers.append(cls)
    return cls


def make_worker_providers() -> list[object]:
    """Return one object of each marked class, to be added to a reactor's table of operations."""
    load_kinds()
    return [make() for make in _worker_providers]


@functools.cache
def load_kinds() -> None:
    """Import every module of this package, and so register every kind."""
    for module in pkgutil.iter_modules(bdev.__path__, "bdev."):
        importlib.import_module(module.name)
