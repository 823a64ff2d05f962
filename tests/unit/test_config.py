"""Configurations: checked as a whole, then carried out in order, with errors that say where."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.config import load_config, read_config
from reactor.errors import OperationError
from reactor.operations import Operations, operation


class Shelf:
    def __init__(self) -> None:
        self.titles: list[str] = []

    @operation
    async def book_add(self, title: str) -> bool:
        if title in self.titles:
            raise OperationError(-17, f"{title} is there already")
        self.titles.append(title)
        return True

    @operation
    def book_sort(self) -> None:
        self.titles.sort()


def load(document):
    shelf, operations = Shelf(), Operations()
    operations.add(shelf)
    try:
        return asyncio.run(load_config(operations, document)), shelf.titles, None
    except OperationError as error:
        return None, shelf.titles, error


def add(title):
    return {"method": "book_add", "params": {"title": title}}


def section(*config, name="shelf"):
    return {"subsystem": name, "config": list(config)}


def test_calls_run_in_order_over_subsystems_and_batches():
    document = {
        "subsystems": [
            section(add("c"), [add("b"), add("a")]),
            {"subsystem": "nothing", "config": None},
            {"subsystem": "absent"},
            section({"method": "book_sort"}, {"method": "book_sort", "params": None}, add("0")),
        ]
    }
    assert load(document) == (6, ["a", "b", "c", "0"], None)


def test_an_unknown_method_is_found_before_anything_is_done():
    document = {"subsystems": [section(add("a")), section({"method": "nosuch"}, name="bdev")]}
    _, titles, error = load(document)
    assert titles == []
    assert error.code == -32601
    assert error.message == "configuration: subsystem bdev: nosuch: Method not found: nosuch"


def test_a_failed_call_is_named_with_its_subsystem():
    _, titles, error = load({"subsystems": [section(add("a"), add("a"), add("b"))]})
    assert titles == ["a"]
    assert error.code == -17
    assert error.message == "configuration: subsystem shelf: book_add: a is there already"


def test_a_bad_parameter_is_named_once():
    _, _, error = load({"subsystems": [section({"method": "book_add", "params": {"title": 1}})]})
    assert error.message == (
        "configuration: subsystem shelf: book_add: title: Expected `str`, got `int`"
    )


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ([], "Expected `object`, got `array`"),
        ({}, "missing required field `subsystems`"),
        ({"subsystems": [], "extra": 1}, "unknown field `extra`"),
        ({"subsystems": [{"config": []}]}, r"missing required field `subsystem`.*subsystems\[0\]"),
        ({"subsystems": [section({"method": 1})]}, r"config\[0\]"),
        ({"subsystems": [section({"method": "book_add", "args": {}})]}, "unknown field `args`"),
    ],
)
def test_a_document_of_another_form_is_refused_with_the_place(document, reason):
    _, _, error = load(document)
    assert error.code == -32602
    with pytest.raises(OperationError, match=reason):
        raise error


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["subsystems", "subsystem", "config", "method", "params"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(json_like)
def test_any_document_loads_or_is_refused(document):
    count, _, error = load(document)
    assert (count is None) != (error is None)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"subsystems": []}')
    assert read_config(path) == {"subsystems": []}


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_config(path)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path / "config.json")
