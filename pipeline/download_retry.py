"""A committed raw shard as the source of its own replacement: what succeeded is copied from it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

import pyarrow.parquet as pq

from pipeline.corpus import Corpus
from pipeline.download_order import RowToVisit, Step
from pipeline.download_row import RAW_SCHEMA, RowResult, is_transient
from pipeline.record import ShardRecord
from pipeline.sample import ShardError, Verdict
from pipeline.sources.rows import SourceRow
from pipeline.tar import TarFault, TarSample, read_samples

_BATCH_ROWS = 1000


class PreviousShard:
    """The ledger and the samples of a committed shard, read side by side; a context manager."""

    def __init__(self, corpus: Corpus, record: ShardRecord, *, is_only_transient: bool) -> None:
        """Opens nothing yet."""
        self._corpus = corpus
        self._record = record
        self._is_only_transient = is_only_transient
        self._open_files = ExitStack()
        self._samples: Iterator[TarSample] | None = None

    def has_rows_to_visit(self) -> bool:
        """Say whether a retry would visit anything; reads the marker's counts alone."""
        reasons = self._record.counts.failed
        return any(not self._is_only_transient or is_transient(reason) for reason in reasons)

    def steps(self, rows: Iterator[RowToVisit]) -> Iterator[Step]:
        """Yield the rows to be visited, and in place of the others what became of them before.

        Raises ShardError where the source's rows are not those of the shard.
        """
        ledger = self._ledger()
        for step in rows:
            before = next(ledger, None)
            if before is None:
                raise self._error(f"has {self._record.rows_in} rows, its source has more")
            url = step.row.url if isinstance(step.row, SourceRow) else None
            if (before["key"], before["url"]) != (step.key, url):
                raise self._error(
                    f"has {before['url']!r} as {before['key']}, its source has {url!r}"
                )
            yield step if self._is_to_visit(before) else _copied(before)
        if next(ledger, None) is not None:
            raise self._error(f"has {self._record.rows_in} rows, its source has fewer")

    def members_of(self, result: RowResult) -> Mapping[str, bytes] | None:
        """Return the files of a row that was copied; to be asked in the order of keys."""
        if result.verdict is not Verdict.KEPT:
            return None
        if self._samples is None:
            tar = self._open_files.enter_context(self._corpus.open(self._record, "tar"))
            self._samples = read_samples(tar, shard=self._record.name, on_fault=self._fault)
        for sample in self._samples:
            if sample.key == result.key:
                return sample.members
        raise self._error(f"has no sample {result.key} in its tar")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open_files.close()

    def _ledger(self) -> Iterator[dict[str, Any]]:
        stream = self._open_files.enter_context(self._corpus.open(self._record, "parquet"))
        file = pq.ParquetFile(stream)
        if file.schema_arrow.names != RAW_SCHEMA.names:
            raise self._error("has other columns than a raw shard of this version")
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from batch.to_pylist()

    def _is_to_visit(self, row: Mapping[str, Any]) -> bool:
        has_failed = row["verdict"] == Verdict.FAILED.value
        return has_failed and (not self._is_only_transient or is_transient(row["reason"]))

    def _fault(self, fault: TarFault) -> NoReturn:
        raise self._error(f"is damaged: {fault}")

    def _error(self, problem: str) -> ShardError:
        return ShardError(
            f"shard {self._record.name} {problem}; delete {self._record.name}.json and download it "
            "again, or give back the source it was made from"
        )


def _copied(row: Mapping[str, Any]) -> RowResult:
    return RowResult(
        key=row["key"],
        verdict=Verdict(row["verdict"]),
        reason=row["reason"],
        url=row["url"],
        ledger=row,
        is_copied=True,
    )
