"""Servers and guests. A module's tests share them, unless a test is going to harm them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import running_cluster, short_directory
from tests.guest.servers import ClusterServer, DiskServer, StorageDaemon

OURS = pytest.param("cluster", id="cluster")
PACKED = pytest.param("packed", id="packed")
GUEST_TIMEOUT = 600  # seconds for a test, its fixtures included: what ends a hang
PEER = pytest.param("storage-daemon", id="storage-daemon", marks=pytest.mark.peer)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give guests time, and skip where there is no such machine.

    A missing program is an error, as setup installs it.
    """
    for item in items:
        if item.get_closest_marker("guest"):
            item.add_marker(pytest.mark.timeout(GUEST_TIMEOUT))
    if platform.machine() != "x86_64":
        skip = pytest.mark.skip(reason="the guest is an x86-64 machine, with programs of the host")
        for item in items:
            if item.get_closest_marker("guest"):
                item.add_marker(skip)


@contextmanager
def running_server(kind: str, cpus: list[int]) -> Iterator[DiskServer]:
    """Run a disk server; ours, with split or packed rings, must end cleanly."""
    with short_directory() as directory:
        if kind in ("cluster", "packed"):
            with running_cluster(cpus=cpus[:2]) as cluster:
                yield ClusterServer(cluster, directory, packed=kind == "packed")
        else:
            daemon = StorageDaemon(directory)
            try:
                yield daemon
            finally:
                daemon.stop()


@pytest.fixture(scope="module", params=[OURS, PACKED, PEER])
def server(request: pytest.FixtureRequest, cpus: list[int]) -> Iterator[DiskServer]:
    """A server that lives as long as the tests of a module."""
    with running_server(request.param, cpus) as running:
        yield running


@pytest.fixture
def cluster_server(request: pytest.FixtureRequest, cpus: list[int]) -> Iterator[ClusterServer]:
    """A cluster of our own that one test may harm; yet it must end cleanly.

    Its parameter, if a test gives one, says whether disks offer packed rings.
    """
    packed = bool(getattr(request, "param", False))
    with short_directory() as directory, running_cluster(cpus=cpus[:2]) as cluster:
        yield ClusterServer(cluster, directory, packed=packed)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for a guest that a module's tests share."""
    return tmp_path_factory.mktemp("guest")
