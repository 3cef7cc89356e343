"""A source cut into shards: which records are shard N, and how any worker reads just those."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.sources.config import SourceConfig
from pipeline.sources.open import open_reader
from pipeline.sources.reader import Piece
from pipeline.sources.rows import MalformedRow, SourceError, SourceRow

_SHARD_RECORDS = 10_000


@dataclass(frozen=True, slots=True)
class SourceShard:
    """The records of one shard, small enough to hand to any worker."""

    source: str
    index: int
    num_records: int
    """Rows and malformed records together, of those that are read."""
    pieces: tuple[Piece, ...]
    """Where they stand; more than one when the shard spans files."""


def plan_shards(config: SourceConfig, *, records_per_shard: int) -> Iterator[SourceShard]:
    """Yield the source's shards in order; what is in a shard depends on the input files alone.

    Every shard but the last has `records_per_shard` records, malformed ones included, so that one
    broken line moves no other. With `one_in` it has as many, the first of every so many records of
    the whole source. Parquet is planned from its footers; text is scanned once. Takes constant
    memory. Raises SourceError.
    """
    if records_per_shard < 1:
        raise ValueError(f"records_per_shard is {records_per_shard}; a shard has at least 1")
    reader = open_reader(config)
    size = records_per_shard * config.one_in
    index, num_seen, pieces = 0, 0, list[Piece]()
    for file in reader.files():
        for piece in reader.cut(file, size - num_seen, size):
            num_passed = -num_seen % config.one_in
            pieces.append(replace(piece, num_passed=num_passed, one_in=config.one_in))
            num_seen += piece.num_records
            if num_seen == size:
                yield _shard(config, index, pieces)
                index, num_seen, pieces = index + 1, 0, []
    if pieces:
        yield _shard(config, index, pieces)


def _shard(config: SourceConfig, index: int, pieces: list[Piece]) -> SourceShard:
    read = tuple(piece for piece in pieces if piece.num_rows)
    return SourceShard(config.name, index, sum(piece.num_rows for piece in read), read)


def read_shard(config: SourceConfig, shard: SourceShard) -> Iterator[SourceRow | MalformedRow]:
    """Yield exactly `shard.num_records` rows and malformed rows, in the source's order.

    Raises SourceError when the files are no longer what was planned. Safe to repeat.
    """
    reader = open_reader(config)
    for piece in shard.pieces:
        num_read = 0
        for row in reader.read(piece):
            yield row
            num_read += 1
        if num_read != piece.num_rows:
            raise SourceError(
                f"{piece.file}: {num_read} of {piece.num_rows} records found from record "
                f"{piece.first_record + 1}; the file changed since shard {shard.index} was planned"
            )


def read_source(config: SourceConfig) -> Iterator[SourceRow | MalformedRow]:
    """Yield every row and malformed row of the source, in order; of `one_in`, those it reads."""
    if config.one_in > 1:
        for shard in plan_shards(config, records_per_shard=_SHARD_RECORDS):
            yield from read_shard(config, shard)
        return
    reader = open_reader(config)
    for file in reader.files():
        yield from reader.read(Piece(file, first_record=0, num_records=sys.maxsize))
