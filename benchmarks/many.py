"""Many devices at once: null disks with a front-end connected to each."""

from __future__ import annotations

import time
from contextlib import ExitStack

import psutil

from benchmarks.servers import Ours
from reactor.rpc_client import RpcClient
from vhost.frontend import BlkFrontend

MIB = 1 << 20
QUIET = 0.5  # seconds without CPU time after which a cluster has settled
SETTLED = 20.0  # seconds that it gets for that
COST = 2 * MIB  # bytes that a device with its front-end takes at most


def rpc(server: Ours, timeout: float = 120) -> RpcClient:
    """Return a client of the server's operations."""
    return RpcClient(server.folder / "run" / "rpc.sock", timeout=timeout)


def create_one(client: RpcClient, name: str, **options: str) -> None:
    """Make a null disk with its controller."""
    disk = {"name": name.upper(), "num_blocks": 1 << 20, "block_size": 512}
    client.call("bdev_null_create", disk)
    controller = {"ctrlr": name, "dev_name": name.upper(), **options}
    client.call("vhost_create_blk_controller", controller)


def create(client: RpcClient, count: int, prefix: str = "n") -> None:
    """Make so many of them."""
    for i in range(count):
        create_one(client, f"{prefix}{i}")


def connect(stack: ExitStack, server: Ours, count: int, prefix: str = "n") -> list[BlkFrontend]:
    """Connect a front-end to each, and use each once."""
    fronts = []
    for i in range(count):
        where = server.folder / f"{prefix}{i}"
        front = BlkFrontend.connect(where, queue_size=128, memory=MIB)
        fronts.append(stack.enter_context(front))
        front.read(0, 512)
    return fronts


def settle(server: Ours) -> None:
    """Return when a cluster has nothing to do, and its standby has imported what it will need."""
    end, before = time.monotonic() + SETTLED, -1.0
    while (used := server.cpu_seconds()) > before and time.monotonic() < end:
        before = used
        time.sleep(QUIET)


def resident(server: Ours) -> float:
    """Return the KiB of memory that control process and reactors have for themselves."""
    total = 0
    for process in [server.process, *server.process.children(recursive=True)]:
        if process.name() != "reactor-standby" and process.status() != psutil.STATUS_ZOMBIE:
            total += process.memory_info().rss
    return total / 1024
