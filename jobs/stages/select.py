"""The select stage: raw shards and their scores -> clean shards; a CPU does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.stages.stage import Commit, Live, Made, Task
from pipeline.corpus import Corpus
from pipeline.record import ShardRecord
from pipeline.sample import ShardError
from pipeline.select import (
    RAW_STAGE,
    SCORED_STAGE,
    STAGE,
    MissingScoresError,
    OtherPolicyError,
    Selector,
)
from pipeline.selection.config import SelectConfig
from pipeline.selection.expression import ExpressionError


@dataclass(frozen=True, slots=True)
class SelectStage:
    """Applies rules and a policy to scored shards."""

    root: str
    config: SelectConfig
    replaces_other_policy: bool = False
    """Whether clean shards of another policy are made anew."""
    name: str = "select"
    folder: str = STAGE

    def accepts(self, record: ShardRecord) -> bool:
        """Say whether a clean shard is of this policy.

        Raises UserError that names what differs, unless such shards are to be replaced.
        """
        error = OtherPolicyError(record, self.config.content())
        if error.differences and not self.replaces_other_policy:
            raise UserError(f"{error}: `capfilt select` does that")
        return not error.differences

    @contextmanager
    def open(self, live: Live) -> Iterator["SelectMaker"]:
        """Open the corpus and read the policy."""
        corpus = open_corpus(self.root)
        try:
            selector = Selector(
                corpus, self.config, replaces_other_policy=self.replaces_other_policy
            )
        except ExpressionError as error:
            raise UserError(f"select.expression: {error}") from error
        yield SelectMaker(corpus, selector)


@dataclass(frozen=True, slots=True)
class SelectMaker:
    """A selector with its corpus."""

    corpus: Corpus
    selector: Selector

    def make(self, task: Task) -> Made:
        """Return the clean shard of a task (see `Maker.make`)."""
        raw = self._record(RAW_STAGE, task)
        scored = self._record(SCORED_STAGE, task)
        try:
            done = self.selector.select(raw, scored)
        except MissingScoresError as error:  # as every other shard will lack them
            raise UserError(str(error)) from error
        return Made(
            commit=Commit.of(done.record),
            counts=done.record.counts,
            is_new=done.is_new,
            num_kept=done.outcome.num_kept,
        )

    def _record(self, stage: str, task: Task) -> ShardRecord:
        record = self.corpus.record(stage, task.source, task.index)
        if record is None:
            raise ShardError(
                f"shard {task.name}: its {stage} shard is gone since the run began; run again"
            )
        return record
