"""What the formats share: files found and opened, pieces of them, cells made into rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.sources.rows import MalformedRow, SourceRow


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


class Reader(Protocol):
    """One format: lists its files, cuts each into pieces, reads a piece."""

    def files(self) -> list[str]:
        """Return the files in the order that their records are numbered in."""
        ...

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Yield all of a file's records as one piece of up to `first`, then pieces of `then`."""
        ...

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield one row or malformed row for each record of the piece, fewer if the file ends."""
        ...


def cut_by_count(file: str, num_records: int, first: int, then: int) -> Iterator[Piece]:
    """Yield pieces of a file whose number of records is all that is needed to find them again."""
    start, size = 0, first
    while start < num_records:
        yield Piece(file, start, min(size, num_records - start))
        start, size = start + size, then
