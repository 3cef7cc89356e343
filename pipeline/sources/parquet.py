"""Tables as Parquet: counted from the footer, read by row group, text left unchecked as bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from pipeline.sources.cells import row_of_cells
from pipeline.sources.columns import check_columns, wanted_columns
from pipeline.sources.config import SourceConfig
from pipeline.sources.files import BLOCK_BYTES
from pipeline.sources.reader import Piece, cut_by_count
from pipeline.sources.rows import MalformedRow, RecordError, SourceError, SourceRow

_ROWS_PER_BATCH = 512  # small, so that a batch of absurdly long cells still fits


class ParquetReader:
    """Reads Parquet files; a piece costs the row groups it touches, not the file."""

    def __init__(self, config: SourceConfig, files: Sequence[str]) -> None:
        """Opens nothing yet."""
        self._config = config
        self._files = list(files)

    def files(self) -> list[str]:
        """Return the files in reading order."""
        return self._files

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Yield the file's pieces by the row count in its footer."""
        with _opened(file) as table:
            self._check_schema(file, table.schema_arrow)
            num_rows = table.metadata.num_rows
        yield from cut_by_count(file, num_rows, first, then)

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield the rows of a piece; row groups before it are not read."""
        columns = list(dict.fromkeys(wanted_columns(self._config)))
        with _opened(piece.file) as table:
            self._check_schema(piece.file, table.schema_arrow)
            wanted_rows = range(
                piece.first_record + piece.num_passed,
                piece.first_record + piece.num_records,
                piece.one_in,
            )
            groups, num_skipped = _groups_from(table, wanted_rows.start)
            batches = table.iter_batches(
                _ROWS_PER_BATCH, row_groups=groups, columns=columns, use_threads=False
            )
            number = wanted_rows.start - num_skipped
            for batch in batches:
                chosen = _part(wanted_rows, number, number + batch.num_rows)
                if chosen:
                    yield from self._rows(piece.file, chosen, _taken(batch, chosen, number))
                number += batch.num_rows
                if number >= wanted_rows.stop:
                    return

    def _rows(
        self, file: str, numbers: range, batch: pa.RecordBatch
    ) -> Iterator[SourceRow | MalformedRow]:
        config = self._config
        columns = {name: _values(batch.column(name)) for name in batch.schema.names}
        for at, number in enumerate(numbers):
            caption = config.caption_column
            try:
                yield row_of_cells(
                    config,
                    columns[config.url_column][at],
                    None if caption is None else columns[caption][at],
                    {name: columns[name][at] for name in config.extra_columns},
                )
            except RecordError as error:
                yield MalformedRow(
                    source=config.name,
                    file=file,
                    line=number + 1,
                    reason=error.reason,
                    detail=error.detail,
                )

    def _check_schema(self, file: str, schema: pa.Schema) -> None:
        config = self._config
        check_columns(config, file, schema.names)
        _check_type(file, schema, config.url_column, may_be_list=False)
        if config.caption_column is not None:
            _check_type(file, schema, config.caption_column, may_be_list=True)
        for name in config.extra_columns:
            if pat.is_nested(schema.field(name).type):
                raise SourceError(
                    f"{file}: column {name!r} is {schema.field(name).type}; an extra column "
                    "holds one value per row"
                )


@contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    try:
        with fsspec.open(file, "rb") as stream:
            yield pq.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file}: no readable Parquet ({str(error)[:300]})") from error


def _groups_from(table: pq.ParquetFile, first_record: int) -> tuple[list[int], int]:
    """Return the row groups from the one with the record on, and how far into it the record is."""
    start = 0
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        if first_record < start + num_rows:
            return list(range(group, table.num_row_groups)), first_record - start
        start += num_rows
    return [], 0


def _part(numbers: range, start: int, stop: int) -> range:
    """Return those of the numbers that lie in [start, stop)."""
    first, end = (max(0, -((numbers.start - at) // numbers.step)) for at in (start, stop))
    return numbers[first:end]


def _taken(batch: pa.RecordBatch, chosen: range, first: int) -> pa.RecordBatch:
    """Return the chosen rows of a batch that begins with row `first`."""
    if chosen.step == 1:
        return batch.slice(chosen.start - first, len(chosen))
    return batch.take(pa.array([number - first for number in chosen]))


def _check_type(file: str, schema: pa.Schema, name: str, *, may_be_list: bool) -> None:
    kind = _plain_type(schema.field(name).type)
    if may_be_list and _is_list(kind):
        kind = _plain_type(kind.value_type)
    if not (
        _is_text(kind) or pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_null(kind)
    ):
        raise SourceError(f"{file}: column {name!r} is {schema.field(name).type}, not text")


def _values(column: pa.Array) -> list[object]:
    """Return the cells; text as bytes, which pyarrow does not check and Python may not decode."""
    if pat.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif _is_list(column.type) and _is_text(column.type.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    values: list[object] = column.to_pylist()
    return values


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pat.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pat.is_list(kind) or pat.is_large_list(kind))
