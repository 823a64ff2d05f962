"""Every example of docs/bdev.md, as one pastes it: against a cluster, section by section."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.application import Application
from tests.support.gpt import gpt_disk
from vhost.cli import cli
from vhost.frontend import BlkFrontend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bdev.md"
TEXT = PAGE.read_text()
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# Examples that are not run, by words of theirs, with the reason: each stands for just one line.
MISSING = {
    "trtype=PCIe": "takes a drive from the kernel: tests/guest/test_nvme.py has an emulated one",
    "/dev/vg0": "a volume of the reader: test_bdev_block_device.py has a block device",
    "start --load": "the cluster of these tests is started so already",
}

VIRTIO = "Virtio: a disk of another server"
PYTHON = "Python: a class of yours"


def find_sections() -> dict[str, list[str]]:
    """Return the lines of each section that are commands, of those that have some of ours."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in re.sub(r"```.*?```", "", TEXT, flags=re.S).splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif re.match(r" {4}\S", line) and not any(word in line for word in MISSING):
            found.setdefault(title, []).append(line.strip())
    return {
        title: lines
        for title, lines in found.items()
        if any(line.startswith("vhost-reactor") for line in lines)
    }


SECTIONS = find_sections()


def python_of(title: str) -> str:
    """Return the Python that a section shows."""
    section = re.split(r"^#", TEXT.partition(f"# {title}\n")[2], maxsplit=1, flags=re.M)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    return str(code)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("examples")
    code = python_of(PYTHON)
    assert code.count("\n") <= 22  # "a disk of twenty lines"
    (folder / "ramp.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{PAGE.parents[1]}:{folder}", "PATH": PATH}
    with Application(folder, "--load", "ramp", environment=environment) as application:
        yield application


class Reader:
    """Somebody who pastes lines, on a machine where the paths of the examples lie elsewhere."""

    def __init__(self, cluster: Application, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder

    def paste(self, *lines: str) -> None:
        """Run lines of shell; vhost-reactor is called here, faster than as a new process."""
        places = {
            "/run/disks/": self._cluster.run_dir,
            "/srv/": self._folder,
            "/tmp/": self._folder,
        }
        for line in lines:
            here = re.sub("|".join(places), lambda found: f"{places[found[0]]}/", line)
            for command in here.split(" && "):
                self._run(command)

    def _run(self, command: str) -> None:
        if "sfdisk" in command and shutil.which("sfdisk", path=PATH) is None:
            Path(command.split()[-1]).write_bytes(gpt_disk([(64, 1500, "made by hand")]))
        elif not command.startswith("vhost-reactor rpc "):
            subprocess.run(command, shell=True, check=True, env={"PATH": PATH})
        else:
            words = shlex.split(command)[2:]
            rpc = ["rpc", "-s", str(self._cluster.rpc_socket), *words]
            done = CliRunner().invoke(cli, rpc)
            assert done.exit_code == 0, f"{command}: {done.output}"


@pytest.fixture
def reader(cluster: Application, tmp_path: Path) -> Reader:
    return Reader(cluster, tmp_path)


@pytest.mark.parametrize("title", [title for title in SECTIONS if title not in (VIRTIO, PYTHON)])
def test_an_example_works_when_it_is_pasted(title: str, reader: Reader) -> None:
    reader.paste(*SECTIONS[title])


def test_a_disk_of_another_server_can_be_written(cluster: Application, reader: Reader) -> None:
    """The server is the same cluster: nothing of it waits for itself."""
    for name in ("blk", "lun"):
        cluster.rpc("bdev_malloc_create", name=name, num_blocks=8192, block_size=512)
    cluster.rpc("vhost_create_blk_controller", ctrlr="disk0", dev_name="blk")
    cluster.rpc("vhost_create_scsi_controller", ctrlr="scsi0")
    target = {"ctrlr": "scsi0", "scsi_target_num": 0, "bdev_name": "lun"}
    cluster.rpc("vhost_scsi_controller_add_target", **target)
    reader.paste(*SECTIONS[VIRTIO])
    names = {bdev["name"] for bdev in cluster.rpc("bdev_get_bdevs")}
    assert {"V0", "V1t0"} & names == {"V1t0"}  # the last line has detached the other
    cluster.rpc("vhost_create_blk_controller", ctrlr="again", dev_name="V1t0")
    with BlkFrontend.connect(str(cluster.run_dir / "again")) as disk:
        disk.write(4096, b"w" * 65536)
        assert disk.read(4096, 65536) == b"w" * 65536
    cluster.rpc("vhost_delete_controller", ctrlr="again", force=True)
    cluster.rpc("bdev_virtio_detach_controller", name="V1")
    for ctrlr in ("disk0", "scsi0"):
        cluster.rpc("vhost_delete_controller", ctrlr=ctrlr, force=True)


def test_the_python_of_the_example_is_a_disk(cluster: Application, reader: Reader) -> None:
    *lines, delete = SECTIONS[PYTHON]
    reader.paste(*lines)
    cluster.rpc("vhost_create_blk_controller", ctrlr="python", dev_name="Y0")
    with BlkFrontend.connect(str(cluster.run_dir / "python")) as disk:
        assert disk.size == 64 << 20
        assert disk.read(512 * 300, 1024) == bytes([300 % 256]) * 512 + bytes([301 % 256]) * 512
        disk.write(512 * 301, b"w" * 512)
        assert disk.read(512 * 300, 1024) == bytes([300 % 256]) * 512 + b"w" * 512
    cluster.rpc("vhost_delete_controller", ctrlr="python", force=True)
    reader.paste(delete)
    assert "Y0" not in {bdev["name"] for bdev in cluster.rpc("bdev_get_bdevs")}


def test_sections_have_examples() -> None:
    """So that a new kind cannot be described without one, and none of them is overlooked here."""
    assert len(SECTIONS) >= 20


@pytest.mark.parametrize("words", MISSING)
def test_each_exemption_stands_for_one_example(words: str) -> None:
    """So that no new example is left out because it resembles an old one."""
    examples = [line for line in TEXT.splitlines() if re.match(r" {4}\S", line)]
    assert sum(words in line for line in examples) == 1
