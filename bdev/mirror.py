"""Mirror (raid1): the same on every leg, and what keeps it so."""

import asyncio
import contextlib
import errno
import logging
import os
import uuid as uuids
from collections.abc import Coroutine
from typing import Any

from bdev.background import Background
from bdev.kind import EINVAL, Bdev, Op, OpenContext, TaskContext, opener, task
from bdev.mirror_super import (
    DATA_OFFSET,
    READ_SIZE,
    Plan,
    Super,
    is_prefix,
    parse,
    room,
    set_uuid,
)
from bdev.registry import BdevRegistry
from bdev.shared import Shared
from bdev.stacked import StackedBdev
from reactor.errors import OperationError, check
from reactor.native import CData, ffi, lib

CLEAN_DELAY = 2.0  # seconds between looks for regions that are not written any more
SYNC_REGIONS = 16  # that a step makes the same

log = logging.getLogger(__name__)

_NOBODY = "00000000-0000-0000-0000-000000000000"


class MirrorBdev(StackedBdev):
    """The same data on all ``legs``: by place, None where one is missing."""

    kind = "mirror"
    product_name = "Raid Volume"

    def __init__(self, registry: BdevRegistry, name: str, made: Plan) -> None:
        super().__init__(
            name,
            list(made.places.values()),
            num_blocks=made.native.num_blocks,
            uuid=str(uuids.UUID(bytes=bytes(ffi.buffer(made.native.uuid)))),
        )
        if self.readonly:
            raise OperationError(EINVAL, f"raid {name}: a leg is read-only; all must be writable")
        self.supported |= {Op.UNMAP}  # as zeroes, which the legs can write
        self.legs: list[Bdev | None] = [None] * made.native.legs
        for place, base in made.places.items():
            self.legs[place] = base
        self._registry = registry
        self._places = {base: place for place, base in made.places.items()}
        self._dropping: set[asyncio.Task[None]] = set()
        self._jobs = asyncio.Lock()
        self._cleaning: asyncio.Task[None] | None = None
        self.sync = Background(registry, self, self._sync_step, self._synced)
        self._sync_from = 0
        owners = len(registry.cluster.reactors)
        for place in set(made.rebuilding) - set(made.returning):
            set_uuid(made.native.member[place].uuid, uuids.uuid4())
        size = lib.mirror_shared_size(made.native, owners)
        self._memory = Shared("bdev-mirror", "struct mirror_shared", size)
        self._shared = self._memory.struct
        lib.mirror_shared_init(self._shared, made.native, owners)
        self._shared.legs = sum(1 << place for place in made.active) + sum(
            1 << (place + lib.MIRROR_LEGS) for place in made.rebuilding
        )
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._event, self._news)

    # --- legs

    def state(self, place: int) -> int:
        """Return what is known of a leg: enum mirror_state."""
        return int(lib.mirror_leg_state(self._shared, place))

    @property
    def gone(self) -> bool:
        """Whether it has been removed: there is nothing any more to look at."""
        return self._event < 0

    def mark_all(self, flags: int) -> None:
        """Set flags of all regions: enum mirror_region."""
        lib.mirror_mark(self._shared, flags, 0)

    def count(self, flags: int) -> int:
        """Return how many regions have one of these flags."""
        return int(lib.mirror_count(self._shared, flags))

    def load_log(self, blocks: dict[int, bytes], flags: int) -> None:
        """Take over what a leg's log says, by block: what is dirty there gets these flags."""
        for index, words in blocks.items():
            lib.mirror_load(self._shared, index, words, flags)

    def forget_missing(self) -> None:
        """Have no leg that is not there come back with less than all data copied to it."""
        for place in range(len(self.legs)):
            if self.state(place) != lib.MIRROR_ACTIVE:
                set_uuid(self._shared.super.member[place].uuid, uuids.uuid4())

    def mark_stale(self, *, only_dirty: bool) -> None:
        """Have all of the disk copied to legs that are rebuilt, or what was written of late."""
        if only_dirty:
            where = lib.MIRROR_DIRTY | lib.MIRROR_SUSPECT
            lib.mirror_mark_where(self._shared, where, lib.MIRROR_STALE)
        else:
            self.mark_all(lib.MIRROR_STALE)

    @property
    def log_blocks(self) -> int:
        """Return how many blocks the log has."""
        return int(self._shared.blocks)

    async def _job(self, reactor: Any, kind: int) -> None:
        """Have ``reactor`` do work on the log: enum mirror_job_kind. One at a time."""
        async with self._jobs:
            await self._registry.task(self, reactor, {"do": "job", "kind": kind})

    async def job(self, kind: int) -> None:
        """Have any reactor do it; when it dies, the next one. OperationError."""

        async def step(reactor: Any) -> bool:
            await self._job(reactor, kind)
            return True

        once = Background(self._registry, self, step)
        once.start()
        try:
            await once.wait()
        finally:
            await once.stop()

    def _free_place(self, base: Bdev, found: Super | None) -> int:
        """Return the place that ``base`` can have, the one that it had if that is free.

        OperationError if there is none (yet).
        """
        free = [place for place, leg in enumerate(self.legs) if leg is None]
        if not free:
            raise OperationError(
                -errno.EEXIST, f"raid {self.name}: has all of its {len(self.legs)} legs"
            )
        leaving = [one for one, place in self._places.items() if place in free]
        if base in leaving or len(leaving) == len(free):
            raise OperationError(
                -errno.EBUSY,
                f"bdev {leaving[0].name}: requests to it, as a leg, are not over; try again",
            )
        taken = set(self._places.values())
        mine = [found.place] if found is not None and found.place in free else []
        return next(place for place in mine + free if place not in taken)

    async def _check_leg(self, base: Bdev) -> Super | None:
        """Return its superblock, if it has one; OperationError if it cannot be a leg."""
        if room(base) < self.num_blocks or base.block_size != self.block_size:
            raise OperationError(
                EINVAL,
                f"bdev {base.name}: has room for {room(base)} blocks of {base.block_size} bytes, "
                f"and raid {self.name} has {self.num_blocks} of {self.block_size}",
            )
        if base.readonly:
            raise OperationError(EINVAL, f"bdev {base.name}: is read-only")
        found = parse(base, await self._registry.read(base, 0, READ_SIZE))
        if found is not None and str(found.uuid) != self.uuid:
            raise OperationError(
                EINVAL,
                f"bdev {base.name}: belongs to the mirror {found.uuid}; delete that with clear_sb "
                "if it is not needed any more",
            )
        return found

    def _returns(self, place: int, found: Super | None) -> bool:
        """Whether a leg with this superblock lacks nothing but what was written of late."""
        active = [one for one in range(len(self.legs)) if self.state(one) == lib.MIRROR_ACTIVE]
        native = ffi.addressof(self._shared, "super")
        return found is not None and found.place == place and is_prefix(found, native, active)

    async def add(self, base: Bdev, *, full: bool) -> None:
        """Take ``base`` in at a place that is free, and begin to rebuild onto it.

        A leg that was one before gets what it has missed, unless ``full``; others get everything.
        """
        self._free_place(base, None)
        found = await self._check_leg(base)
        place = self._free_place(base, found)  # nobody has taken it meanwhile
        self._places[base] = place
        try:
            await self._registry.add_base(
                self,
                base,
                lambda reactor: self._registry.task(
                    self, reactor, {"do": "attach", "place": place}, [base]
                ),
            )
        except BaseException:
            del self._places[base]
            raise
        while self.sync.running:  # what is being copied now would not be seen to lack there
            await self.sync.stop()
        self.legs[place] = base
        returns = not full and self._returns(place, found)
        if not returns:
            set_uuid(self._shared.super.member[place].uuid, uuids.uuid4())
        # Marked at once after: what is written from now on goes there, and what was being written
        # before has its bits set, which stay while it is not active.
        lib.mirror_leg_set(self._shared, place, lib.MIRROR_REBUILDING)
        self.mark_stale(only_dirty=returns)
        await self.job(lib.MIRROR_WRITE_ALL)
        self.start_sync()
        if self.state(place) == lib.MIRROR_MISSING:
            raise OperationError(-errno.EIO, f"bdev {base.name}: failed while it was added")

    async def remove_leg(self, base: Bdev) -> None:
        """Do without a leg; OperationError(-16) if it is the last one that has all data."""
        place = self.legs.index(base)
        if lib.mirror_leg_set(self._shared, place, lib.MIRROR_MISSING) < 0:
            raise OperationError(
                -errno.EBUSY,
                f"bdev {base.name}: is the last leg of raid {self.name} that has all data",
            )
        self.legs[place] = None
        await self.job(lib.MIRROR_SETTLE)
        await self._let_go(base)

    async def lose_base(self, base: Bdev) -> bool:
        """Do without a leg that goes away, if another one has all data."""
        try:
            await self.remove_leg(base)
        except OperationError as error:
            if error.code != -errno.EBUSY:
                log.warning("raid %s: without %s: %s", self.name, base.name, error)
            return error.code != -errno.EBUSY
        log.warning("raid %s: goes on without %s, which was removed", self.name, base.name)
        return True

    async def _let_go(self, base: Bdev) -> None:
        """Stand on a leg no more that is missing already."""
        place = self._places[base]
        self._registry.notify("bdev_raid_leg_lost", self.name, base_bdev=base.name)
        await self._registry.drop_base(
            self,
            base,
            lambda reactor: self._registry.task(self, reactor, {"do": "detach", "place": place}),
        )
        del self._places[base]

    # --- news from reactors

    def _news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        self._shared.news = 0
        for place, base in enumerate(self.legs):
            if base is not None and self.state(place) == lib.MIRROR_MISSING:
                log.warning("raid %s: leg %s failed; goes on without it", self.name, base.name)
                self.legs[place] = None
                self._spawn(self._let_go(base))
        if not self.rebuilding:
            lib.mirror_mark(self._shared, 0, lib.MIRROR_STALE)
        self.start_sync()
        self._start_cleaning()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        started = self._loop.create_task(work)
        self._dropping.add(started)
        started.add_done_callback(self._dropping.discard)

    @property
    def whole(self) -> bool:
        """Whether all legs have all data, but where they are SUSPECT."""
        return all(self.state(place) == lib.MIRROR_ACTIVE for place in range(len(self.legs)))

    def _start_cleaning(self) -> None:
        if self._cleaning is None or self._cleaning.done():
            self._cleaning = self._loop.create_task(self._clean())

    async def _clean(self) -> None:
        """Clear the bits of regions that are not written any more, until there are none.

        They stay while a leg is missing: they say what it lacks.
        """
        while not self.gone and self.whole and self.count(lib.MIRROR_DIRTY):
            await asyncio.sleep(CLEAN_DELAY)
            try:
                await self.job(lib.MIRROR_CLEAN)
            except OperationError as error:
                if error.code == -errno.ENODEV:
                    return  # it is being removed
                log.warning("raid %s: its log was not cleaned: %s", self.name, error)

    async def recovered(self, reactor: Any) -> None:
        """Have what ``reactor``, which is dead, was writing be the same on all legs."""
        lib.mirror_forsake(self._shared, self._registry.number(reactor))
        self.start_sync()

    # --- making legs the same

    @property
    def rebuilding(self) -> list[int]:
        """Return the places of legs that do not have all data yet."""
        places = range(len(self.legs))
        return [place for place in places if self.state(place) == lib.MIRROR_REBUILDING]

    def start_sync(self) -> None:
        """Make the legs the same where they may differ."""
        if self.gone:
            return
        if self.count(lib.MIRROR_SUSPECT | lib.MIRROR_STALE) or self.rebuilding:
            self.sync.start()

    async def _sync_step(self, reactor: Any) -> bool:
        wanted = lib.MIRROR_SUSPECT | lib.MIRROR_STALE
        first = lib.mirror_find(self._shared, self._sync_from, wanted)
        self._sync_from = first
        if first < self._shared.regions:
            args = {"do": "sync", "first": first, "end": first + SYNC_REGIONS}
            await self._registry.task(self, reactor, args)
            return False
        self._sync_from = 0
        if lib.mirror_find(self._shared, 0, wanted) < self._shared.regions:
            return False
        targets = self.rebuilding
        if targets:
            await self._job(reactor, lib.MIRROR_FLUSH)
            for place in targets:  # a leg that has failed by now stays out
                lib.mirror_leg_set(self._shared, place, lib.MIRROR_ACTIVE)
            await self._job(reactor, lib.MIRROR_SETTLE)
            for place in targets:
                base = self.legs[place]
                if base is not None:
                    log.info("raid %s: %s is rebuilt", self.name, base.name)
                    self._registry.notify("bdev_raid_rebuilt", self.name, base_bdev=base.name)
            self._start_cleaning()
        return True

    def _synced(self) -> None:
        if self.sync.error is not None and self.sync.error.code != -errno.ENODEV:
            log.warning("raid %s: its legs still differ: %s", self.name, self.sync.error)

    async def settle(self) -> None:
        """Leave legs that need no resync, as far as nobody writes any more."""
        for _ in range(3):  # regions grow old in two
            await self.job(lib.MIRROR_CLEAN)

    async def stop(self) -> None:
        """End what is going on."""
        await self.sync.stop()
        if self._cleaning is not None:
            self._cleaning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._cleaning

    # --- the record

    async def lend(self, reactor: Any) -> tuple[dict[str, Any], list[int]]:
        """Lend the shared memory, and the places of the bases in their order."""
        args = {
            **self.open_args(),
            "owner": self._registry.number(reactor),
            "places": [self._places[base] for base in self.bases],
        }
        return args, [self._memory.fd, self._event]

    def close(self) -> None:
        """Release the shared memory; what it says is on the legs."""
        if self._event >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._event)
            os.close(self._event)
            self._event = -1
            self._shared = ffi.NULL
            self._memory.close()

    def summary(self) -> dict[str, Any]:
        """Return SPDK's description of it, with what it does not have under ``write_intent``."""
        there = [base for base in self.legs if base is not None]
        states = [self.state(place) for place in range(len(self.legs))]
        described: dict[str, Any] = {
            "uuid": self.uuid,
            "strip_size_kb": 0,
            "state": "online",
            "raid_level": "raid1",
            "superblock": True,
            "num_base_bdevs": len(self.legs),
            "num_base_bdevs_discovered": len(there),
            "num_base_bdevs_operational": states.count(lib.MIRROR_ACTIVE),
        }
        if self.rebuilding:
            described["process"] = self._process()
        described["base_bdevs_list"] = [
            {
                "name": None if base is None else base.name,
                "uuid": _NOBODY if base is None else base.uuid,
                "is_configured": base is not None,
                "data_offset": DATA_OFFSET // self.block_size,
                "data_size": self.num_blocks,
            }
            for base in self.legs
        ]
        described["write_intent"] = {
            "region_size": int(self._shared.super.region_size),
            "regions": int(self._shared.regions),
            "dirty": self.count(lib.MIRROR_DIRTY),
            "suspect": self.count(lib.MIRROR_SUSPECT),
        }
        return described

    def _process(self) -> dict[str, Any]:
        regions = int(self._shared.regions)
        done = regions - self.count(lib.MIRROR_STALE)
        target = self.legs[self.rebuilding[0]]
        return {
            "type": "rebuild",
            "target": None if target is None else target.name,
            "progress": {
                "blocks": self.num_blocks * done // regions,
                "percent": 100 * done // regions,
            },
        }

    def driver_specific(self) -> dict[str, Any]:
        """Return the legs and their state."""
        return {"raid": self.summary()}

    def config(self) -> dict[str, Any]:
        """Return the call that would make it of the legs that it has."""
        return {
            "method": "bdev_raid_create",
            "params": {
                "name": self.name,
                "raid_level": "raid1",
                "base_bdevs": [base.name for base in self.legs if base is not None],
                "uuid": self.uuid,
                "superblock": True,
            },
        }


