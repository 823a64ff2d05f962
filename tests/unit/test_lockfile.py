"""Locks hold between processes and name their holder."""

import os
import signal
import subprocess
import sys

import pytest

from reactor.lockfile import InUse, LockFile

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
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(InUse):
                LockFile(path, "it")
        assert len(os.listdir("/proc/self/fd")) == before
