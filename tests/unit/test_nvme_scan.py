"""Which namespaces are found on a controller."""

from __future__ import annotations

import asyncio
import dataclasses
import struct

import pytest

from bdev.nvme_identify import parse_controller
from bdev.nvme_scan import IDENTIFY_ACTIVE, scan
from bdev.nvme_transport import ControllerError
from tests.support.nvme_bench import NvmeBench, on_nvme
from tests.support.nvme_controller import PAGE, Namespace, SoftController, SoftDma


class Fetcher:
    """Answers Identify as the software controller does, without its queues."""

    def __init__(self, *nsids: int) -> None:
        self.soft = SoftController(SoftDma(), {nsid: Namespace(8) for nsid in nsids})
        self.identity = parse_controller(self.soft.identify())
        self.asked: list[tuple[int, int]] = []
        self.lists: list[list[int]] | None = None

    async def fetch(self, _what: str, command: dict[str, int]) -> bytes:
        cns, nsid = command["cdw10"], command["nsid"]
        self.asked.append((cns, nsid))
        if cns != IDENTIFY_ACTIVE:
            found = self.soft.namespaces.get(nsid)
            return found.identify() if found else bytes(PAGE)
        if self.lists is not None:
            active = self.lists.pop(0)
        else:
            active = [n for n in sorted(self.soft.namespaces) if n > nsid][:1024]
        return struct.pack(f"<{len(active)}I", *active).ljust(PAGE, b"\0")

    def scan(self) -> tuple[list[int], list[int]]:
        try:
            found, refused = asyncio.run(scan(self.fetch, self.identity))
        finally:
            self.soft.close()
        return list(found), list(refused)


def test_more_namespaces_than_a_list_holds_are_all_found() -> None:
    fetcher = Fetcher(*range(1, 1025), 5000, 5001)
    found, _ = fetcher.scan()
    assert found == [*range(1, 1025), 5000, 5001]
    assert [nsid for cns, nsid in fetcher.asked if cns == IDENTIFY_ACTIVE] == [0, 1024]


def test_a_full_list_may_be_the_last() -> None:
    found, _ = Fetcher(*range(1, 1025)).scan()
    assert len(found) == 1024


def test_a_controller_of_before_the_list_is_asked_for_each() -> None:
    fetcher = Fetcher(2, 5)
    fetcher.identity = dataclasses.replace(fetcher.identity, version=0x10000)
    assert fetcher.scan() == ([2, 5], [])
    assert fetcher.asked == [(0, nsid) for nsid in range(1, fetcher.identity.namespaces + 1)]


def test_a_namespace_that_goes_while_it_is_looked_at_is_left_out() -> None:
    fetcher = Fetcher(1, 3)
    fetcher.lists = [[1, 2, 3]]
    assert fetcher.scan() == ([1, 3], [])


@pytest.mark.parametrize("active", [[3, 2], [1, 1], [*range(1, 1024), 7]])
def test_a_list_that_never_ends_or_goes_back_is_refused(active: list[int]) -> None:
    fetcher = Fetcher(1)
    fetcher.lists = [active]
    with pytest.raises(ControllerError, match="is not ascending"):
        fetcher.scan()


@on_nvme()
async def test_a_controller_without_namespaces_is_attached_and_waits_for_one(
    bench: NvmeBench,
) -> None:
    bench.soft.namespaces = {}
    assert await bench.attach() == []
    bench.soft.namespaces[1] = Namespace()
    bench.soft.namespaces_changed(1)
    await bench.until(lambda: [bdev.name for bdev in bench.registry] == ["Nvme0n1"])
