"""Examples of docs/bdev.md that need a server or a front-end; test_bdev_examples has the others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import StartCluster
from tests.support.cluster import Cluster
from vhost.cli import parse_arguments
from vhost.frontend import BlkFrontend

PAGE = (Path(__file__).parents[2] / "docs" / "bdev.md").read_text()


def section(title: str) -> str:
    """Return what stands under a heading."""
    found = re.search(rf"^#+ {title}.*?\n(.*?)(?=^#+ )", PAGE, re.S | re.M)
    assert found, f"docs/bdev.md has no section {title}"
    return found[1]


def commands(title: str, sockets: Path) -> Iterator[str]:
    """Yield the lines of a section's examples."""
    for line in re.findall(
        r"^    (\S.*)$", re.sub(r"```.*?```", "", section(title), flags=re.S), re.M
    ):
        yield line.replace("/run/disks/", f"{sockets}/")


def paste(cluster: Cluster, line: str) -> None:
    """Carry out a call of the cluster."""
    _, command, method, *arguments = shlex.split(line)
    assert command == "rpc"
    cluster.rpc(method, **parse_arguments(tuple(arguments)))


def test_virtio(cluster: Cluster) -> None:
    """The server is the same cluster: nothing of it waits for itself."""
    for name in ("M0", "M1"):
        cluster.rpc("bdev_malloc_create", name=name, num_blocks=8192, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="disk0", dev_name="M0")
    cluster.rpc("vhost_create_scsi_controller", ctrlr="scsi0")
    target = {"ctrlr": "scsi0", "scsi_target_num": 0, "bdev_name": "M1"}
    cluster.rpc("vhost_scsi_controller_add_target", **target)
    for line in commands("Virtio", cluster.socket_dir):
        paste(cluster, line)
    names = [bdev["name"] for bdev in cluster.rpc("bdev_get_bdevs")]
    assert names == ["M0", "M1", "V1t0"]
    cluster.rpc("vhost_create_blk_controller", ctrlr="again", dev_name="V1t0")
    with BlkFrontend.connect(cluster.socket("again")) as disk:
        disk.write(4096, b"w" * 65536)
        assert disk.read(4096, 65536) == b"w" * 65536
    cluster.rpc("vhost_delete_controller", ctrlr="again", force=True)
    cluster.rpc("bdev_virtio_detach_controller", name="V1")


def test_python(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module of the example is a disk that a front-end reads and writes."""
    (code,) = re.findall(r"```python\n(.*?)```", section("Python"), re.S)
    assert code.count("\n") <= 22
    (tmp_path / "ramp.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start, create, rescan, delete = commands("Python", tmp_path)
    cluster = start_cluster(*shlex.split(start)[2:-1])
    paste(cluster, create)
    paste(cluster, rescan)
    cluster.rpc("vhost_create_blk_controller", ctrlr="disk", dev_name="Y0")
    with BlkFrontend.connect(cluster.socket("disk")) as disk:
        assert disk.size == 64 << 20
        assert disk.read(512 * 300, 1024) == bytes([300 % 256]) * 512 + bytes([301 % 256]) * 512
        disk.write(512 * 301, b"w" * 512)
        assert disk.read(512 * 300, 1024) == bytes([300 % 256]) * 512 + b"w" * 512
    cluster.rpc("vhost_delete_controller", ctrlr="disk", force=True)
    paste(cluster, delete)
    assert cluster.rpc("bdev_get_bdevs") == []
