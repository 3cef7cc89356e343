"""Tables as text: CSV, TSV and JSONL, record by record, each known by its offset."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from pipeline.sources.cells import row_of_cells
from pipeline.sources.columns import check_columns, column_hint
from pipeline.sources.config import SourceConfig, TableFormat
from pipeline.sources.files import Line, lines, opened
from pipeline.sources.reader import Piece, chosen
from pipeline.sources.rows import MalformedReason, MalformedRow, RecordError, SourceRow

_MAX_LINES_PER_RECORD = 100  # an unclosed quote must not swallow the rest of a file
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in the file, or the reason why it cannot be taken apart."""

    line: int
    byte_offset: int
    cells: Mapping[str, object] | RecordError


class Parser(Protocol):
    """Takes the lines of one file apart into records."""

    def records(self, stream_lines: Iterator[Line]) -> Iterator[Record]:
        """Yield the records of lines that begin at a record; blank lines are none."""
        ...


class TextTableReader:
    """Reads CSV, TSV and JSONL; a reader may start at any record whose offset is known."""

    def __init__(self, config: SourceConfig, files: Sequence[str], kind: TableFormat) -> None:
        """All files are of one kind."""
        self._config = config
        self._files = list(files)
        self._kind = kind

    def files(self) -> list[str]:
        """Return the files in reading order."""
        return self._files

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Scan the file once and yield its pieces."""
        start: Record | None = None
        first_record, num_records, size = 0, 0, first
        for record in self._records(file, 0, 1):
            start = start or record
            num_records += 1
            if num_records == size:
                yield Piece(file, first_record, size, start.byte_offset, start.line)
                first_record, num_records, size, start = first_record + size, 0, then, None
        if start is not None:
            yield Piece(file, first_record, num_records, start.byte_offset, start.line)

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield the rows of a piece, starting at its offset."""
        records = self._records(piece.file, piece.byte_offset, piece.first_line)
        for record in chosen(records, piece):
            yield self._row(piece.file, record)

    def _row(self, file: str, record: Record) -> SourceRow | MalformedRow:
        config = self._config
        try:
            if isinstance(record.cells, RecordError):
                raise record.cells
            if config.url_column not in record.cells:  # only JSONL gets here; tables are checked
                hint = column_hint(config.url_column, list(record.cells))
                raise RecordError(MalformedReason.MISSING_URL, f"no {config.url_column!r}{hint}")
            caption = config.caption_column
            return row_of_cells(
                config,
                record.cells.get(config.url_column),
                None if caption is None else record.cells.get(caption),
                {name: record.cells.get(name) for name in config.extra_columns},
            )
        except RecordError as error:
            return MalformedRow(
                source=config.name,
                file=file,
                line=record.line,
                reason=error.reason,
                detail=error.detail,
            )

    def _records(self, file: str, byte_offset: int, first_line: int) -> Iterator[Record]:
        parser = self._parser(file)
        with opened(file, byte_offset) as stream:
            found = self._lines(stream, byte_offset, first_line)
            if byte_offset == 0 and isinstance(parser, _DelimitedParser) and parser.has_header:
                parser.skip_header(found)
            yield from parser.records(found)

    def _lines(self, stream: BinaryIO, byte_offset: int, first_line: int) -> Iterator[Line]:
        for line in lines(
            stream,
            max_bytes=self._config.max_record_bytes,
            byte_offset=byte_offset,
            first_number=first_line,
        ):
            if line.byte_offset == 0 and line.data is not None and line.data.startswith(_BOM):
                yield Line(line.number, 0, line.data.removeprefix(_BOM))
            else:
                yield line

    def _parser(self, file: str) -> Parser:
        if self._kind is TableFormat.JSONL:
            return _JsonParser()
        is_quoted = self._config.is_quoted
        delimited = _DelimitedParser(
            delimiter="," if self._kind is TableFormat.CSV else "\t",
            is_quoted=self._kind is TableFormat.CSV if is_quoted is None else is_quoted,
            max_bytes=self._config.max_record_bytes,
        )
        if self._config.column_names is not None:
            delimited.names = self._config.column_names
            return delimited
        with opened(file) as stream:
            delimited.read_header(self._lines(stream, 0, 1))
        check_columns(self._config, file, delimited.names)
        return delimited


class _JsonParser:
    """One JSON object a line."""

    def records(self, stream_lines: Iterator[Line]) -> Iterator[Record]:
        for line in stream_lines:
            if line.data is None or line.data.strip():
                yield Record(line.number, line.byte_offset, _json_cells(line))


