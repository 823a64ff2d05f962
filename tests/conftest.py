"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hypothesis
import pytest

from tests.support.cluster import Cluster
from tests.support.descriptors import nothing_left_open

# The same examples in every run, unless one asks for others: HYPOTHESIS_PROFILE=explore make test
hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

StartCluster = Callable[..., Cluster]


@contextmanager
def short_directory() -> Iterator[Path]:
    """Make a directory for Unix sockets, whose names have room for 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vr-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def running_cluster(*arguments: str, cpus: list[int]) -> Iterator[Cluster]:
    """Run a cluster with a reactor on each of ``cpus``; it must end cleanly, and leave nothing."""
    with short_directory() as directory:
        cluster = Cluster(directory, f"[{','.join(map(str, cpus))}]", arguments)
        try:
            yield cluster
        except BaseException:
            cluster.kill()
            raise
        finally:
            print(cluster.log)  # shown when a test has failed
        cluster.stop()


@pytest.fixture(scope="session", autouse=True)
def _children_heed_signals() -> None:
    """What nohup(1), or a shell's "&", has had us ignore is not ignored by what tests start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # exec() makes that the default again


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_open() -> Iterator[None]:
    """A module's tests close what they, or what they test, have opened."""
    with nothing_left_open():
        yield


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name is short enough for Unix sockets."""
    with short_directory() as path:
        yield path


@pytest.fixture(scope="session")
def cpus() -> list[int]:
    """The CPUs that the tests may use."""
    return sorted(os.sched_getaffinity(0))


@pytest.fixture
def start_cluster(cpus: list[int]) -> Iterator[StartCluster]:
    """Start clusters: ``start_cluster(*arguments, cpus=[...])``. Each must end cleanly."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(
            running_cluster(*arguments, **{"cpus": cpus[:1], **options})
        )


@pytest.fixture
def cluster(start_cluster: StartCluster) -> Cluster:
    """A cluster of one reactor; it must end cleanly, and leave nothing behind."""
    return start_cluster()
