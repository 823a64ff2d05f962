"""The run directory belongs to one cluster, and to nobody else."""

import os
import socket

import pytest

from reactor.lockfile import InUse
from reactor.rundir import RunDir, default_run_dir


def test_it_is_made_private_and_removed(tmp_path):
    with RunDir(tmp_path / "run") as run_dir:
        assert run_dir.path.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_one_that_was_there_stays(tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    RunDir(tmp_path / "run").close()
    assert list((tmp_path / "run").iterdir()) == []


def test_one_that_is_not_empty_stays(tmp_path):
    with RunDir(tmp_path / "run") as run_dir:
        (run_dir.path / "kept").touch()
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["kept"]


def test_sockets_of_processes_that_were_killed_go_with_it(tmp_path):
    with RunDir(tmp_path / "run") as run_dir, socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir.path / "reactor-0"))
    assert list(tmp_path.iterdir()) == []


def test_a_second_cluster_is_refused_and_disturbs_nothing(tmp_path):
    with RunDir(tmp_path / "run") as run_dir:
        with pytest.raises(InUse, match=f"{run_dir.path} is in use by pid {os.getpid()}"):
            RunDir(tmp_path / "run")
        assert run_dir.path.exists()


def test_one_that_others_can_enter_is_refused_and_not_changed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(InUse, match=r"open to others \(mode 755\)"):
        RunDir(tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to("real")
    with pytest.raises(InUse, match="not a directory"):
        RunDir(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_one_that_another_user_owns_is_refused(tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 65534, 65534)
    with pytest.raises(InUse, match="belongs to user 65534"):
        RunDir(tmp_path / "run")


def test_a_parent_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none/run"):
        RunDir(tmp_path / "none" / "run")


@pytest.mark.parametrize(
    ("uid", "runtime", "expected"),
    [
        (0, "/run/user/0", "/run/vhost-reactor"),
        (7, "/run/user/7", "/run/user/7/vhost-reactor"),
        (7, None, "/tmp/vhost-reactor-7"),
    ],
)
def test_the_default_depends_on_the_user(monkeypatch, uid, runtime, expected):
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert str(default_run_dir()) == expected
