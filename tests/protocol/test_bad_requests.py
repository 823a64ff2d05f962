"""What clients may ask wrongly, of a running cluster: a clear error, and nothing half-created.

Every case goes to it twice: as JSON-RPC, and as an event. Values that only one part looks at are in
tests/unit (test_operations, test_rpc, test_events, test_bdev_operations).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from spdk.rpc.client import JSONRPCException

from reactor.client import Client
from reactor.errors import OperationError
from tests.conftest import running_cluster
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until
from vhost.frontend import BlkFrontend, RequestError

Call = Callable[..., Any]
SERVED = {"name": "served", "num_blocks": 2048, "block_size": 512}
MALLOC = SERVED | {"name": "new"}


@pytest.fixture(scope="module")
def cluster(cpus: list[int]) -> Iterator[Cluster]:
    with running_cluster(cpus=cpus[:1]) as running:
        running.rpc("bdev_malloc_create", **SERVED)
        running.rpc("vhost_create_blk_controller", ctrlr="served", dev_name="served")
        yield running


def from_text(text: str) -> OperationError:
    """Return the error that SPDK's client has told in words."""
    code, message = re.search(r'"code": (-?\d+)', text), re.search(r'"message": "(.*)"', text)
    assert code is not None, text
    assert message is not None, text
    return OperationError(int(code[1]), message[1])


@pytest.fixture(params=["rpc", "event"])
def call(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Call]:
    """Call an operation; OperationError with its code and text when it is refused."""
    if request.param == "event":
        with Client(cluster.run_dir) as client:
            yield lambda op, **args: client.call("control", op, **args)
        return

    def rpc(op: str, **args: Any) -> Any:
        try:
            return cluster.rpc(op, **args)
        except JSONRPCException as error:
            raise from_text(error.message) from None

    yield rpc


def state(cluster: Cluster) -> tuple[list[str], ...]:
    """Return all that a request that fails must leave as it is."""
    return (
        [bdev["name"] for bdev in cluster.rpc("bdev_get_bdevs")],
        [controller["ctrlr"] for controller in cluster.rpc("vhost_get_controllers")],
        sorted(path.name for path in cluster.socket_dir.iterdir()),
        files(cluster),
    )


def files(cluster: Cluster) -> list[str]:
    """Return what the control process has open, but for its clients' connections."""
    found = []
    for fd in Path(f"/proc/{cluster.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # gone while we look
            found.append(str(fd.readlink()))
    return sorted(name for name in found if not name.startswith(("socket:", "anon_inode:")))


def refused(cluster: Cluster, call: Call, op: str, args: dict[str, Any]) -> OperationError:
    before = state(cluster)
    with pytest.raises(OperationError) as caught:
        call(op, **args)
    assert state(cluster) == before
    return caught.value


CONTROLLER = {"ctrlr": "new", "dev_name": "served"}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a number that is text": ("bdev_malloc_create", MALLOC | {"num_blocks": "many"}, "num_blocks"),
    "a name that is a number": ("bdev_malloc_create", MALLOC | {"name": 7}, "name"),
    "a name that is a list": ("bdev_malloc_create", MALLOC | {"name": ["a"]}, "name"),
    "a missing number": ("bdev_malloc_create", {"name": "new", "block_size": 512}, "num_blocks"),
    "an unknown argument": ("bdev_malloc_create", MALLOC | {"colour": "red"}, "colour"),
    "no blocks": ("bdev_malloc_create", MALLOC | {"num_blocks": 0}, "num_blocks"),
    "fewer than no blocks": ("bdev_malloc_create", MALLOC | {"num_blocks": -1}, "num_blocks"),
    "blocks of no bytes": ("bdev_malloc_create", MALLOC | {"block_size": 0}, "block_size"),
    "blocks of 1000 bytes": ("bdev_malloc_create", MALLOC | {"block_size": 1000}, "block_size"),
    "more than 64 bits": ("bdev_malloc_create", MALLOC | {"num_blocks": 1 << 62}, ""),
    "a name that is taken": ("bdev_malloc_create", SERVED, "served"),
    "no name": ("bdev_malloc_create", MALLOC | {"name": ""}, "name"),
    "null of no blocks": ("bdev_null_create", MALLOC | {"num_blocks": 0}, "num_blocks"),
    "a file that is missing": (
        "bdev_uring_create",
        {"name": "new", "filename": "/no/such/file", "block_size": 512},
        "/no/such/file",
    ),
    "a file that is a directory": (
        "bdev_uring_create",
        {"name": "new", "filename": "/tmp", "block_size": 512},
        "/tmp",
    ),
    "a controller of nothing": (
        "vhost_create_blk_controller",
        CONTROLLER | {"dev_name": "none"},
        "none",
    ),
    "a controller that is there": (
        "vhost_create_blk_controller",
        CONTROLLER | {"ctrlr": "served"},
        "served",
    ),
    "a controller without name": ("vhost_create_blk_controller", CONTROLLER | {"ctrlr": ""}, ""),
    "a controller outside": (
        "vhost_create_blk_controller",
        CONTROLLER | {"ctrlr": "../new"},
        "../new",
    ),
    "a controller with a long name": (
        "vhost_create_blk_controller",
        CONTROLLER | {"ctrlr": "x" * 200},
        "",
    ),
    "a CPU that is not there": (
        "vhost_create_blk_controller",
        CONTROLLER | {"cpumask": "[1000]"},
        "1000",
    ),
    "a read-only that is a number": (
        "vhost_create_blk_controller",
        CONTROLLER | {"readonly": 3},
        "readonly",
    ),
    "deleting a controller that is not": ("vhost_delete_controller", {"ctrlr": "none"}, "none"),
    "deleting a disk that is not": ("bdev_malloc_delete", {"name": "none"}, "none"),
    "deleting a disk as another kind": ("bdev_null_delete", {"name": "served"}, "served"),
}


