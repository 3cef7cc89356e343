"""A source cut into shards: which records are shard N, and how any worker reads just those."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.sources.config import SourceConfig
from pipeline.sources.open import open_reader
from pipeline.sources.reader import Piece
from pipeline.sources.rows import MalformedRow, SourceError, SourceRow


@dataclass(frozen=True, slots=True)
class SourceShard:
    """The records of one shard, small enough to hand to any worker."""

    source: str
    index: int
    num_records: int
    """Rows and malformed records together."""
    pieces: tuple[Piece, ...]
    """Where they stand; more than one when the shard spans files."""


def plan_shards(config: SourceConfig, *, records_per_shard: int) -> Iterator[SourceShard]:
    """Yield the source's shards in order; what is in a shard depends on the input files alone.

    Every shard but the last has `records_per_shard` records, malformed ones included, so that one
    broken line moves no other. Parquet is planned from its footers; text is scanned once. Takes
    constant memory. Raises SourceError.
    """
    if records_per_shard < 1:
        raise ValueError(f"records_per_shard is {records_per_shard}; a shard has at least 1")
    reader = open_reader(config)
    index, num_records, pieces = 0, 0, list[Piece]()
    for file in reader.files():
        for piece in reader.cut(file, records_per_shard - num_records, records_per_shard):
            pieces.append(piece)
            num_records += piece.num_records
            if num_records == records_per_shard:
                yield SourceShard(config.name, index, num_records, tuple(pieces))
                index, num_records, pieces = index + 1, 0, []
    if pieces:
        yield SourceShard(config.name, index, num_records, tuple(pieces))


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
        if num_read != piece.num_records:
            raise SourceError(
                f"{piece.file}: {num_read} of {piece.num_records} records found from record "
                f"{piece.first_record + 1}; the file changed since shard {shard.index} was planned"
            )


def read_source(config: SourceConfig) -> Iterator[SourceRow | MalformedRow]:
    """Yield every row and malformed row of the source, in order."""
    reader = open_reader(config)
    for file in reader.files():
        yield from reader.read(Piece(file, first_record=0, num_records=sys.maxsize))
