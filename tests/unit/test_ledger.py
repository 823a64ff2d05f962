"""A file of entries: what was committed is there, whatever became of what was not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor import ledger
from reactor.ledger import MIN_ADDED, Key, Ledger, read_ledger, replace_file

A, B = Key(0, "s", "a"), Key(1, "s", "b")


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "book")
    yield made
    made.close()


def found(book: Ledger) -> dict[Key, Any]:
    return read_ledger(book.path.read_bytes())


def test_an_entry_is_there_until_it_is_removed(book: Ledger) -> None:
    book.commit({A: b"1", B: b'{"x":[2]}'})
    assert found(book) == {A: 1, B: {"x": [2]}}
    book.commit({A: None})
    assert found(book) == {B: {"x": [2]}}
    assert book.path.stat().st_mode & 0o777 == 0o600


def test_an_entry_that_changes_stays_where_it_is_and_one_that_comes_back_is_the_last(
    book: Ledger,
) -> None:
    book.commit({A: b"1", B: b"2"})
    book.commit({A: b"3"})
    assert list(found(book)) == [A, B]
    book.commit({A: None})
    book.commit({A: b"4"})
    assert list(found(book)) == [B, A]


def test_what_a_complete_commit_leaves_out_is_gone(book: Ledger) -> None:
    book.commit({A: b"1", B: b"2"})
    book.commit({B: b"2"}, complete=True)
    assert found(book) == {B: 2}


def test_only_what_has_changed_is_written(book: Ledger) -> None:
    book.commit({A: b'"' + b"a" * 1000 + b'"', B: b"2"})
    size = book.path.stat().st_size
    book.commit({A: b'"' + b"a" * 1000 + b'"', B: b"3"}, complete=True)
    assert 0 < book.path.stat().st_size - size < 50
    size = book.path.stat().st_size
    book.commit({B: b"3"})
    assert book.path.stat().st_size == size


def test_a_file_of_many_changes_is_as_long_as_twice_what_is_in_it_at_most(book: Ledger) -> None:
    text = b'"' + b"b" * 100 + b'"'
    for number in range(3 * MIN_ADDED // 100):
        book.commit({A: str(number).encode(), B: text if number % 2 else None})
        assert book.path.stat().st_size <= MIN_ADDED + 300
    assert found(book)[A] == 3 * MIN_ADDED // 100 - 1


def test_a_line_that_was_not_finished_is_as_if_it_were_not_there(book: Ledger) -> None:
    book.commit({A: b"1"})
    whole = book.path.read_bytes()
    book.commit({A: b"2", B: b"3"})
    text = book.path.read_bytes()
    for length in range(len(whole), len(text)):
        assert read_ledger(text[:length]) == {A: 1}
    assert read_ledger(text) == {A: 2, B: 3}


@pytest.mark.parametrize(
    "text", [b"[\n", b"1\n", b'[[1,"a"]]\n', b'[["x","a","b",1]]\n', b"\xff\n"]
)
def test_what_is_no_ledger_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_ledger(text)


def test_a_file_that_was_removed_is_written_anew(book: Ledger) -> None:
    book.commit({A: b"1"})
    book.path.unlink()
    book.commit({B: b"2"})
    assert found(book) == {A: 1, B: 2}


def test_a_change_that_cannot_be_written_is_not_there_and_comes_with_the_next(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    book.commit({A: b"1"})
    with monkeypatch.context() as patch:

        def fail(fd: int) -> None:
            raise OSError(28, "no space")

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="no space"):
            book.commit({A: b"2"})
    assert found(book) == {A: 1}
    book.commit({B: b"3"})
    assert found(book) == {A: 2, B: 3}


def test_of_a_line_that_was_written_in_part_nothing_stays(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    book.commit({A: b"1"})
    before, write = book.path.read_bytes(), os.write

    def short(fd: int, data: memoryview) -> int:
        if len(data) < 10:
            raise OSError(28, "no space")
        return write(fd, data[:-5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(OSError, match="no space"):
            book.commit({B: b"2"})
    assert book.path.read_bytes() == before
    book.commit({})
    assert found(book) == {A: 1, B: 2}


@given(
    st.lists(
        st.tuples(
            st.dictionaries(
                st.builds(Key, st.integers(0, 2), st.just("s"), st.sampled_from("abcé\n")),
                st.none() | st.integers(0, 3) | st.text(max_size=3),
                max_size=4,
            ),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_it_is_a_dictionary(commits: list[tuple[dict[Key, Any], bool]]) -> None:
    wanted: dict[Key, Any] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "MIN_ADDED", 40)
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "fdatasync", lambda _: None)
        book = Ledger(Path(folder) / "book")
        for changes, complete in commits:
            encoded = {
                key: None if value is None else msgspec.json.encode(value)
                for key, value in changes.items()
            }
            book.commit(encoded, complete=complete)
            if complete:
                wanted = {key: value for key, value in wanted.items() if key in changes}
            wanted = {k: v for k, v in {**wanted, **changes}.items() if v is not None}
            assert list(found(book).items()) == list(wanted.items())
        book.close()


def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    os.close(replace_file(path, b"before"))

    def fail(_: int) -> Any:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
