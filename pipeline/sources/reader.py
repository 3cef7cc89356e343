"""What the formats share: files found and opened, pieces of them, cells made into rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from pipeline.sources.rows import MalformedRow, SourceRow

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive records of one file."""

    file: str
    first_record: int
    """0-based within the file."""
    num_records: int
    byte_offset: int = 0
    """Where the first record starts, in a text file once it is decompressed; else 0."""
    first_line: int = 1
    """The line number of the first record, in a text file; else 1."""
    num_passed: int = 0
    """Records at the beginning that are not read."""
    one_in: int = 1
    """Of the others the first of every so many is read."""

    @property
    def num_rows(self) -> int:
        """How many records are read."""
        return len(range(self.num_passed, self.num_records, self.one_in))


class Reader(Protocol):
    """One format: lists its files, cuts each into pieces, reads a piece."""

    def files(self) -> list[str]:
        """Return the files in the order that their records are numbered in."""
        ...

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Yield all of a file's records as one piece of up to `first`, then pieces of `then`."""
        ...

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield one row or malformed row for each record that is read, fewer if the file ends."""
        ...


def chosen(records: Iterator[Record], piece: Piece) -> Iterator[Record]:
    """Yield what is read of the records that begin where a piece does."""
    return islice(records, piece.num_passed, piece.num_records, piece.one_in)


def cut_by_count(file: str, num_records: int, first: int, then: int) -> Iterator[Piece]:
    """Yield pieces of a file whose number of records is all that is needed to find them again."""
    start, size = 0, first
    while start < num_records:
        yield Piece(file, start, min(size, num_records - start))
        start, size = start + size, then
