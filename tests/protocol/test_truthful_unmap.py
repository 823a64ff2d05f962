"""A disk that cannot give space back says so, all the way to the guest; zeroes it has of writes."""

from __future__ import annotations

import errno

from bdev.kind import Op
from tests.support.bdevs import Bench, on_bench
from tests.support.conformance import outcome
from tests.support.stack import stack
from vhost.virtio_blk import BlkFeature

SIZE = 1 << 20
OLD = bytes(range(1, 129)) * 64  # of no zeroes
ARGS = {"name": "Y", "device": "keeping", "args": {"blocks": SIZE // 512}}
DEVICES = "tests.support.devices"


@on_bench()
async def test_unmap_is_made_of_nothing(bench: Bench) -> None:
    bench.cluster.modules = [DEVICES]
    await bench.rpc("bdev_python_create", **ARGS)
    await bench.rpc("bdev_passthru_create", name="P", base_bdev_name="Y")
    io = await bench.open("P")
    assert await outcome(io.start(Op.WRITE, 0, 0, [bytearray(OLD)])) == 0
    assert await outcome(io.start(Op.UNMAP, 0, len(OLD))) == errno.EOPNOTSUPP
    read = bytearray(len(OLD))
    assert await outcome(io.start(Op.READ, 0, 0, [read])) == 0
    assert read == OLD
    await bench.close("P")


async def test_a_guest_is_offered_no_discard_and_zeroes_read_back() -> None:
    async with stack() as target:
        target.cluster.modules = (*target.cluster.modules, DEVICES)
        await target.call("bdev_python_create", **ARGS)
        await target.call("vhost_create_blk_controller", ctrlr="b0", dev_name="Y")
        front = await target.connect("b0")
        assert not front.features & BlkFeature.DISCARD
        assert front.features & BlkFeature.WRITE_ZEROES
        await target.in_thread(lambda: front.write(0, OLD))
        await target.in_thread(lambda: front.write_zeroes([(512, 1024)]))
        expected = OLD[:512] + bytes(1024) + OLD[1536:]
        assert await target.in_thread(lambda: front.read(0, len(OLD))) == expected
        await target.close(front)