@pytest.mark.parametrize(("op", "args", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused_and_changes_nothing(
    cluster: Cluster, call: Call, op: str, args: dict[str, Any], text: str
) -> None:
    error = refused(cluster, call, op, args)
    assert error.code < 0
    assert text in str(error)


def file_disk(path: Path, **more: Any) -> dict[str, Any]:
    return {"name": "new", "filename": str(path), "block_size": 512, **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(os.urandom(1 << 20))
    return file


def test_a_file_that_somebody_has_locked(cluster: Cluster, call: Call, path: Path) -> None:
    with path.open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error = refused(cluster, call, "bdev_uring_create", file_disk(path))
    assert str(path) in str(error)
    call("bdev_uring_create", **file_disk(path))
    call("bdev_uring_delete", name="new")


def test_a_file_that_serves_already(cluster: Cluster, call: Call, path: Path) -> None:
    call("bdev_uring_create", **file_disk(path))
    error = refused(cluster, call, "bdev_uring_create", file_disk(path) | {"name": "again"})
    assert str(path) in str(error)
    call("bdev_uring_delete", name="new")


def test_a_file_whose_size_is_no_whole_block(cluster: Cluster, call: Call, path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(100)
    refused(cluster, call, "bdev_uring_create", file_disk(path))


def test_a_file_that_shrinks_fails_what_it_has_no_more(cluster: Cluster, path: Path) -> None:
    content = path.read_bytes()
    cluster.rpc("bdev_uring_create", **file_disk(path))
    cluster.rpc("vhost_create_blk_controller", ctrlr="new", dev_name="new")
    reactors = cluster.reactors()
    with (
        BlkFrontend.connect(cluster.socket("new")) as disk,
        BlkFrontend.connect(cluster.socket("served")) as other,
    ):
        assert disk.read(0, 4096) == content[:4096]
        os.truncate(path, 64 << 10)
        with pytest.raises(RequestError, match="IOERR"):
            disk.read(512 << 10, 4096)
        assert disk.read(0, 4096) == content[:4096]
        other.write(0, content[:512])
        assert other.read(0, 512) == content[:512]
    wait_until(lambda: not cluster.rpc("vhost_get_controllers", name="new")[0]["sessions"])
    assert cluster.reactors() == reactors
    cluster.rpc("vhost_delete_controller", ctrlr="new")
    cluster.rpc("bdev_uring_delete", name="new")


def test_an_operation_that_is_not(cluster: Cluster, call: Call) -> None:
    assert refused(cluster, call, "bdev_invent", {}).code in (-32601, -errno.ENOSYS)
