"""Splits a stream of JSON texts that nothing separates.

Clients of JSON-RPC over a stream socket send one text after the other, pretty-printed, with or
without white space between them, and the kernel cuts the stream wherever it likes. Only the ends of
texts are found here, in one pass over each byte; whether a text is JSON is the decoder's business
(RFC 8259).
"""

import re
from collections.abc import Iterator

MAX_DEPTH = 64  # of nesting: far more than any request has, far less than hurts a recursive decoder

_NOT_SPACE = re.compile(rb"[^ \t\n\r]")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING_STOP = re.compile(rb'["\\]')
_BARE_STOP = re.compile(rb'[ \t\n\r"{}\[\],:]')
_OPENING = b"{["
_CLOSING = b"}]"
_QUOTE = ord('"')


class JsonStreamError(ValueError):
    """The stream cannot be split any further: what follows has no known beginning."""


class JsonSplitter:
    """Finds the texts in a stream that arrives in pieces; time is linear in the bytes fed.

    ``limit`` is the most bytes that one text may have.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []  # of the text that has not ended yet
        self._size = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the byte before was a backslash inside a string
        self._bare = False  # inside a number or a word, which only what follows ends

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each text that ends within ``data``; exhaust it before the next call.

        Raises JsonStreamError where a text is too large, too deep, or cannot begin.
        """
        start = place = 0
        while place < len(data):
            if not self._unfinished():
                found = _NOT_SPACE.search(data, place)
                if found is None:
                    return
                start = place = found.start()
            place, ended = self._scan(data, place)
            if self._size + place - start > self._limit:
                raise JsonStreamError(f"a text of more than {self._limit} bytes")
            if ended:
                yield self._take(data[start:place])
                start = place
        if self._unfinished():
            self._parts.append(data[start:])
            self._size += len(data) - start

    def finish(self) -> Iterator[bytes]:
        """Yield the number or word that the end of the stream ends, if there is one.

        Raises JsonStreamError if the stream ends inside a text.
        """
        if self._bare:
            yield self._take(b"")
        elif self._unfinished():
            raise JsonStreamError("the stream ends inside a text")

    def _unfinished(self) -> bool:
        return self._bare or self._in_string or self._depth > 0

    def _take(self, last: bytes) -> bytes:
        text = b"".join((*self._parts, last))
        self._parts.clear()
        self._size = 0
        self._bare = False
        return text

    def _scan(self, data: bytes, place: int) -> tuple[int, bool]:
        """Advance by one token; return where it ends, and whether a text ends there."""
        if self._in_string:
            return self._scan_string(data, place)
        if self._bare:
            return self._scan_bare(data, place)
        if self._depth == 0:
            return self._begin(data, place)
        found = _STRUCTURE.search(data, place)
        if found is None:
            return len(data), False
        return found.end(), self._structure(data[found.start()])

    def _scan_string(self, data: bytes, place: int) -> tuple[int, bool]:
        if self._escaped:
            self._escaped = False
            return place + 1, False
        found = _STRING_STOP.search(data, place)
        if found is None:
            return len(data), False
        if data[found.start()] == _QUOTE:
            self._in_string = False
        else:
            self._escaped = True
        return found.end(), not self._unfinished()

    def _scan_bare(self, data: bytes, place: int) -> tuple[int, bool]:
        found = _BARE_STOP.search(data, place)
        return (len(data), False) if found is None else (found.start(), True)

    def _begin(self, data: bytes, place: int) -> tuple[int, bool]:
        byte = data[place]
        if byte in b"}],:":
            raise JsonStreamError(f"a text cannot begin with {chr(byte)!r}")
        if byte in _OPENING or byte == _QUOTE:
            return place + 1, self._structure(byte)
        self._bare = True
        return self._scan_bare(data, place)

    def _structure(self, byte: int) -> bool:
        """Account for a quote or a bracket outside strings; return whether it ends the text."""
        if byte == _QUOTE:
            self._in_string = True
        elif byte in _CLOSING:
            self._depth -= 1
            return self._depth == 0
        else:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise JsonStreamError(f"nested deeper than {MAX_DEPTH} levels")
        return False