@opener("mirror")
def open_mirror(context: OpenContext) -> CData:
    """Open a mirror in a reactor."""
    args = context.args
    bases = ffi.new("struct bdev *[]", list(context.bases))
    places = ffi.new("uint32_t[]", args["places"])
    setup = ffi.new(
        "struct mirror_setup *",
        {
            "block_count": args["num_blocks"],
            "base_count": len(context.bases),
            "bases": bases,
            "places": places,
            "owner": args["owner"],
            "shared_fd": context.fds[0],
            "event_fd": context.fds[1],
        },
    )
    return lib.mirror_bdev_open(context.reactor, context.id, context.slot, setup)


@task("mirror")
async def work_on_mirror(context: TaskContext, args: dict[str, Any]) -> None:
    """Do what the control process asks for: see the callers in MirrorBdev."""
    handle, do = context.handle, args["do"]
    if do == "attach":
        lib.mirror_attach(handle, args["place"], context.others[0])
    elif do == "detach":
        lib.mirror_detach(handle, args["place"])
    elif do == "sync":
        code = await context.ended(
            lambda ident: lib.mirror_sync_start(handle, ident, args["first"], args["end"]), "sync"
        )
        check(code, "making the legs the same")
    else:
        code = await context.ended(
            lambda ident: lib.mirror_job_start(handle, ident, args["kind"]), "work on the log"
        )
        check(code, "the log")
