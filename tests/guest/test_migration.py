"""A guest moves from one QEMU to another while it works on its disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.guest.load import Load
from tests.guest.servers import ClusterServer
from vhost import postcopy

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_guest_moves_under_load_there_and_back(
    cluster_server: ClusterServer, tmp_path: Path, ring: str
) -> None:
    """What our reactors read into its memory moves too, or the load would find old bytes in it."""
    packed = ring == "packed"
    disk = cluster_server.add_disk("moving", "file", packed=packed)
    places = [tmp_path / name for name in ("first", "second", "third")]
    for place in places:
        place.mkdir()
    guests = [Guest(places[0], [disk.socket], packed=packed)]
    try:
        load = Load(guests[0], "/dev/vda")
        load.advance(500)
        for place in places[1:]:
            path = place / "incoming"
            guests.append(
                Guest(place, [disk.socket], packed=packed, incoming=path),
            )
            guests[-2].migrate(guests[-1], path)
            guests[-2].kill()
            load.move(guests[-1])
            load.advance(500)
        result = load.stop()
        assert result.status == 0, result.output
        cluster_server.check_alive()
        guests[-1].shutdown()
    finally:
        for guest in guests:
            guest.kill()


@pytest.mark.skipif(not postcopy.features(), reason="this user may not have the kernel wait")
def test_guest_runs_on_before_its_memory_has_come(
    cluster_server: ClusterServer, tmp_path: Path
) -> None:
    """What the disk's server needs of it is fetched, and nobody finds zeroes in its place."""
    disk = cluster_server.add_disk("post-copy", "file")
    places = [tmp_path / name for name in ("first", "second")]
    for place in places:
        place.mkdir()
    guests = [Guest(places[0], [disk.socket])]
    try:
        load = Load(guests[0], "/dev/vda")
        load.advance(300)
        path = places[1] / "incoming"
        guests.append(Guest(places[1], [disk.socket], incoming=path))
        info = guests[0].migrate(guests[1], path, postcopy=True)
        assert info["ram"]["postcopy-requests"] > 0
        guests[0].kill()
        load.move(guests[1])
        load.advance(300)
        result = load.stop()
        assert result.status == 0, result.output
        (controller,) = cluster_server.cluster.rpc("vhost_get_controllers")
        (session,) = controller["sessions"]
        assert session["queues"][0]["reactor"].startswith("reactor-")
        log = cluster_server.cluster.log
        assert "post-copy begins, on postcopy-0" in log
        assert "post-copy has ended" in log
        cluster_server.check_alive()
        guests[1].shutdown()
    finally:
        for guest in guests:
            guest.kill()
