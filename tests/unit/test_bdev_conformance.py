"""Every kind of bdev, and stacks of three, against the kit."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.bdevs import Bench
from tests.support.conformance import Make, check_bdev
from tests.support.cow import make_base
from tests.support.faults import after_faults, among_faults
from tests.support.gpt import gpt_disk
from tests.support.mirror import make_legs, until_same

BLOCKS = 2048
MICROSECONDS = dict.fromkeys(
    ["avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency"], 50
)


def base(
    kind: str = "malloc", *, block_size: int = 512, name: str = "B", blocks: int = BLOCKS
) -> Make:
    async def make(bench: Bench) -> str:
        await bench.rpc(f"bdev_{kind}_create", name=name, block_size=block_size, num_blocks=blocks)
        return name

    return make


def file(contents: bytes, **params: Any) -> Make:
    async def make(bench: Bench) -> str:
        folder = tempfile.TemporaryDirectory(prefix="vr-")
        bench.temporary.append(folder)
        path = Path(folder.name) / "disk"
        await asyncio.to_thread(path.write_bytes, contents)
        await bench.rpc("bdev_uring_create", name="F", filename=str(path), **params)
        return "F"

    return make


def python(block_size: int = 512, device: str = "memory") -> Make:
    async def make(bench: Bench) -> str:
        bench.cluster.modules = ["tests.support.devices"]
        args = {"blocks": BLOCKS}
        if device == "memory":
            args["block_size"] = block_size
        await bench.rpc("bdev_python_create", name="Y", device=device, args=args)
        return "Y"

    return make


def on(below: Make, method: str, result: str, base_param: str, **params: Any) -> Make:
    """Create a device with ``method`` on the one that ``below`` makes, and return its name."""

    async def make(bench: Bench) -> str:
        base_name = await below(bench)
        await bench.rpc(method, **{base_param: base_name}, **params)
        return result.format(base_name)

    return make


def passthru(below: Make, name: str = "P") -> Make:
    return on(below, "bdev_passthru_create", name, "base_bdev_name", name=name)


def delay(below: Make) -> Make:
    return on(below, "bdev_delay_create", "D", "base_bdev_name", name="D", **MICROSECONDS)


def error(below: Make) -> Make:
    return on(below, "bdev_error_create", "EE_{}", "base_name")


def split(below: Make) -> Make:
    return on(below, "bdev_split_create", "{}p1", "base_bdev", split_count=3)


def partition(below: Make) -> Make:
    async def make(bench: Bench) -> str:
        return f"{await below(bench)}p1"

    return make


def crypto(below: Make) -> Make:
    async def make(bench: Bench) -> str:
        name = await below(bench)
        folder = tempfile.TemporaryDirectory(prefix="vr-")
        bench.temporary.append(folder)
        path = Path(folder.name) / "key"
        path.touch(mode=0o600)
        path.write_text(bytes(range(64)).hex())
        await bench.rpc("accel_crypto_key_create", name="K", key_file=str(path))
        return str(
            await bench.rpc("bdev_crypto_create", base_bdev_name=name, name="X", key_name="K")
        )

    return make


def limited(below: Make) -> Make:
    async def make(bench: Bench) -> str:
        name = await below(bench)
        await bench.rpc("bdev_set_qos_limit", name=name, rw_ios_per_sec=1_000_000)
        return name

    return make


def with_every_service(below: Make) -> Make:
    """Limits, a group, locked ranges and watched requests: none of which is to be noticed."""

    async def make(bench: Bench) -> str:
        name = await limited(below)(bench)
        await bench.rpc("bdev_qos_group_create", name="G", rw_mbytes_per_sec=100_000)
        await bench.rpc("bdev_qos_group_add_bdev", name="G", bdev_name=name)
        await bench.registry.use_ranges(bench.registry.find(name))
        await bench.rpc("bdev_set_slow_request_limit", name=name, limit_us=1)
        await bench.rpc("bdev_set_timeout", name=name, timeout_us=60_000_000, action="abort")
        return name

    return make


def raid(level: str, strip: int, *below: Make) -> Make:
    async def make(bench: Bench) -> str:
        names = [await one(bench) for one in below]
        await bench.rpc(
            "bdev_raid_create",
            name="R",
            raid_level=level,
            strip_size_kb=strip,
            base_bdevs=names,
        )
        return "R"

    return make


EMPTY = bytes(BLOCKS * 512)


def mirror(kind: str = "malloc", layer: Callable[[Make], Make] = lambda one: one) -> Make:
    """Make a mirror of three legs, each under ``layer``."""

    async def make(bench: Bench) -> str:
        if kind == "uring":
            await make_legs(bench, 3)
            names = ["F0", "F1", "F2"]
        else:
            names = [await layer(base(name=f"L{i}", blocks=2 * BLOCKS))(bench) for i in range(3)]
        await bench.rpc("bdev_raid_create", name="R", raid_level="raid1", base_bdevs=names)
        await until_same(bench)
        return "R"

    return make


def cow(name: str = "C", *, faulty: bool = False, **params: Any) -> Make:
    """Make a disk with an overlay; ``faulty`` puts an error device between it and its base."""

    async def make(bench: Bench) -> str:
        base_name = f"{name}-base"
        path = await make_base(bench, EMPTY, base_name) / "overlay"
        if faulty:
            await bench.rpc("bdev_error_create", base_name=base_name)
            base_name = f"EE_{base_name}"
        await bench.rpc("bdev_cow_create", name=name, base=base_name, overlay=str(path), **params)
        return name

    return make


KINDS: dict[str, Make] = {
    "malloc": base(),
    "malloc-4096": base(block_size=4096),
    "null": base("null"),
    "file": file(EMPTY),
    "file-4096": file(EMPTY, block_size=4096),
    "file-readonly": file(EMPTY, readonly=True),
    "file-aio": file(EMPTY, engine="aio"),
    "file-threads": file(EMPTY, engine="threads"),
    "python": python(),
    "python-readonly": python(device="ramp"),
    "passthru": passthru(base()),
    "passthru-readonly": passthru(file(EMPTY, readonly=True)),
    "error": error(base()),
    "delay": delay(base()),
    "split": split(base()),
    "gpt": partition(file(gpt_disk([(64, 1500, "all")]), block_size=512)),
    "concat": raid("concat", 0, base(name="A"), base()),
    "raid0": raid("raid0", 4, base(name="A"), base()),
    "crypto": crypto(base()),
    "crypto-4096": crypto(base(block_size=4096)),
    "cow": cow(),
    "cow-4096-larger": cow(cluster_size=4096, num_blocks=BLOCKS + 100, copy_on_read=True),
    "mirror": mirror(),
    "mirror-file": mirror(kind="uring"),
    "limited": limited(base()),
    "every-service": with_every_service(base()),
    "every-service-delay-file": with_every_service(delay(file(EMPTY))),
    "passthru-crypto-raid0": passthru(crypto(raid("raid0", 16, base(name="A"), base()))),
    "passthru-raid0-split": passthru(raid("raid0", 16, split(base(name="A")), split(base()))),
    "delay-mirror-error": delay(mirror(layer=error)),
    "limited-error-python": limited(error(python(4096))),
    "delay-passthru-cow": delay(passthru(cow())),
    "error-delay-file": error(delay(file(EMPTY))),
    "error-passthru-file-threads": error(passthru(file(EMPTY, engine="threads"))),
    "error-passthru-file-aio": error(passthru(file(EMPTY, engine="aio"))),
    "limited-passthru-gpt": limited(
        passthru(partition(file(gpt_disk([(64, 1500, "all")]), block_size=512)))
    ),
}

# What stands on disks that fail, hang, and have no memory for a while.
FAULTY: dict[str, tuple[Make, list[str]]] = {
    "passthru": (passthru(error(base())), ["EE_B"]),
    "delay-file": (delay(error(file(EMPTY))), ["EE_F"]),
    "split": (split(error(base())), ["EE_B"]),
    "crypto": (crypto(error(base())), ["EE_B"]),
    "raid0": (raid("raid0", 4, error(base(name="A")), error(base())), ["EE_A", "EE_B"]),
    "concat": (raid("concat", 0, error(base(name="A")), base()), ["EE_A"]),
    "cow": (cow(faulty=True, cluster_size=4096), ["EE_C-base"]),
    "every-service-passthru": (with_every_service(passthru(error(base()))), ["EE_B"]),
    "mirror": (mirror(layer=error), ["EE_L1"]),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_kind_passes_after_faults_below_it(kind: str) -> None:
    """A mirror goes on without the leg that had them."""
    below, errors = FAULTY[kind]
    check_bdev(after_faults(below, *errors, survives=kind == "mirror"))


@pytest.mark.parametrize("kind", FAULTY)
def test_a_kind_passes_while_its_bases_lack_resources(kind: str) -> None:
    below, errors = FAULTY[kind]
    check_bdev(among_faults(below, *errors))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_passes(kind: str) -> None:
    check_bdev(KINDS[kind], keeps_data=kind != "null")
