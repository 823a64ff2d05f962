"""Operations: the signature is the schema, and descriptors never leak."""

import asyncio
import os
from typing import TypedDict, Unpack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.errors import INVALID_PARAMS, OperationError, check, to_operation_error
from reactor.operations import FileDescriptors, Operations, operation


class Shelf:
    """Three operations of the kinds there are."""

    @operation(aliases=["add_book"])
    def book_add(self, title: str, pages: int, tags: list[str] = [], loan: bool = False) -> dict:  # noqa: B006
        """Add a book."""
        return {"title": title, "pages": pages, "tags": tags, "loan": loan}

    @operation
    async def book_wait(self, turns: int = 1) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    @operation
    def book_scan(self, fds: FileDescriptors, keep: bool = False) -> int:
        return fds.take(0) if keep else len(fds)

    def not_an_operation(self) -> None:
        raise AssertionError


@pytest.fixture
def operations():
    table = Operations()
    table.add(Shelf())
    return table


@pytest.fixture
def pipe_fds():
    fds = FileDescriptors(os.pipe())
    yield fds
    fds.close()


def run(operations, name, args=None, fds=None):
    return asyncio.run(operations.invoke(name, args, fds))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_plain_and_async_operations_are_invoked_alike(operations):
    assert run(operations, "book_add", {"title": "a", "pages": 3})["pages"] == 3
    assert run(operations, "book_wait", {"turns": 2}) == 2
    assert run(operations, "book_wait") == 1


def test_an_alias_reaches_the_operation(operations):
    assert run(operations, "add_book", {"title": "a", "pages": 3})["title"] == "a"


def test_names_with_and_without_aliases(operations):
    assert operations.names() == ["add_book", "book_add", "book_scan", "book_wait"]
    assert operations.names(aliases=False) == ["book_add", "book_scan", "book_wait"]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"title": "a"}, "book_add: .*missing required field `pages`"),
        ({"title": "a", "pages": "3"}, "book_add: pages: Expected `int`, got `str`"),
        ({"title": "a", "pages": True}, "book_add: pages: Expected `int`, got `bool`"),
        ({"title": "a", "pages": 3, "tags": ["x", 1]}, r"tags\[1\]: Expected `str`, got `int`"),
        ({"title": None, "pages": 3}, "title: Expected `str`, got `null`"),
        ({"title": "a", "pages": 3, "bogus": 1}, "unknown field `bogus`"),
        ({"title": "a", "pages": 3, "self": 1}, "unknown field `self`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(operations, args, reason):
    with pytest.raises(OperationError, match=reason) as refused:
        run(operations, "book_add", args)
    assert refused.value.code == -32602


def test_an_unknown_operation_is_refused(operations):
    for name in ("nosuch", "not_an_operation", "__init__"):
        with pytest.raises(OperationError, match=f"Method not found: {name}") as refused:
            run(operations, name)
        assert refused.value.code == -32601


def test_a_mutable_default_is_not_shared(operations):
    first = run(operations, "book_add", {"title": "a", "pages": 1})
    first["tags"].append("changed")
    assert run(operations, "book_add", {"title": "b", "pages": 1})["tags"] == []


def test_a_name_can_be_registered_once(operations):
    with pytest.raises(ValueError, match="registered twice"):
        operations.add(Shelf())


def test_parameters_are_described_without_the_descriptors(operations):
    described = operations.find("book_scan").parameters()
    assert described == [{"name": "keep", "type": "bool", "required": False, "default": False}]


def test_descriptors_that_nobody_took_are_closed(operations, pipe_fds):
    numbers = list(pipe_fds)
    assert run(operations, "book_scan", {}, pipe_fds) == 2
    assert not any(map(is_open, numbers))


def test_a_descriptor_that_was_taken_stays_open(operations, pipe_fds):
    other = pipe_fds[1]
    taken = run(operations, "book_scan", {"keep": True}, pipe_fds)
    assert is_open(taken)
    assert not is_open(other)
    os.close(taken)


@pytest.mark.parametrize(
    ("name", "args"), [("nosuch", {}), ("book_scan", {"bogus": 1}), ("book_wait", {})]
)
def test_descriptors_of_a_refused_operation_are_closed(operations, pipe_fds, name, args):
    numbers = list(pipe_fds)
    with pytest.raises(OperationError):
        run(operations, name, args, pipe_fds)
    assert not any(map(is_open, numbers))


def test_descriptors_never_come_from_the_wire(operations):
    with pytest.raises(OperationError, match="unknown field `fds`"):
        run(operations, "book_scan", {"fds": [0]})


@pytest.mark.parametrize("index", [1, -1])
def test_a_descriptor_that_did_not_come_is_named(index):
    with pytest.raises(OperationError, match=f"file descriptor {index} is missing: 1 came"):
        FileDescriptors([99]).take(index)


def test_a_descriptor_can_be_taken_once():
    fds = FileDescriptors([99])
    assert fds.take(0) == 99
    with pytest.raises(OperationError, match="taken already"):
        fds.take(0)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["title", "pages", "tags", "loan"]) | st.text(), json_like))
