"""The kit that every kind of bdev passes: what any user of a device may rely on.

``check_bdev(make)`` runs all checks, each on a bench of its own with two reactors. ``make`` creates
a device there and returns its name; the device has at least ``MIN_SIZE`` bytes, which it keeps
unless ``keeps_data`` is false.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bdev.io import BdevIO, Op, Request
from bdev.kind import CHANGE_DATA, Bdev
from bdev.statistics import in_flight
from reactor.native import lib
from tests.support.bdevs import Bench
from tests.support.waiting import PATIENCE

Make = Callable[[Bench], Awaitable[str]]

MIN_SIZE = 256 << 10


@dataclass
class Device:
    """A device under test, open in both reactors."""

    bench: Bench
    bdev: Bdev
    ios: list[BdevIO]
    keeps_data: bool

    @property
    def io(self) -> BdevIO:
        return self.ios[0]

    @property
    def block(self) -> int:
        return self.bdev.block_size

    def has(self, op: Op) -> bool:
        return op in self.bdev.supported

    async def open(self, reactor: int) -> None:
        await self.bench.registry.open(self.bdev, self.bench.cluster.reactors[reactor])

    async def close(self) -> None:
        for reactor in self.bench.cluster.reactors:
            if self.bdev.id in reactor.handles:
                await self.bench.registry.close(self.bdev, reactor)


Check = Callable[[Device], Awaitable[None]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Add a check to the kit."""
    CHECKS.append(function)
    return function


def buffers_of(op: Op, length: int) -> list[bytearray]:
    return [bytearray(length)] if op in (Op.READ, Op.WRITE) else []


async def outcome(request: Request) -> int:
    """Return the errno that a request ends with, 0 if it succeeds."""
    try:
        await asyncio.wait_for(request.completed(), PATIENCE)
    except OSError as error:
        return error.errno or -1
    return 0


async def load(io: BdevIO, block: int, requests: list[Request]) -> None:
    """Read the first blocks again and again, until cancelled."""
    while True:
        requests.extend(io.start(Op.READ, i * block, 0, [bytearray(block)]) for i in range(8))
        await asyncio.sleep(0)


@check
async def describes_itself(device: Device) -> None:
    """What the control process says is what a handle says."""
    handle, bdev = device.io.handle, device.bdev
    assert lib.bdev_size(handle) == bdev.size >= MIN_SIZE
    assert lib.bdev_block_size(handle) == bdev.block_size
    assert lib.bdev_readonly(handle) == bdev.readonly
    assert lib.bdev_supported(handle) == sum(1 << op for op in bdev.supported)
    (entry,) = await device.bench.rpc("bdev_get_bdevs", name=bdev.uuid)
    assert (entry["name"], entry["num_blocks"]) == (bdev.name, bdev.num_blocks)


@check
async def refuses_what_it_cannot_do(device: Device) -> None:
    """Ranges past the end, broken blocks and missing operations fail, and reach nobody."""
    end, block = device.bdev.size, device.block
    for op in (Op.READ, Op.WRITE, Op.UNMAP, Op.WRITE_ZEROES):
        for offset, length, wanted in (
            (end, block, errno.ERANGE),
            (end - block, 2 * block, errno.ERANGE),
            (2**64 - block, block, errno.ERANGE),
            (1, block, errno.EINVAL),
            (0, block // 2, errno.EINVAL),
        ):
            expected = wanted
            if not device.has(op):
                refused = device.bdev.readonly and op in CHANGE_DATA
                expected = errno.EROFS if refused else errno.EOPNOTSUPP
            request = device.io.start(op, offset, length, buffers_of(op, length))
            assert await outcome(request) == expected, (op, offset, length)


@check
async def nothing_is_done_with_no_blocks(device: Device) -> None:
    """A range of no blocks succeeds anywhere, even at the end."""
    for op in (Op.READ, Op.WRITE, Op.UNMAP, Op.WRITE_ZEROES):
        if device.has(op):
            for offset in (0, device.bdev.size):
                assert await outcome(device.io.start(op, offset, 0)) == 0


@check
async def keeps_what_is_written(device: Device) -> None:
    """First and last block, all of it in one piece, scattered buffers of odd lengths."""
    if not device.has(Op.WRITE) or not device.keeps_data:
        return
    io, block, end = device.io, device.block, device.bdev.size
    chance = random.Random(1)
    data = chance.randbytes(MIN_SIZE)
    for offset in (0, end - MIN_SIZE, (end - MIN_SIZE) // 2 // block * block):
        cuts = sorted(chance.sample(range(MIN_SIZE), 20))
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, MIN_SIZE], strict=True)]
        assert await outcome(io.start(Op.WRITE, offset, 0, parts)) == 0
        back = [bytearray(len(part)) for part in reversed(parts)]
        assert await outcome(io.start(Op.READ, offset, 0, back)) == 0
        assert b"".join(back) == data


