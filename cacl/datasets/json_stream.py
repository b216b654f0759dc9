"""A JSON file that is too large to load, an element at a time and each with the bytes where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from cacl.errors import InputError, shown

CHUNK = 1 << 20
"""Bytes that are read at once."""

_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_WORD = re.compile(r"[ \t\n\r,:\]}]")
_LONGEST_WORD = 16
"""No more letters than this belong together, but for those of strings and numbers: ``-Infinity``, two ``\\uXXXX``."""


class Element(NamedTuple):
    """A value and the bytes of the file that it was decoded from."""

    value: Any
    start: int
    length: int


class JSONStream:
    """Goes through a file once, with no more of it in memory than a chunk and the element that stands there.

    The bytes are taken as Latin-1 and not as UTF-8, so that a place in the text is a place in the file. What has a
    meaning in JSON is ASCII, which both have in common; an element with other letters is decoded once more.

    Args:
        file: the file, open at its beginning in binary mode.
        path: for messages.

    Raises:
        ValueError: from every method, if the file is not JSON from where it stands on; says the byte.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.path, self._file = path, file
        self._chunk = max(CHUNK, 3)
        self._text = file.read(self._chunk).decode("latin-1")
        self._start = 0  # the byte at which the text starts
        self._at = 3 if self._text.startswith("\xef\xbb\xbf") else 0  # a byte order mark

    def members(self) -> Iterator[str]:
        """The keys of the object that stands here. After each, its value has to be read by another method."""
        self._take("{")
        closed = self._skip("}")
        while not closed:
            if self._peek() != '"':
                raise self._wrong("expected a key in double quotes")
            key = self.element().value
            self._take(":")
            yield key
            closed = self._skip("}")
            if not closed:
                self._take(",")

    def elements(self) -> Iterator[Element]:
        """The elements of the array that stands here."""
        self._take("[")
        closed = self._skip("]")
        while not closed:
            yield self.element()
            closed = self._skip("]")
            if not closed:
                self._take(",")

    def element(self) -> Element:
        """The value that stands here, whatever it is."""
        if self._peek() not in '"{[':  # a number may go on where the text ends
            while not _AFTER_WORD.search(self._text, self._at) and self._more():
                pass
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or len(self._text) - error.pos < _LONGEST_WORD
                if not (cut_off and self._more()):
                    raise self._wrong(error.msg[0].lower() + error.msg[1:], error.pos) from None
            except (RecursionError, ValueError):
                raise self._wrong("nested too deep, or a number of thousands of digits") from None
        start, text = self._start + self._at, self._text[self._at : end]
        if not text.isascii():
            try:
                value = json.loads(text.encode("latin-1").decode())
            except UnicodeDecodeError as error:
                raise self._wrong("expected UTF-8", self._at + error.start) from None
        self._at = end
        return Element(value, start, len(text))

    def skip(self) -> None:
        """Leave out the value that stands here; an array of any length takes no memory."""
        if self._peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.element()

    def end(self) -> None:
        """Nothing stands here any more."""
        if self._peek():
            raise self._wrong("expected the end of the file")

    def _peek(self) -> str:
        """The next letter that is no space, or nothing at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _skip(self, letter: str) -> bool:
        found = self._peek() == letter
        self._at += found
        return found

    def _take(self, letter: str) -> None:
        if not self._skip(letter):
            raise self._wrong(f"expected {letter!r}")

    def _more(self) -> bool:
        """Read on, and forget what lies behind; False at the end of the file."""
        rest = len(self._text) - self._at
        more = self._file.read(max(self._chunk, rest))  # twice as much each time, while one element does not end
        if more:
            self._text = self._text[self._at :] + more.decode("latin-1")
            self._start, self._at = self._start + self._at, 0
        return bool(more)

    def _wrong(self, what: str, at: int | None = None) -> InputError:
        byte = self._start + (self._at if at is None else at)
        return InputError(f"{shown(self.path)}: not JSON: {what} at byte {byte}")


_DECODER = json.JSONDecoder()
