"""Scored shards become clean shards: rules and a policy give each caption its verdict, on a CPU.

    selector = Selector(corpus, SelectConfig(policy="blip2"))
    selector.check_scores(corpus.shards("captions"))
    done = selector.select(raw_record, captions_record)
    print(*done.outcome.lines(), sep="\\n")

No model is loaded: scores are read from the sidecar, image bytes are copied as they are. The bytes
of a clean shard depend on its raw shard, its sidecar and `SelectConfig.content` alone.
"""

import hashlib
import io
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import ShardWriter
from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter
from pipeline.record import ShardRecord
from pipeline.runfile import ABSENT, flatten
from pipeline.sample import Origin, ShardError, Verdict, canonical_json
from pipeline.selection.candidates import ROWS_PER_BLOCK, Block, read_blocks
from pipeline.selection.checked import HashedStream, open_checked
from pipeline.selection.checks import Check
from pipeline.selection.clean import (
    CLEAN_SCHEMA,
    Judged,
    count_captions,
    ledger_table,
    write_images,
)
from pipeline.selection.config import SelectConfig
from pipeline.selection.expression import SqlCondition
from pipeline.selection.images import Images
from pipeline.selection.outcome import SelectionOutcome
from pipeline.selection.policies import MODEL_OF, NEEDS, apply_policy, put_in_order
from pipeline.selection.rules import apply_rules, mask
from pipeline.tar import TarWriter

STAGE, SCORED_STAGE, RAW_STAGE = "clean", "captions", "raw"
_FINGERPRINT_DIGITS = 16
_BUFFER = 1 << 20


class OtherPolicyError(ShardError):
    """A clean shard is there already, made by another policy or with other rules."""

    def __init__(self, record: ShardRecord, current: Mapping[str, Any]) -> None:
        stored, now = flatten(record.stats.get("content", {})), flatten(current)
        self.differences = {
            key: (stored.get(key, ABSENT), now.get(key, ABSENT))
            for key in sorted(stored.keys() | now.keys())
            if stored.get(key, ABSENT) != now.get(key, ABSENT)
        }
        shown = [f"{key} was {old!r}, now {new!r}" for key, (old, new) in self.differences.items()]
        super().__init__(
            f"shard {record.name} was selected otherwise: {'; '.join(shown)}; set these back, "
            "write to another root, which shares the images, or ask for it to be replaced"
        )


class MissingScoresError(ValueError):
    """A policy needs a score that no caption of a shard has."""


@dataclass(frozen=True, slots=True)
class ShardSelection:
    """A committed clean shard, and what making it came to."""

    record: ShardRecord
    outcome: SelectionOutcome  # empty when the shard was there already
    is_new: bool


