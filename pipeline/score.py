"""A raw shard becomes a captions sidecar: each image looked at once, every caption and score kept.

    shard_scorer = ShardScorer(corpus, captioner, scorer, ScoreConfig(), seed=0)
    done = shard_scorer.score(raw_record)
    print(*done.outcome.lines(), sep="\\n")

Images of the web get synthetic captions; those of annotated sources do not, for human captions are
never replaced. All captions are scored, whoever wrote them, and none is thrown away: that is for
`pipeline.select`, which needs no models (BLIP, Sec. 3.3).

In float32 the bytes of a sidecar depend on the raw shard and on what `ShardScorer.content` lists,
and on nothing else: not on batch size, threads, the order of shards, or crashes.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commit import ShardWriter
from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter
from pipeline.model_configs import ModelConfig
from pipeline.record import ShardRecord
from pipeline.runfile import ABSENT, flatten
from pipeline.sample import ShardError, canonical_json
from pipeline.score_batches import BatchSize, batches, num_leading
from pipeline.score_config import ScoreConfig
from pipeline.score_images import AheadLimits, DecodeAhead, ScoringStoppedError
from pipeline.score_input import read_raw_shard
from pipeline.score_outcome import ScoreOutcome
from pipeline.score_rows import CAPTIONS_SCHEMA

if TYPE_CHECKING:  # these load torch, which takes seconds; who only lists shards has no use for it
    from pipeline.captioner import Captioner
    from pipeline.score_step import ReadyImage
    from pipeline.scorer import Scorer

__all__ = ["OtherContentError", "ScoringStoppedError", "ShardScore", "ShardScorer", "Watch"]

STAGE, UPSTREAM_STAGE = "captions", "raw"
_ROWS_PER_GROUP = 10_000  # of the sidecar; what is held of it in memory
_FINGERPRINT_DIGITS = 16
_Rows = list[dict[str, Any]]


class OtherContentError(ShardError):
    """A shard is there already, made by other models or with other settings."""

    def __init__(self, record: ShardRecord, current: Mapping[str, Any]) -> None:
        stored = flatten(record.stats.get("content", {}))
        now = flatten(current)
        self.differences = {
            key: (stored.get(key, ABSENT), now.get(key, ABSENT))
            for key in sorted(stored.keys() | now.keys())
            if stored.get(key, ABSENT) != now.get(key, ABSENT)
        }
        found = self.differences.items()
        shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in found)
        super().__init__(
            f"shard {record.name} was made with other settings: "
            f"{shown or 'its fingerprint differs'}; set these back, write to another root, or "
            f"delete {record.stage}/ to make all of it anew"
        )


def _ignore(rows: Sequence[Mapping[str, Any]]) -> None:
    """Tell nobody."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told how scoring goes, and may stop it; called on the thread that scores."""

    on_row: Callable[[Sequence[Mapping[str, Any]]], None] = _ignore
    """Each kept row of the raw shard, in order, as the rows that it became in the sidecar."""
    should_stop: Callable[[], bool] = _never
    """Asked between batches and, while the models wait for images, twice a second."""


@dataclass(frozen=True, slots=True)
class ShardScore:
    """A committed sidecar, and what making it came to."""

    record: ShardRecord
    outcome: ScoreOutcome  # empty when the sidecar was there already
    is_new: bool