def test_whatever_arrives_is_bound_by_type_or_refused(args):
    operations = Operations()
    operations.add(Shelf())
    try:
        bound = operations.find("book_add").bind(args, None)
    except OperationError as error:
        assert error.code == -32602  # noqa: PT017 - either outcome is right
        return
    assert type(bound["title"]) is str
    assert type(bound["pages"]) is int
    assert all(type(tag) is str for tag in bound["tags"])


def test_a_negative_return_is_an_error_with_its_subject():
    assert check(3, "it") == 3
    with pytest.raises(FileNotFoundError, match="it"):
        check(-2, "it")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OperationError(-19, "gone"), -19, "gone"),
        (FileNotFoundError(2, "No such file", "/x"), -2, "No such file: /x"),
        (PermissionError(13, None), -13, "Permission denied"),
        (RuntimeError("bug"), -32603, "internal error: RuntimeError: bug"),
        (OSError("no errno"), -32603, "internal error: OSError: no errno"),
    ],
)
def test_exceptions_become_errors_with_a_code(error, code, message):
    told = to_operation_error(error)
    assert (told.code, told.message) == (code, message)


@given(json_like)
def test_any_error_member_of_a_reply_can_be_read(wire):
    error = OperationError.from_wire(wire)
    assert isinstance(error.code, int)
    assert isinstance(error.message, str)


def test_an_operation_may_take_any_argument() -> None:
    class Open:
        @operation
        def anything(self, known: int = 1, **others: object) -> dict[str, object]:
            return {"known": known, **others}

    table = Operations()
    table.add(Open())
    entry = table.find("anything")
    assert entry.method(**entry.bind({"a": [1], "known": 2}, None)) == {"known": 2, "a": [1]}
    with pytest.raises(OperationError, match="known"):
        entry.bind({"known": "x", "a": 1}, None)
    assert [one["name"] for one in entry.parameters()] == ["known"]


class Size(TypedDict, total=False):
    width: int | None
    height: int | None


def test_parameters_in_common_are_checked_and_absent_ones_left_out() -> None:
    class Frames:
        @operation
        def frame_set(self, name: str, **size: Unpack[Size]) -> tuple[str, Size]:
            return name, size

    table = Operations()
    table.add(Frames())
    assert run(table, "frame_set", {"name": "a", "width": 3}) == ("a", {"width": 3})
    assert run(table, "frame_set", {"name": "a", "width": None, "height": 0}) == (
        "a",
        {"height": 0},
    )
    for wrong in ({"width": "3"}, {"depth": 1}):
        with pytest.raises(OperationError, match=next(iter(wrong))) as caught:
            run(table, "frame_set", {"name": "a", **wrong})
        assert caught.value.code == INVALID_PARAMS
    described = {one["name"]: one["required"] for one in table.find("frame_set").parameters()}
    assert described == {"name": True, "width": False, "height": False}
