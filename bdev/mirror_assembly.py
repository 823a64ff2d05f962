"""Making a mirror: of new legs, or of those that were one, with what their logs say."""

import errno
import logging

from bdev.kind import EINVAL, Bdev
from bdev.mirror import MirrorBdev
from bdev.mirror_super import LOG_OFFSET, READ_SIZE, Plan, parse, parse_log_block, plan, room
from bdev.registry import BdevRegistry
from bdev.stacked import check_depth
from reactor.errors import OperationError
from reactor.native import lib

READ_MAX = 512 << 10  # bytes of a log that are read at a time

log = logging.getLogger(__name__)


def check_distinct(bases: list[Bdev]) -> None:
    """OperationError(-22) if one is there twice."""
    if len(set(bases)) < len(bases):
        names = [base.name for base in bases]
        raise OperationError(EINVAL, f"base_bdevs {names}: one is there twice")


def _find_legs(registry: BdevRegistry, names: list[str]) -> tuple[list[Bdev], list[OperationError]]:
    """Return the devices that there are, and what says that the others are not there."""
    bases, missing = [], []
    for name in names:
        try:
            bases.append(registry.find(name))
        except OperationError as error:
            missing.append(error)
    check_distinct(bases)
    return bases, missing


async def create_mirror(
    registry: BdevRegistry, name: str, names: list[str], uuid: str
) -> MirrorBdev:
    """Make a mirror of new legs, or of those that were one; registered and on record.

    A mirror that exists does without legs that are not there, as after a disk has failed.
    OperationError, and then nothing has changed on any leg, unless writing to them failed.
    """
    bases, missing = _find_legs(registry, names)
    if not bases:
        raise missing[0]
    for base in bases:
        room(base)
    check_depth(name, bases)
    found = [(base, parse(base, await registry.read(base, 0, READ_SIZE))) for base in bases]
    if missing and not any(superblock for _, superblock in found):
        raise missing[0]
    made = plan(found, uuid)
    for error in missing:
        log.warning("raid %s: a leg is not there: %s", name, error.message)
    mirror = MirrorBdev(registry, name, made)
    try:
        if made.new:
            if any(base.has_history for base in bases):
                mirror.mark_all(lib.MIRROR_SUSPECT)
        else:
            await _take_over(registry, mirror, made)
    except BaseException:
        mirror.close()
        raise
    await registry.register(mirror)
    try:
        await mirror.job(lib.MIRROR_WRITE_ALL)
    except BaseException:
        await mirror.stop()
        await registry.remove(mirror.name)
        raise
    mirror.start_sync()
    return mirror


async def _take_over(registry: BdevRegistry, mirror: MirrorBdev, made: Plan) -> None:
    """Have the mirror know of the log what its legs may lack, and what differs between them.

    Of one leg alone nothing differs, so that its log may be damaged: then others that come back
    are copied as a whole.
    """
    legs = [made.places[place] for place in made.active]
    only_dirty = set(made.rebuilding) == set(made.returning)
    try:
        blocks = await _read_logs(registry, mirror, legs)
    except OperationError as error:
        if len(legs) > 1:
            raise
        log.warning("raid %s: its log cannot be used: %s", mirror.name, error.message)
        mirror.forget_missing()
        only_dirty = False
    else:
        mirror.load_log(blocks, lib.MIRROR_SUSPECT if len(legs) > 1 else 0)
    if made.rebuilding:
        mirror.mark_stale(only_dirty=only_dirty)


async def _read_logs(
    registry: BdevRegistry, mirror: MirrorBdev, legs: list[Bdev]
) -> dict[int, bytes]:
    """Return what any of the legs has in its log, by block.

    A bit was set on all of them before anything was written there: one sound copy is enough.
    OperationError(-74) if a block is damaged on all of them.
    """
    sound: dict[int, int] = {}
    size = mirror.block_size
    for base in legs:
        data = b""
        end = mirror.log_blocks * size
        while len(data) < end:
            part = await registry.read(base, LOG_OFFSET + len(data), min(READ_MAX, end - len(data)))
            data += part
        for index in range(mirror.log_blocks):
            words = parse_log_block(data[index * size : (index + 1) * size], index)
            if words is None:
                log.warning("bdev %s: block %d of its log is damaged", base.name, index)
            else:
                sound[index] = sound.get(index, 0) | int.from_bytes(words, "little")
    if len(sound) < mirror.log_blocks:
        raise OperationError(
            -errno.EBADMSG,
            f"raid {mirror.name}: its log is damaged on all legs, which may differ; create it of "
            f"one leg, such as {legs[0].name}, then add the others with bdev_raid_add_base_bdev",
        )
    return {index: bits.to_bytes(size - 8, "little") for index, bits in sound.items()}