@check
async def zeroes_what_it_should(device: Device) -> None:
    """WRITE_ZEROES, with and without leave to deallocate, changes its range and no byte more."""
    if not device.has(Op.WRITE_ZEROES) or not device.keeps_data:
        return
    block = device.block
    for flags in (0, lib.BDEV_IO_UNMAP):
        assert await outcome(device.io.start(Op.WRITE, 0, 0, [b"f" * (64 * block)])) == 0
        zeroes = device.io.start(Op.WRITE_ZEROES, 3 * block, 57 * block, flags=flags)
        assert await outcome(zeroes) == 0
        back = bytearray(64 * block)
        assert await outcome(device.io.start(Op.READ, 0, 0, [back])) == 0
        assert back == b"f" * (3 * block) + bytes(57 * block) + b"f" * (4 * block)


@check
async def discards_no_more_than_it_should(device: Device) -> None:
    """What is around an unmapped range stays."""
    if not device.has(Op.UNMAP) or not device.keeps_data:
        return
    block = device.block
    assert await outcome(device.io.start(Op.WRITE, 0, 0, [b"u" * (64 * block)])) == 0
    assert await outcome(device.io.start(Op.UNMAP, 5 * block, 40 * block)) == 0
    back = bytearray(64 * block)
    assert await outcome(device.io.start(Op.READ, 0, 0, [back])) == 0
    assert back[: 5 * block] == b"u" * (5 * block)
    assert back[45 * block :] == b"u" * (19 * block)


