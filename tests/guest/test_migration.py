"""A guest moves from one QEMU to another while it works on its disk (pre-copy)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.guest.load import Load
from tests.guest.servers import ClusterServer

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]


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