def _json_cells(line: Line) -> Mapping[str, object] | RecordError:
    if line.data is None:
        return RecordError(MalformedReason.RECORD_TOO_LONG, "the line is too long")
    try:
        cells = json.loads(line.data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return RecordError(MalformedReason.BROKEN_RECORD, f"not JSON: {str(error)[:200]}")
    if not isinstance(cells, dict):
        return RecordError(MalformedReason.BROKEN_RECORD, "not a JSON object")
    return cells


class _RecordLines:
    """Hands lines to csv.reader, and remembers what it took for the record in hand."""

    def __init__(self, stream_lines: Iterator[Line], max_bytes: int) -> None:
        self._stream_lines = stream_lines
        self._max_bytes = max_bytes
        self._returned: list[Line] = []  # given back after a record that did not end
        self._is_at_end = False
        self.taken: list[Line] = []

    def __iter__(self) -> "_RecordLines":
        return self

    def __next__(self) -> str:
        num_bytes = sum(len(line.data or b"") for line in self.taken)
        if len(self.taken) == _MAX_LINES_PER_RECORD or num_bytes > self._max_bytes:
            raise RecordError(MalformedReason.BROKEN_RECORD, "a quote is not closed")
        line = self._returned.pop() if self._returned else next(self._stream_lines, None)
        if line is None:
            self._is_at_end = True
            raise StopIteration
        self.taken.append(line)
        if line.data is None:
            raise RecordError(MalformedReason.RECORD_TOO_LONG, "the line is too long")
        return line.data.decode("utf-8", "surrogateescape") + "\n"

    def begin_record(self) -> bool:
        """Forget the last record; tell whether there may be another."""
        self.taken = []
        return not self._is_at_end

    def end_record(self) -> None:
        """Raise RecordError when the file ended inside the record."""
        if self._is_at_end and self.taken:
            raise RecordError(MalformedReason.BROKEN_RECORD, "a quote is not closed")

    def give_back_all_but_first(self) -> None:
        self._returned += reversed(self.taken[1:])
        self._is_at_end = False


class _DelimitedParser:
    """CSV and TSV; a record that cannot be read costs its first line and no other."""

    def __init__(self, *, delimiter: str, is_quoted: bool, max_bytes: int) -> None:
        self._delimiter = delimiter
        self._is_quoted = is_quoted
        self._max_bytes = max_bytes
        self.names: Sequence[str] = ()
        self.has_header = False

    def read_header(self, stream_lines: Iterator[Line]) -> None:
        self.has_header = True
        first = next(self._cells(stream_lines), None)
        if first is not None and not isinstance(first[1], RecordError):
            self.names = [name.strip() for name in first[1]]

    def skip_header(self, stream_lines: Iterator[Line]) -> None:
        next(self._cells(stream_lines), None)

    def records(self, stream_lines: Iterator[Line]) -> Iterator[Record]:
        for line, cells in self._cells(stream_lines):
            named = cells if isinstance(cells, RecordError) else self._named(cells)
            yield Record(line.number, line.byte_offset, named)

    def _cells(
        self, stream_lines: Iterator[Line]
    ) -> Iterator[tuple[Line, list[str] | RecordError]]:
        return (self._quoted if self._is_quoted else self._unquoted)(stream_lines)

    def _named(self, cells: Sequence[str]) -> Mapping[str, object] | RecordError:
        if len(cells) != len(self.names):
            is_short = len(cells) < len(self.names)
            reason = (
                MalformedReason.TOO_FEW_COLUMNS if is_short else MalformedReason.TOO_MANY_COLUMNS
            )
            return RecordError(reason, f"{len(cells)} columns, not {len(self.names)}")
        return dict(zip(self.names, cells, strict=True))

    def _unquoted(
        self, stream_lines: Iterator[Line]
    ) -> Iterator[tuple[Line, list[str] | RecordError]]:
        for line in stream_lines:
            if line.data is None:
                yield line, RecordError(MalformedReason.RECORD_TOO_LONG, "the line is too long")
            elif line.data:
                text = line.data.decode("utf-8", "surrogateescape")
                yield line, text.split(self._delimiter)

    def _quoted(
        self, stream_lines: Iterator[Line]
    ) -> Iterator[tuple[Line, list[str] | RecordError]]:
        source = _RecordLines(stream_lines, self._max_bytes)
        while source.begin_record():
            cells: list[str] | RecordError
            try:
                cells = next(csv.reader(source, delimiter=self._delimiter), [])
                source.end_record()
            except csv.Error as error:
                cells = RecordError(MalformedReason.BROKEN_RECORD, str(error)[:200])
            except RecordError as error:
                cells = error
            if isinstance(cells, RecordError):
                source.give_back_all_but_first()
            if cells:
                yield source.taken[0], cells