class Selector:
    """Selects shards one at a time on one core; run one per core."""

    def __init__(
        self,
        corpus: Corpus,
        config: SelectConfig,
        *,
        replaces_other_policy: bool = False,
        rows_per_block: int = ROWS_PER_BLOCK,
    ) -> None:
        """`replaces_other_policy` says that clean shards of another policy may be made anew.

        So many rows are in memory at a time, and in a row group of the clean ledger.
        Raises ExpressionError for an expression that is no condition.
        """
        self._corpus = corpus
        self._config = config
        self._replaces_other_policy = replaces_other_policy
        self._rows_per_block = rows_per_block
        self._condition = None if config.expression is None else SqlCondition(config.expression)

    @property
    def content(self) -> dict[str, Any]:
        """All that decides what a clean shard holds, besides its raw shard and its sidecar."""
        return self._config.content()

    @property
    def fingerprint(self) -> str:
        """The name of `content`, 16 hexadecimal digits."""
        text = canonical_json(self.content)
        return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]

    def check_scores(self, records: Iterable[ShardRecord]) -> None:
        """Return if the sidecars have the scores that the policy needs; reads almost nothing.

        Raises MissingScoresError that says what to score. To be asked before a run: `select` looks
        at every caption, but one shard at a time.
        """
        needs = _needs(self._config, self._condition)
        for record in records:
            for name in needs:
                if self._lacks(record, name):
                    raise MissingScoresError(
                        f"shard {record.name} has no {name} scores, which policy "
                        f"'{self._config.policy}' needs; score it with a {MODEL_OF[name]} model "
                        "first, or choose another policy"
                    )

    def _lacks(self, record: ShardRecord, name: str) -> bool:
        """Say whether a sidecar has machine-judged captions and not one of them this score."""
        with self._corpus.open(record, "parquet") as stream, pq.ParquetFile(stream) as file:
            place = file.schema_arrow.get_field_index(name)
            groups = [
                file.metadata.row_group(number).column(place).statistics
                for number in range(file.metadata.num_row_groups)
            ]
            if any(group is not None and group.num_values for group in groups):
                return False
            columns = ["verdict", "origin", name]
            for batch in file.iter_batches(columns=columns):
                for verdict, origin, score in zip(*map(_values, batch.columns), strict=True):
                    if score is None and verdict == Verdict.KEPT and origin != Origin.HUMAN:
                        return True
        return False

    def select(self, raw: ShardRecord, scored: ShardRecord) -> ShardSelection:
        """Return the clean shard of a raw shard and its sidecar, made unless it is there.

        One of an older sidecar is made anew. Raises OtherPolicyError where one of another policy is
        there and may not be replaced, MissingScoresError where the sidecar was not scored for this
        policy, and ShardError; then what was there before is there still. Safe to repeat, also
        while another process makes the same shard: one of them wins whole.
        """
        _check_lineage(raw, scored)
        existing = self._corpus.record(STAGE, raw.source, raw.index)
        if existing is not None:
            if existing.fingerprint != self.fingerprint and not self._replaces_other_policy:
                raise OtherPolicyError(existing, self.content)
            if (existing.fingerprint, existing.inputs) == (self.fingerprint, scored.sha256):
                return ShardSelection(existing, SelectionOutcome(), is_new=False)
        self.check_scores([scored])
        started_at = time.perf_counter()
        outcome = SelectionOutcome()
        with self._corpus.writer(
            STAGE,
            raw.source,
            raw.index,
            fingerprint=self.fingerprint,
            inputs=scored.sha256,
            replace=existing,
        ) as writer:
            record = self._write(writer, raw, scored, outcome)
        if record.fingerprint != self.fingerprint:  # another process came first
            raise OtherPolicyError(record, self.content)
        outcome.elapsed_seconds = time.perf_counter() - started_at
        return ShardSelection(record, outcome, is_new=True)

    def _write(
        self,
        writer: ShardWriter,
        raw: ShardRecord,
        scored: ShardRecord,
        outcome: SelectionOutcome,
    ) -> ShardRecord:
        provenance: dict[str, Any] = {
            "policy": self._config.policy.value,
            "select": self.fingerprint,
            "captions": scored.fingerprint,
        }
        if "models" in scored.stats:  # their names and revisions, beside the weights' fingerprints
            provenance["models"] = scored.stats["models"]
        with ExitStack() as files:
            raw_ledger, sidecar = (
                files.enter_context(open_checked(self._corpus, record, "parquet", writer.folder))
                for record in (raw, scored)
            )
            hashed = HashedStream(files.enter_context(self._corpus.open(raw, "tar")))
            images = Images(io.BufferedReader(hashed, _BUFFER), raw.name)
            stream = files.enter_context(open(writer.path("tar"), "wb", buffering=_BUFFER))
            tar = files.enter_context(TarWriter(stream))
            ledger = files.enter_context(LedgerWriter(writer.path("parquet"), CLEAN_SCHEMA))
            for block in read_blocks(raw_ledger, sidecar, scored, self._rows_per_block):
                judged = self._judge(block, scored.name)
                spans = write_images(judged, images, tar, provenance)
                ledger.write_table(ledger_table(judged, spans, self._config.policy.value))
                outcome.add_captions(*count_captions(judged))
                outcome.image_bytes += sum(span.image.size for span in spans.values())
            hashed.check(raw, "tar")
        counts = ledger.counts
        outcome.add_rows(counts)
        if ledger.num_rows != raw.rows_in:
            raise ShardError(
                f"shard {raw.name}: {raw.rows_in:,} rows went in, its ledger has "
                f"{ledger.num_rows:,}; run `capfilt verify`"
            )
        stats = {"content": self.content, "captions": outcome.stats()}
        return writer.commit(rows_in=ledger.num_rows, counts=counts, stats=stats)

    def _judge(self, block: Block, shard: str) -> Judged:
        config = self._config
        captions, masked = mask(block.captions, config.rules.pii)
        block = Block(block.rows, captions)
        codes = np.where(captions.is_refused, Check.SCORED, Check.PASSED).astype(np.int8)
        apply_rules(block, config.rules, codes)
        try:
            ranks = apply_policy(block, config, self._condition, codes)
        except ShardError as error:
            raise ShardError(f"shard {shard}, {error}") from error
        chosen = put_in_order(captions, codes, ranks, block.rows.num_rows)
        return Judged(block, masked, codes, chosen)


def _check_lineage(raw: ShardRecord, scored: ShardRecord) -> None:
    if (raw.stage, scored.stage) != (RAW_STAGE, SCORED_STAGE):
        raise ValueError(f"{raw.name} and {scored.name} are not a raw shard and its sidecar")
    if scored.inputs != raw.sha256:
        raise ShardError(
            f"shard {scored.name} is stale: {raw.name} was replaced after it was made; score the "
            "shard again"
        )


def _needs(config: SelectConfig, condition: SqlCondition | None) -> tuple[str, ...]:
    if condition is not None:
        return condition.scores
    return (NEEDS[config.policy],) if config.policy in NEEDS else ()


def _values(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return values
