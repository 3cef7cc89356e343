"""Arrays inside one big JSON document, an item at a time, in memory bounded by the largest item."""

import codecs
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.sources.files import opened
from pipeline.sources.rows import SourceError

_SPACE = re.compile(r"[ \t\r\n]*")
_READ_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class JsonItem:
    """One item of an array, and the line it begins at."""

    line: int
    value: object


def items_of(file: str, key: str | None, *, max_item_bytes: int) -> Generator[JsonItem, None, None]:
    """Yield the items of the array under a top-level key, or of the top-level array for None.

    What stands before it is skipped as it is read. Raises SourceError for a document that is no
    JSON, has no such array, or holds an item over `max_item_bytes`.
    """
    with opened(file) as stream:
        cursor = _Cursor(file, stream, max_item_bytes)
        if key is not None:
            cursor.enter(key)
        yield from cursor.items()


class _Cursor:
    """A place in a document; reads on as values need it, forgets what lies behind."""

    def __init__(self, file: str, stream: BinaryIO, max_item_bytes: int) -> None:
        self._file = file
        self._stream = stream
        self._max_chars = max_item_bytes
        # A broken byte becomes a lone surrogate, which the cells are checked for.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._at, self._line, self._is_ended = "", 0, 1, False

    def enter(self, key: str) -> None:
        """Move to the value under a key of the object that begins here."""
        seen = []
        self._expect("{")
        while self._peek() != "}":
            name = self.value()
            self._expect(":")
            if name == key:
                return
            seen.append(repr(name)[:40])
            self._pass_value()
            if self._peek() == ",":
                self._expect(",")
        raise SourceError(
            f"{self._file}: no {key!r} at the top level; it has {', '.join(seen) or 'nothing'}"
        )

    def items(self) -> Iterator[JsonItem]:
        """Yield the items of the array that begins here."""
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        while True:
            line = self._line
            yield JsonItem(line, self._value_here())
            if self._peek() == "]":
                self._expect("]")
                return
            self._expect(",")
            self._peek()

    def value(self) -> object:
        """Return the value that comes next."""
        self._peek()
        return self._value_here()

    def _value_here(self) -> object:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_ended:  # else a number could go on
                    self._move_to(end)
                    return value
            except RecursionError as error:
                raise self._broken("values nested too deep") from error
            except ValueError as error:
                if self._is_ended:
                    raise self._broken(str(error)[:200]) from error
            num_held = len(self._text) - self._at
            if num_held > self._max_chars:
                raise self._broken(f"no value ends within {self._max_chars} characters")
            self._read_on(max(num_held, _READ_BYTES))  # doubling keeps the retries cheap

    def _pass_value(self) -> None:
        if self._peek() != "[":
            self.value()
            return
        for _ in self.items():
            pass

    def _peek(self) -> str:
        """Return the next character that is no space, and stand at it."""
        if self._at < len(self._text) and (char := self._text[self._at]) > " ":
            return char
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # it matches nothing at least
            self._move_to(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_ended:
                raise self._broken("the document ends early")
            self._read_on(_READ_BYTES)

    def _expect(self, char: str) -> None:
        if self._peek() != char:
            raise self._broken(f"{self._text[self._at]!r} where {char!r} should be")
        self._move_to(self._at + 1)

    def _move_to(self, at: int) -> None:
        self._line += self._text.count("\n", self._at, at)
        self._at = at

    def _read_on(self, num_bytes: int) -> None:
        block = self._stream.read(num_bytes)
        self._is_ended = not block
        text = self._decoder.decode(block, final=self._is_ended)
        self._text, self._at = self._text[self._at :] + text, 0

    def _broken(self, why: str) -> SourceError:
        return SourceError(f"{self._file}, line {self._line}: not readable as JSON: {why}")
