"""Ledgers: one Parquet row for every row that went in, with what became of it and why.

The same rows give the same bytes (for one version of pyarrow), in memory for one row group.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.record import Counts
from pipeline.sample import Verdict

ROWS_PER_GROUP = 10_000
BASE_FIELDS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("url", pa.string()),
    pa.field("verdict", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),  # empty when kept
)


def ledger_schema(extra: Sequence[pa.Field] = ()) -> pa.Schema:
    """Return the schema of a stage's ledger: the columns that all have, then its own."""
    return pa.schema([*BASE_FIELDS, *extra])


class LedgerWriter:
    """Writes rows to a Parquet file and counts what became of them."""

    def __init__(self, path: str, schema: pa.Schema, rows_per_group: int = ROWS_PER_GROUP) -> None:
        missing = {field.name for field in BASE_FIELDS} - set(schema.names)
        if missing:
            raise ValueError(f"a ledger needs columns {sorted(missing)}; see ledger_schema")
        self._schema = schema
        self._names = set(schema.names)
        self._rows_per_group = rows_per_group
        self._rows: list[Mapping[str, Any]] = []
        self._tally: Counter[tuple[str, str]] = Counter()
        self._file = pq.ParquetWriter(
            path, schema, compression="zstd", version="2.6", data_page_version="2.0"
        )

    @property
    def counts(self) -> Counts:
        """How many of the rows so far were kept, dropped and lost, by reason."""
        return Counts.of(self._tally)

    @property
    def num_rows(self) -> int:
        """How many rows were written so far."""
        return self._tally.total()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row that has every column.

        Raises ValueError for a missing or unknown column, an unknown verdict, a reason with a kept
        row, or none with another.
        """
        if row.keys() != self._names:
            odd = sorted(row.keys() ^ self._names)
            raise ValueError(f"row {row.get('key')!r}: columns {odd} are missing or unknown")
        verdict, reason = Verdict(row["verdict"]), row["reason"]
        if (verdict is Verdict.KEPT) != (reason == ""):
            raise ValueError(f"row {row['key']!r} is {verdict} with reason {reason!r}")
        self._tally[verdict, reason] += 1
        self._rows.append(row)
        if len(self._rows) == self._rows_per_group:
            self._flush()

    def write_table(self, table: pa.Table) -> None:
        """Add many rows at once, as a row group of their own; for those made column by column.

        Raises ValueError as `write` does, and for other columns than the schema's.
        """
        table = table.cast(self._schema)
        groups = table.select(["verdict", "reason"]).group_by(["verdict", "reason"])
        tally: Counter[tuple[str, str]] = Counter()
        for found in groups.aggregate([([], "count_all")]).to_pylist():
            verdict, reason = Verdict(found["verdict"]), found["reason"]
            if (verdict is Verdict.KEPT) != (reason == ""):
                raise ValueError(f"{found['count_all']} rows are {verdict} with reason {reason!r}")
            tally[verdict, reason] = found["count_all"]
        self._flush()
        self._tally.update(tally)
        self._file.write_table(table)

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def close(self) -> None:
        """Write what is left and the file's footer."""
        self._flush()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
