"""Locks hold between processes and name their holder."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from reactor.lockfile import InUse, LockFile
from tests.support.descriptors import open_fds

HOLDER = """
import sys, time
from reactor.lockfile import LockFile
LockFile(sys.argv[1], "it", "the holder")
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "lock")


def test_a_held_lock_is_refused_with_the_holder(path):
    with LockFile(path, "CPU 3", "somewhere"):
        with pytest.raises(InUse) as refused:
            LockFile(path, "CPU 3")
        assert str(refused.value).startswith(f"CPU 3 is in use by pid {os.getpid()} (somewhere)")


def test_release_removes_the_file_and_frees_the_lock(path):
    lock = LockFile(path, "it")
    lock.close()
    lock.close()
    assert not os.path.exists(path)
    LockFile(path, "it").close()


def test_a_holder_that_is_killed_holds_nothing(path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(InUse, match=rf"pid {holder.pid} \(the holder\)"):
            LockFile(path, "it")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    LockFile(path, "it").close()


def test_a_lock_shared_between_users_can_be_opened_by_all_whatever_the_umask(path):
    before = os.umask(0o077)
    try:
        with LockFile(path, "it", shared_between_users=True):
            assert os.stat(path).st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def as_nobody(action) -> bool:
    """Run ``action`` in a child of another user; return whether it raised InUse."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgid(65534)
            os.setuid(65534)
            action()
            status = 0
        except InUse:
            status = 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 1


@pytest.fixture
def sticky():
    """A directory that every user can reach and write, as /var/tmp is."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chmod(directory, 0o1777)
        yield os.path.join(directory, "lock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_lock_shared_between_users_excludes_them_and_survives_a_stale_file(sticky):
    def take():
        LockFile(sticky, "CPU 0", shared_between_users=True).close()

    with LockFile(sticky, "CPU 0", shared_between_users=True):
        assert as_nobody(take)
    with open(sticky, "x"):
        os.chmod(sticky, 0o666)  # what a holder that was killed leaves
    assert not as_nobody(take)
    assert os.path.exists(sticky), "another user's file cannot be removed"
    take()
    assert not as_nobody(take)
    assert not os.path.exists(sticky)


def test_a_private_lock_is_private(path):
    with LockFile(path, "it"):
        assert os.stat(path).st_mode & 0o777 == 0o600


def test_what_is_not_a_lock_file_is_left_alone(tmp_path, path):
    os.mkfifo(path)
    with pytest.raises(InUse, match="not a lock file"):
        LockFile(path, "it")
    link = tmp_path / "link"
    link.symlink_to("lock")
    with pytest.raises(OSError, match="symbolic links"):
        LockFile(str(link), "it")


def test_a_refused_lock_leaks_no_descriptor(path):
    with LockFile(path, "it"):
        before = open_fds()
        for _ in range(3):
            with pytest.raises(InUse):
                LockFile(path, "it")
        assert open_fds() == before


@pytest.mark.parametrize("another_came", [False, True])
def test_a_file_that_its_holder_removes_before_we_lock_it_is_not_taken_for_the_lock(
    path, monkeypatch, another_came
):
    flock, released = fcntl.flock, []

    def flock_after_the_holder_has_gone(fd, how):
        if not released:
            released.append(True)
            os.unlink(path)
            if another_came:
                open(path, "x").close()
        flock(fd, how)

    open(path, "x").close()
    monkeypatch.setattr(fcntl, "flock", flock_after_the_holder_has_gone)
    with LockFile(path, "it"), pytest.raises(InUse):
        LockFile(path, "it")
