"""The tools of the guest tests do not deceive: what fails in the guest fails here."""

from __future__ import annotations

import lzma
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.cpio import Archive
from tests.guest.guest import Guest, GuestError
from tests.guest.initramfs import find_tool
from tests.guest.kernel import Kernel, KernelError


def test_archive_is_unpacked_by_another_implementation(tmp_path: Path) -> None:
    archive = Archive()
    archive.add_file("bin/tool", b"#!/bin/sh\n", 0o755)
    archive.add_file("/bin/odd", b"12345")
    archive.add_link("sbin", "bin")
    command = [str(find_tool("busybox")), "cpio", "-i", "-d"]

    subprocess.run(command, input=archive.to_bytes(), cwd=tmp_path, check=True, capture_output=True)

    assert (tmp_path / "sbin/odd").read_bytes() == b"12345"
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755


def test_archive_refuses_a_second_file_of_the_same_name() -> None:
    archive = Archive()
    archive.add_file("a/b", b"")

    with pytest.raises(ValueError, match="a/b is in the archive already"):
        archive.add_file("/a/b", b"")


def _module(depends: str) -> bytes:
    return b"\x7fELF...license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    (tmp_path / "modules.builtin").write_text("kernel/lib/in.ko\n")
    (tmp_path / "top-level.ko").write_bytes(_module("left,right"))
    (tmp_path / "left.ko.xz").write_bytes(lzma.compress(_module("base")))
    (tmp_path / "right.ko").write_bytes(_module("base,in"))
    (tmp_path / "base.ko").write_bytes(_module(""))
    (tmp_path / "broken.ko").write_bytes(_module("absent"))
    return Kernel(tmp_path / "vmlinuz", tmp_path)


def test_modules_are_loaded_after_what_they_need(kernel: Kernel) -> None:
    order = [path.name for path in kernel.load_order("top_level", "in")]

    assert order == ["base.ko", "left.ko.xz", "right.ko", "top-level.ko"]


def test_module_that_is_nowhere_is_named(kernel: Kernel) -> None:
    with pytest.raises(KernelError, match="no module absent"):
        kernel.load_order("broken")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with Guest(tmp_path_factory.mktemp("guest"), []) as running:
        yield running


@pytest.mark.guest
def test_output_and_status_come_back_as_they_are(guest: Guest) -> None:
    result = guest.run("printf 'a\\n\\001 \\n'; echo b >&2; exit 3", status=3)

    assert result.output == "a\n\x01 \nb\n"
    assert guest.run("true").output == ""


@pytest.mark.guest
def test_long_output_is_complete(guest: Guest) -> None:
    assert guest.run("seq 20000").output == "".join(f"{n}\n" for n in range(1, 20001))


@pytest.mark.guest
def test_command_that_fails_is_an_error_with_its_output(guest: Guest) -> None:
    with pytest.raises(GuestError, match="ended with 1, not 0:\nsome text"):
        guest.run("echo some text; false; echo never reached")


@pytest.mark.guest
def test_background_command_is_waited_for(guest: Guest) -> None:
    guest.start("sleep 0.3; echo done; (exit 7)", "/tmp/background")

    result = guest.wait("/tmp/background")

    assert (result.status, result.output) == (7, "done\n")


@pytest.mark.guest
def test_command_that_hangs_is_an_error_and_so_is_the_next(guest: Guest) -> None:
    with pytest.raises(GuestError, match="no answer in time to 'sleep 1000'"):
        guest.run("sleep 1000", timeout=0.5)
    with pytest.raises(GuestError, match="cannot run 'true': still busy"):
        guest.run("true")


@pytest.mark.guest
def test_guest_that_panics_is_an_error_with_its_console(guest: Guest, tmp_path: Path) -> None:
    with Guest(tmp_path, []) as doomed, pytest.raises(GuestError, match="kernel panicked"):
        doomed.run("echo c >/proc/sysrq-trigger")


@pytest.mark.guest
def test_disk_that_is_not_served_is_an_error_with_what_qemu_says(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="Failed to connect"):
        Guest(tmp_path, [tmp_path / "nothing"])
