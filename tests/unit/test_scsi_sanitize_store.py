"""What is known of a SANITIZE on disk, and the parts that it is done in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scsi.sanitize_store import VERSION, SanitizeStore, Sanitizing
from scsi.sanitizer import parts_of

UUID = "6c1d5a7e-93a7-4be1-9d86-0a3d0f2f9b10"
MIB = 1 << 20


def sanitizing(**changes: Any) -> Sanitizing:
    fields: dict[str, Any] = {
        "version": VERSION,
        "uuid": UUID,
        "erase": False,
        "invert": False,
        "unrestricted": True,
        "passes": 2,
        "pattern": b"\x0f\xf1",
    }
    return Sanitizing(**fields | changes)


def parts(mib: int, **changes: Any) -> list[tuple[int, int, bytes]]:
    bdev: Any = SimpleNamespace(block_size=512, num_blocks=mib * MIB // 512)
    return list(parts_of(bdev, sanitizing(**changes)))


@pytest.mark.parametrize("changes", [{}, {"erase": True, "pattern": b"", "failed": True}])
def test_what_was_saved_is_what_is_loaded(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = SanitizeStore(tmp_path / "sanitize")
    assert store.load(UUID) is None
    saved = sanitizing(**changes, done=16 * MIB)
    store.save(saved)
    loaded = store.load(UUID)
    assert loaded == saved
    assert Sanitizing.of(UUID, loaded.native()) == sanitizing(**changes | {"failed": False})
    store.remove(UUID)
    assert store.load(UUID) is None
    store.remove(UUID)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"uuid": "another"},
        {"passes": 0},
        {"passes": 32},
        {"done": -1},
        {"pattern": b""},
        {"pattern": bytes(4097)},
        {"erase": True},
    ],
)
def test_what_cannot_have_been_saved_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = SanitizeStore(tmp_path)
    store.save(sanitizing(**changes))
    store.path(changes.get("uuid", UUID)).rename(store.path(UUID))
    with pytest.raises(OSError, match="damaged") as refused:
        store.load(UUID)
    assert refused.value.filename == str(store.path(UUID))


def test_each_pass_covers_the_medium() -> None:
    places = [(offset, length) for offset, length, _ in parts(40)]
    assert places == [(0, 16 * MIB), (16 * MIB, 16 * MIB), (32 * MIB, 8 * MIB)] * 2


@pytest.mark.parametrize(("passes", "first"), [(1, False), (2, True), (3, False), (4, True)])
def test_inverted_passes_end_with_the_pattern(passes: int, first: bool) -> None:
    blocks = [block for _, _, block in parts(1, passes=passes, invert=True)]
    plain, inverted = b"\x0f\xf1" * 256, b"\xf0\x0e" * 256
    expected = [inverted if (number % 2 == 0) == first else plain for number in range(passes)]
    assert blocks == expected
    assert blocks[-1] == plain


def test_an_erase_writes_zeroes() -> None:
    assert {block for _, _, block in parts(1, erase=True, pattern=b"")} == {b""}
