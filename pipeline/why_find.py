"""Where a key is in a corpus: its shard is told by the key itself, its row by Parquet's statistics.

No more than footers, one column of one row group and that row group are read of a shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus import Corpus
from pipeline.layout import STAGES
from pipeline.record import ShardRecord
from pipeline.sample import ShardError

_INDEX_DIGITS = 5  # of a key, at least; see `pipeline.download.key_of`


class KeyNotFoundError(LookupError):
    """No row has the key; the message says which keys there are."""


@dataclass(frozen=True, slots=True)
class Found:
    """A shard that has the key, and its rows of it; why there are none if it cannot be read."""

    record: ShardRecord
    rows: tuple[dict[str, Any], ...]
    problem: str = ""


def find(corpus: Corpus, key: str, source: str) -> dict[str, Found]:
    """Return by stage the shard of a source that has the key; empty where none has it.

    A shard that should have it by its number and cannot be read is returned with the problem.
    """
    for indexes in (_indexes_of(key), None):
        for stage in STAGES:
            found = _search(corpus, stage, source, key, indexes)
            if found is not None:
                return _beside(corpus, found, key)
    return {}


def describe_keys(corpus: Corpus, source: str) -> str:
    """Return which keys a source has, for a message about one that it has not."""
    for stage in STAGES:
        records = corpus.shards(stage, source)
        bounds = [each for record in records for each in _bounds(corpus, record)]
        if bounds:
            lowest, highest = min(low for low, _ in bounds), max(high for _, high in bounds)
            return (
                f"{source} has keys {lowest} to {highest} in {len(records):,} {stage} shards, "
                f"{records[0].index} to {records[-1].index}"
            )
    return f"{source} has no shard yet"


def _indexes_of(key: str) -> list[int]:
    """Return the shards that may have the key by its digits: shard number, then row number."""
    if not (key.isascii() and key.isdecimal()):
        return []
    indexes = []
    for num_digits in range(len(key) - _INDEX_DIGITS + 1):
        index = key[: len(key) - num_digits]
        if len(index) == _INDEX_DIGITS or not index.startswith("0"):
            indexes.append(int(index))
    return indexes[::-1]  # the shortest number first: few corpora have 100,000 shards


def _search(
    corpus: Corpus, stage: str, source: str, key: str, indexes: list[int] | None
) -> Found | None:
    """Return the first shard among these, or among all, that has the key or cannot be read."""
    if indexes is None:
        records: Iterator[ShardRecord | None] = iter(corpus.shards(stage, source))
    else:
        records = (corpus.record(stage, source, index) for index in indexes)
    unreadable = None
    for record in records:
        if record is None:
            continue
        found = _look(corpus, record, key)
        if found.rows:
            return found
        if found.problem and indexes is not None:
            unreadable = unreadable or found
    return unreadable


def _beside(corpus: Corpus, found: Found, key: str) -> dict[str, Found]:
    """Return what the shards of the same number have of the key, by stage."""
    beside = {}
    for stage in STAGES:
        if stage == found.record.stage:
            beside[stage] = found
            continue
        record = corpus.record(stage, found.record.source, found.record.index)
        if record is not None:
            beside[stage] = _look(corpus, record, key)
    return beside


def _look(corpus: Corpus, record: ShardRecord, key: str) -> Found:
    try:
        with corpus.open(record, "parquet") as stream, pq.ParquetFile(stream) as file:
            return Found(record, tuple(_rows(file, key)))
    except (ShardError, OSError, KeyError, pa.ArrowException) as error:
        return Found(record, (), str(error))


def _rows(file: pq.ParquetFile, key: str) -> Iterator[dict[str, Any]]:
    for number, (low, high) in enumerate(_statistics(file)):
        if low is not None and high is not None and not low <= key <= high:
            continue
        keys = file.read_row_group(number, columns=["key"])["key"]
        hits = np.flatnonzero(pc.equal(keys, key).to_numpy())
        if len(hits):
            yield from file.read_row_group(number).take(hits).to_pylist()


def _statistics(file: pq.ParquetFile) -> Iterator[tuple[str | None, str | None]]:
    place = file.schema_arrow.names.index("key")
    for number in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(number).column(place).statistics
        has_bounds = found is not None and found.has_min_max
        yield (found.min, found.max) if has_bounds else (None, None)


def _bounds(corpus: Corpus, record: ShardRecord) -> list[tuple[str, str]]:
    try:
        with corpus.open(record, "parquet") as stream, pq.ParquetFile(stream) as file:
            return [(low, high) for low, high in _statistics(file) if low and high]
    except (ShardError, OSError, ValueError, pa.ArrowException):
        return []