def _named(
    captioner: "Captioner | None", scorer: "Scorer | None"
) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield what each model is called, beside the fingerprint of its weights.

    Of a folder the last part: where it lies decides nothing, and is nobody's business.
    """
    configs: dict[str, ModelConfig | None] = {
        "captioner": None if captioner is None else captioner.config,
        "filter": None if scorer is None else scorer.config.filter,
        "clip_model": None if scorer is None else scorer.config.clip,
    }
    for role, config in configs.items():
        if config is not None:
            path = Path(config.name)
            name = path.name if path.is_dir() else config.name
            yield role, {"name": name, "revision": config.revision}


class ShardScorer:
    """Scores shards one at a time; run one per device."""

    def __init__(
        self,
        corpus: Corpus,
        captioner: "Captioner | None",
        scorer: "Scorer | None",
        config: ScoreConfig,
        *,
        seed: int,
        watch: Watch | None = None,
    ) -> None:
        """Without a captioner nothing is written, without a scorer nothing is scored.

        `seed` is the one that the captioner was given.
        """
        from pipeline.score_step import ModelStep

        self._corpus = corpus
        self._config = config
        self._step = ModelStep(captioner, scorer, config, seed=seed)
        self._models = dict(_named(captioner, scorer))
        self._watch = watch or Watch()
        self._batch: BatchSize | None = None

    @property
    def content(self) -> dict[str, Any]:
        """All that decides what a sidecar holds, besides its raw shard."""
        return self._step.content()

    @property
    def fingerprint(self) -> str:
        """The name of `content`, 16 hexadecimal digits."""
        text = canonical_json(self.content)
        return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]

    def score(self, raw: ShardRecord) -> ShardScore:
        """Return the sidecar of a raw shard, made unless it is there and of this very shard.

        Raises ScoringStoppedError when asked to stop, OtherContentError for a sidecar of other
        models or settings, and ShardError; then what was there before is there still. Safe to
        repeat, also while another process makes the same sidecar: one of them wins whole.
        """
        if raw.stage != UPSTREAM_STAGE:
            raise ValueError(f"shard {raw.name} is not of stage {UPSTREAM_STAGE!r}")
        existing = self._corpus.record(STAGE, raw.source, raw.index)
        if existing is not None:
            self._check_content(existing)
            if existing.inputs == raw.sha256:
                return ShardScore(existing, ScoreOutcome(), is_new=False)
        started_at = time.perf_counter()
        outcome = ScoreOutcome()
        with self._corpus.writer(
            STAGE,
            raw.source,
            raw.index,
            fingerprint=self.fingerprint,
            inputs=raw.sha256,
            replace=existing,
        ) as writer:
            record = self._write(writer, raw, outcome)
        self._check_content(record)  # another process may have come first
        outcome.elapsed_seconds = time.perf_counter() - started_at
        return ShardScore(record, outcome, is_new=True)

    def _check_content(self, existing: ShardRecord) -> None:
        if existing.fingerprint != self.fingerprint:
            raise OtherContentError(existing, self.content)

    def _write(self, writer: ShardWriter, raw: ShardRecord, outcome: ScoreOutcome) -> ShardRecord:
        with LedgerWriter(writer.path("parquet"), CAPTIONS_SCHEMA, _ROWS_PER_GROUP) as ledger:
            for rows in self._rows(raw, outcome):
                started_at = time.perf_counter()
                for row in rows:
                    ledger.write(row)
                outcome.add_image(rows)
                outcome.times.write += time.perf_counter() - started_at
                self._watch.on_row(rows)
        if outcome.num_images != raw.counts.kept:
            raise ShardError(
                f"shard {raw.name}: {raw.counts.kept:,} images were kept, {outcome.num_images:,} "
                f"are in it; delete {raw.name}.json and download it again"
            )
        started_at = time.perf_counter()
        stats = {
            "content": self.content,
            "models": self._models,
            "images": outcome.num_images,
            "images_scored": outcome.num_kept,
            "captions": dict(sorted(outcome.captions.items())),
        }
        record = writer.commit(rows_in=ledger.num_rows, counts=ledger.counts, stats=stats)
        outcome.times.write += time.perf_counter() - started_at
        return record

    def _rows(self, raw: ShardRecord, outcome: ScoreOutcome) -> Iterator[_Rows]:
        """Yield the sidecar's rows of each image, in order."""
        batch = self._batch_size()
        halved_before = batch.num_halved
        limits = AheadLimits(
            num_decoders=self._config.num_decoders,
            max_ready=2 * max(batch.size, self._config.num_decoders),
        )
        ahead = DecodeAhead(self._step.prepare, limits, outcome.times, self._watch.should_stop)
        with closing(ahead.work(read_raw_shard(self._corpus, raw))) as images:
            for group in batches(images, batch):
                yield from self._rows_of(group, raw.name, outcome)
                outcome.batch_size = batch.size
                outcome.num_out_of_memory = batch.num_halved - halved_before

    def _rows_of(
        self, images: Sequence["ReadyImage"], shard: str, outcome: ScoreOutcome
    ) -> Iterator[_Rows]:
        """Yield the rows of a batch, in as many parts as memory asks for."""
        batch = self._batch_size()
        left = images
        while left:
            size = num_leading(left, batch.size)
            part = left[:size]
            rows = self._step.rows(part, shard=shard, times=outcome.times)
            if rows is not None:
                yield from rows
                left = left[size:]
            else:
                batch.halve(f"shard {shard}, sample {part[0].row.key}")

    def _batch_size(self) -> BatchSize:
        if self._batch is None:
            size = self._config.batch_size
            self._batch = BatchSize(self._step.batch_size() if size == "auto" else size)
        return self._batch