@check
async def takes_data_in_any_number_of_buffers(device: Device) -> None:
    """A block in a buffer for each byte, and more of them than a system call takes."""
    if not device.has(Op.WRITE) or not device.keeps_data:
        return
    block = device.block
    data = random.Random(3).randbytes(8 * block)
    parts = [data[i : i + 1] for i in range(block)]
    parts += [data[at : at + block // 128] for at in range(block, 8 * block, block // 128)]
    assert await outcome(device.io.start(Op.WRITE, block, 0, parts)) == 0
    back = [bytearray(len(part)) for part in reversed(parts)]
    assert await outcome(device.io.start(Op.READ, block, 0, back)) == 0
    assert b"".join(back) == data


@check
async def ends_what_is_aborted(device: Device) -> None:
    """Small and large requests end, carried out or with ECANCELED, and nothing is left of them."""
    op = Op.WRITE if device.has(Op.WRITE) else Op.READ
    io, block = device.io, device.block
    if op is Op.WRITE:
        assert await outcome(io.start(Op.WRITE, 0, 0, [bytes(MIN_SIZE)])) == 0
    requests = [io.start(op, i * block, 0, [bytearray(b"a" * block)]) for i in range(32)]
    requests.append(io.start(op, 32 * block, 0, [bytearray(b"a" * (MIN_SIZE - 32 * block))]))
    for request in requests:
        if not request.done:
            request.abort()
    assert {await outcome(request) for request in requests} <= {0, errno.ECANCELED}
    back = bytearray(MIN_SIZE)
    assert await outcome(io.start(Op.READ, 0, 0, [back])) == 0
    if op is Op.WRITE and device.keeps_data:
        blocks = {bytes(back[at : at + block]) for at in range(0, MIN_SIZE, block)}
        assert blocks <= {bytes(block), b"a" * block}
    assert lib.bdev_in_flight(io.handle) == 0


@check
async def compares_and_copies(device: Device) -> None:
    """COMPARE tells where data differs; COPY moves ranges that overlap as if they did not."""
    if not device.has(Op.WRITE) or not device.keeps_data:
        return
    io, length = device.io, MIN_SIZE // 2
    data = random.Random(2).randbytes(length)
    assert await outcome(io.start(Op.WRITE, 0, 0, [data])) == 0
    assert await outcome(io.start(Op.COMPARE, 0, 0, [data])) == 0
    wrong = bytearray(data)
    wrong[-3] ^= 1
    request = io.start(Op.COMPARE, 0, 0, [wrong[:777], wrong[777:]])
    assert await outcome(request) == errno.EILSEQ
    assert request.miscompare == length - 3
    for source, offset in ((0, 3 * device.block), (3 * device.block, 0)):
        assert await outcome(io.start(Op.COPY, offset, length, source=source)) == 0
        assert await outcome(io.start(Op.COMPARE, offset, 0, [data])) == 0
    past = io.start(Op.COPY, 0, length, source=device.bdev.size - device.block)
    assert await outcome(past) == errno.ERANGE


@check
async def verifies_that_it_can_be_read(device: Device) -> None:
    """VERIFY of all there is succeeds, and of what is not there fails."""
    size = device.bdev.size
    assert await outcome(device.io.start(Op.VERIFY, 0, size)) == 0
    assert await outcome(device.io.start(Op.VERIFY, size, device.block)) == errno.ERANGE


@check
async def compares_and_writes_as_one(device: Device) -> None:
    """Both reactors count a number up, each step as one with a comparison: no step is lost."""
    if not device.has(Op.WRITE) or not device.keeps_data:
        return
    await device.bench.registry.use_ranges(device.bdev)
    offset, block = 5 * device.block, device.block
    assert await outcome(device.io.start(Op.WRITE, offset, 0, [bytes(block)])) == 0

    async def count(io: BdevIO) -> int:
        tries = done = 0
        while done < 20:
            old = bytearray(block)
            assert await outcome(io.start(Op.READ, offset, 0, [old])) == 0
            new = (int.from_bytes(old, "little") + 1).to_bytes(block, "little")
            error = await outcome(io.start(Op.COMPARE_AND_WRITE, offset, 0, [old, new]))
            assert error in (0, errno.EILSEQ)
            done += error == 0
            tries += 1
        return tries

    await asyncio.wait_for(asyncio.gather(*(count(io) for io in device.ios)), PATIENCE)
    end = bytearray(block)
    assert await outcome(device.io.start(Op.READ, offset, 0, [end])) == 0
    assert int.from_bytes(end, "little") == 20 * len(device.ios)
    assert device.bdev.ranges is not None
    assert device.bdev.ranges.used == 0


@check
async def serves_many_requests_from_two_reactors(device: Device) -> None:
    """More requests than any pool has, in ranges of their own: none is lost, none mixed up."""
    op = Op.WRITE if device.has(Op.WRITE) else Op.READ
    blocks = MIN_SIZE // device.block
    requests = [
        io.start(op, i % blocks * device.block, 0, [bytearray([i % blocks % 251]) * device.block])
        for i in range(2 * blocks)
        for io in device.ios
    ]
    assert {await outcome(request) for request in requests} == {0}
    if op is Op.WRITE and device.keeps_data:
        for io in device.ios:
            back = bytearray(MIN_SIZE)
            assert await outcome(io.start(Op.READ, 0, 0, [back])) == 0
            assert back == b"".join(bytes([i % 251]) * device.block for i in range(blocks))


@check
async def resets_and_flushes_after_what_came_before(device: Device) -> None:
    """A RESET completes when all that was submitted before it has."""
    requests = [device.io.start(Op.READ, 0, 0, [bytearray(device.block)]) for _ in range(64)]
    resets = [device.io.start(Op.RESET) for _ in range(3)]
    assert [await outcome(reset) for reset in resets] == [0, 0, 0]
    assert all(request.done for request in requests)
    for request in requests:
        request.finish()
    assert not device.has(Op.FLUSH) or await outcome(device.io.start(Op.FLUSH)) == 0


@check
async def counts_what_it_does(device: Device) -> None:
    """Operations, bytes, and nothing in flight at the end."""
    stats = device.bench.reactor.stats.slot(device.bdev.slot, "struct bdev_stats")
    ops, moved = stats.ops[Op.READ], stats.bytes[Op.READ]
    requests = [device.io.start(Op.READ, 0, 0, [bytearray(2 * device.block)]) for _ in range(10)]
    assert {await outcome(request) for request in requests} == {0}
    assert stats.ops[Op.READ] - ops == 10
    assert stats.bytes[Op.READ] - moved == 20 * device.block
    assert in_flight(stats) == 0


@check
async def follows_a_new_size(device: Device) -> None:
    """A smaller size is enforced at once, in every reactor, and told to who asked."""
    told: list[int] = []

    async def resized(bdev: Bdev) -> None:
        told.append(bdev.num_blocks)

    blocks = device.bdev.num_blocks
    device.bench.registry.on_resized(device.bdev, resized)
    await device.bench.registry.resize(device.bdev, blocks - 1)
    for io in device.ios:
        last = io.start(Op.READ, (blocks - 1) * device.block, 0, [bytearray(device.block)])
        assert await outcome(last) == errno.ERANGE
    await device.bench.registry.resize(device.bdev, blocks)
    assert told == [blocks - 1, blocks]


@check
async def is_resized_under_load(device: Device) -> None:
    """Requests inside of both sizes do not notice."""
    requests: list[Request] = []
    blocks = device.bdev.num_blocks
    tasks = [asyncio.create_task(load(io, device.block, requests)) for io in device.ios]
    for size in (blocks - 1, blocks, blocks - 1, blocks):
        await device.bench.registry.resize(device.bdev, size)
    for task in tasks:
        task.cancel()
    assert {await outcome(request) for request in requests} == {0}


@check
async def is_the_same_for_a_new_reactor(device: Device) -> None:
    """What was written before a reactor ended is there for the one that takes its place."""
    op = Op.WRITE if device.has(Op.WRITE) else Op.READ
    assert await outcome(device.io.start(op, 0, 0, [bytearray(b"k" * device.block)])) == 0
    reactor = device.bench.reactor
    await reactor.stop()
    await asyncio.wait_for(device.bench.registry.reactor_lost(reactor), PATIENCE)
    reactor.start()
    await device.open(0)
    back = bytearray(device.block)
    assert await outcome(reactor.io(device.bdev).start(Op.READ, 0, 0, [back])) == 0
    if op is Op.WRITE and device.keeps_data:
        assert back == b"k" * device.block


@check
async def is_removed_under_load(device: Device) -> None:
    """Every request ends, well or with ENODEV; new ones fail; then nothing is left."""
    requests: list[Request] = []
    tasks = [asyncio.create_task(load(io, device.block, requests)) for io in device.ios]
    await asyncio.sleep(0)
    await device.bench.registry.remove(device.bdev.name, unplug=True)
    for task in tasks:
        task.cancel()
    for io in device.ios:
        late = io.start(Op.READ, 0, 0, [bytearray(device.block)])
        assert await outcome(late) == errno.ENODEV
    assert {await outcome(request) for request in requests} <= {0, errno.ENODEV}
    await device.close()
    for reactor in device.bench.cluster.reactors:
        assert device.bdev.id not in reactor.handles


async def run_check(
    one: Check, make: Make, *, keeps_data: bool = True, bench_type: type[Bench] = Bench
) -> None:
    """Run one check of the kit on a device of its own."""
    async with bench_type(2) as bench:
        bdev = bench.registry.find(await make(bench))
        device = Device(bench, bdev, [], keeps_data)
        for index, reactor in enumerate(bench.cluster.reactors):
            await device.open(index)
            device.ios.append(reactor.io(bdev))
        await one(device)
        await device.close()
        for reactor in bench.cluster.reactors:
            assert reactor.handles == {}, f"{one.__name__}: left open on {reactor.name}"


def check_bdev(make: Make, *, keeps_data: bool = True, bench_type: type[Bench] = Bench) -> None:
    """Run the whole kit; what the first check that fails raises has its name in a note."""
    for one in CHECKS:
        try:
            asyncio.run(run_check(one, make, keeps_data=keeps_data, bench_type=bench_type))
        except BaseException as error:
            error.add_note(f"conformance: {one.__name__}: {one.__doc__}")
            raise
