"""The splitter finds every text of a stream, wherever the stream is cut."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.jsonstream import MAX_DEPTH, JsonSplitter, JsonStreamError

LIMIT = 1 << 20

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
encoders = st.sampled_from(
    [
        lambda value: json.dumps(value),
        lambda value: json.dumps(value, indent=2),
        lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    ]
)


def split(pieces: list[bytes], limit: int = LIMIT) -> list[bytes]:
    splitter = JsonSplitter(limit)
    texts = [text for piece in pieces for text in splitter.feed(piece)]
    return texts + list(splitter.finish())


@given(
    st.lists(st.tuples(values, encoders), max_size=5),
    st.sampled_from([" ", "\n", "\r\n\t"]),
    st.data(),
)
def test_any_cut_of_any_sequence_gives_the_same_values(sequence, separator, data):
    stream = separator.join(encode(value) for value, encode in sequence)
    raw = stream.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    texts = [json.loads(text.decode("utf-8", "surrogatepass")) for text in split(pieces)]
    assert texts == [value for value, _ in sequence]


@given(st.lists(st.dictionaries(st.text(), scalars, max_size=3), max_size=5))
def test_objects_need_no_separator_even_one_byte_at_a_time(objects):
    raw = "".join(json.dumps(value) for value in objects).encode()
    texts = split([raw[i : i + 1] for i in range(len(raw))])
    assert [json.loads(text) for text in texts] == objects


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_garbage_is_split_or_refused_but_nothing_else(pieces):
    try:
        texts = split(pieces)
    except JsonStreamError:
        return
    space = b" \t\n\r"
    assert b"".join(texts).translate(None, space) == b"".join(pieces).translate(None, space)


def test_brackets_and_quotes_inside_strings_do_not_count():
    texts = [b'{"a":"}]{\\"["}', b'["\\\\"]', b'"]"']
    assert split([b"".join(texts)]) == texts


@pytest.mark.parametrize("stray", [b"]", b"}", b",", b":"])
def test_what_cannot_begin_a_text_is_refused_after_the_texts_before_it(stray):
    splitter = JsonSplitter(LIMIT)
    feed = splitter.feed(b"{}" + stray + b"{}")
    assert next(feed) == b"{}"
    with pytest.raises(JsonStreamError, match="cannot begin"):
        next(feed)


def test_a_text_of_the_limit_passes_and_one_byte_more_does_not():
    assert split([b'"12345678"'], limit=10) == [b'"12345678"']
    with pytest.raises(JsonStreamError, match="more than 10 bytes"):
        split([b'"1234', b"56789", b'"'], limit=10)


def test_an_endless_text_is_refused_before_it_ends():
    splitter = JsonSplitter(10)
    list(splitter.feed(b"[1, 2, 3"))
    with pytest.raises(JsonStreamError):
        list(splitter.feed(b", 4, 5"))


def test_white_space_between_texts_is_not_limited():
    assert split([b" " * 100, b"\n" * 100, b"{}"], limit=10) == [b"{}"]


def test_depth_is_bounded():
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert split([deepest]) == [deepest]
    with pytest.raises(JsonStreamError, match="deeper"):
        split([b"[" + deepest + b"]"])


def test_a_stream_that_ends_inside_a_text_says_so():
    with pytest.raises(JsonStreamError, match="ends inside"):
        split([b'{"a": '])


def test_time_is_linear_in_the_pieces_of_one_text():
    def seconds(count: int) -> float:
        splitter = JsonSplitter(1 << 30)
        began = time.process_time()
        assert list(splitter.feed(b'["')) == []
        for _ in range(count):
            assert list(splitter.feed(b"xxxxxxxx")) == []
        assert len(list(splitter.feed(b'"]'))) == 1
        return time.process_time() - began

    small, large = min(seconds(4000) for _ in range(3)), min(seconds(64000) for _ in range(3))
    # 16 times the pieces: a quadratic splitter needs 256 times the time.
    assert large < small * 64
