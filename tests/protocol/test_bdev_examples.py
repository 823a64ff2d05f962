"""Every example of docs/bdev.md, as one pastes it: against a cluster, section by section."""

from __future__ import annotations

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

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bdev.md"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What a machine does not have; the commands themselves are tested elsewhere.
MISSING = ("traddr=", "/dev/vg0", "bdev_virtio_", "start --load")


def sections() -> dict[str, list[str]]:
    """Return the lines of each section that are commands."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.S).splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif re.match(r" {4}\S", line) and not any(word in line for word in MISSING):
            found.setdefault(title, []).append(line.strip())
    return {title: lines for title, lines in found.items() if is_shell(lines)}


def is_shell(lines: list[str]) -> bool:
    return any(line.startswith("vhost-reactor") for line in lines)


def python_of(title: str) -> str | None:
    """Return the Python that a section shows."""
    text = PAGE.read_text().partition(f"# {title}\n")[2]
    text = re.split(r"^#", text, maxsplit=1, flags=re.M)[0]
    found = re.search(r"```python\n(.*?)```", text, re.S)
    return found and found[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("examples")
    source = python_of("Python: a class of yours")
    assert source is not None
    (folder / "ramp.py").write_text(source)
    environment = {"PYTHONPATH": f"{PAGE.parents[1]}:{folder}", "PATH": PATH}
    with Application(folder, "--load", "ramp", environment=environment) as application:
        yield application


def run(line: str, cluster: Application) -> None:
    """Run a line of shell; vhost-reactor is called here, which is faster than a new process."""
    for command in line.split(" && "):
        if "sfdisk" in command and shutil.which("sfdisk", path=PATH) is None:
            Path(command.split()[-1]).write_bytes(gpt_disk([(64, 1500, "made by hand")]))
        elif not command.startswith("vhost-reactor rpc "):
            subprocess.run(command, shell=True, check=True, env={"PATH": PATH})
        else:
            words = shlex.split(command)[2:]
            done = CliRunner().invoke(cli, ["rpc", "-s", str(cluster.rpc_socket), *words])
            assert done.exit_code == 0, f"{command}: {done.output}"


@pytest.mark.parametrize("title", sections())
def test_an_example_works_when_it_is_pasted(
    title: str, cluster: Application, tmp_path: Path
) -> None:
    for line in sections()[title]:
        here = re.sub(r"/(srv|tmp)/", f"{tmp_path}/", line)
        run(here, cluster)


def test_every_section_with_a_name_of_a_method_has_an_example() -> None:
    """So that a new kind cannot be described without one."""
    assert len(sections()) >= 18
