"""The score stage: raw shards -> every caption and every score, by the models on one device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.stages.stage import Commit, Live, Made, StoppedError, Task
from jobs.trained import found_model
from pipeline.corpus import Corpus
from pipeline.layout import MARKER, parse_name
from pipeline.model_configs import CaptionerConfig, ScorerConfig
from pipeline.record import ShardRecord
from pipeline.sample import ShardError
from pipeline.score import (
    STAGE,
    UPSTREAM_STAGE,
    OtherContentError,
    ScoringStoppedError,
    ShardScorer,
    Watch,
)
from pipeline.score_config import ScoreConfig

if TYPE_CHECKING:  # torch takes seconds to import, which the driver does not spend
    import torch

    from pipeline.captioner import Captioner
    from pipeline.scorer import Scorer


@dataclass(frozen=True, slots=True)
class ScoreStage:
    """Captions and scores raw shards; without a captioner or a scorer it does only the other."""

    root: str
    captioner: CaptionerConfig | None
    scorer: ScorerConfig | None
    config: ScoreConfig
    seed: int
    name: str = "score"
    folder: str = STAGE

    def accepts(self, record: ShardRecord) -> bool:
        """Return True for a sidecar of these settings. Raises UserError that names what differs.

        Weights are compared where they are, when the stage is opened.
        """
        weights = record.stats.get("content", {}).get("weights")
        error = OtherContentError(record, {**self._content(), "weights": weights})
        if error.differences:
            raise UserError(str(error))
        return True

    @contextmanager
    def open(self, live: Live) -> Iterator["ScoreMaker"]:
        """Load the models onto the GPU if this process has one."""
        corpus = open_corpus(self.root)
        with ExitStack() as stack:
            captioner, scorer = self._load(stack)
        watch = Watch(
            on_row=lambda rows: live.on_rows(1, int(any(r["verdict"] == "kept" for r in rows))),
            should_stop=live.should_stop,
        )
        shard_scorer = ShardScorer(
            corpus, captioner, scorer, self.config, seed=self.seed, watch=watch
        )
        self._check_weights(corpus, shard_scorer)
        yield ScoreMaker(corpus, shard_scorer)

    def _load(self, stack: ExitStack) -> "tuple[Captioner | None, Scorer | None]":
        import torch

        from model.weight_files import CheckpointError
        from pipeline.captioner import Captioner
        from pipeline.models import ModelError
        from pipeline.scorer import Scorer

        device, dtype = _device(torch), getattr(torch, self.config.dtype)
        captioner = scorer = None
        try:
            if self.captioner is not None:
                found = stack.enter_context(found_model(self.captioner, self.root, "captioner"))
                captioner = Captioner.load(found, seed=self.seed, device=device, dtype=dtype)
                # Called as the recipe calls it: what this run trained lies in a passing folder.
                captioner.config = captioner.config.model_copy(update={"name": self.captioner.name})
            if self.scorer is not None:
                asked, models = self.scorer.filter, self.scorer
                if asked is not None:
                    own = stack.enter_context(found_model(asked, self.root, "filter"))
                    models = models.model_copy(update={"filter": own})
                scorer = Scorer.load(models, device=device, dtype=dtype)
                if asked is not None and scorer.config.filter is not None:
                    named = scorer.config.filter.model_copy(update={"name": asked.name})
                    scorer.config = scorer.config.model_copy(update={"filter": named})
        except (ModelError, CheckpointError) as error:
            raise UserError(str(error)) from error
        return captioner, scorer

    def _content(self) -> dict[str, Any]:
        return {
            "captioner": self.captioner and self.captioner.content(),
            "scorer": self.scorer and self.scorer.content(),
            "score": self.config.content(),
            "seed": None if self.captioner is None else self.seed,
        }

    def _check_weights(self, corpus: Corpus, shard_scorer: ShardScorer) -> None:
        """Compare with one sidecar that is there already: a corpus never mixes models."""
        record = _any_record(corpus)
        if record is not None and record.fingerprint != shard_scorer.fingerprint:
            raise UserError(str(OtherContentError(record, shard_scorer.content)))


@dataclass(frozen=True, slots=True)
class ScoreMaker:
    """Two models with their corpus."""

    corpus: Corpus
    scorer: ShardScorer

    def make(self, task: Task) -> Made:
        """Return the sidecar of a task's raw shard (see `Maker.make`)."""
        raw = self.corpus.record(UPSTREAM_STAGE, task.source, task.index)
        if raw is None:
            raise ShardError(f"shard {task.name}: its raw shard is gone; download it again")
        try:
            done = self.scorer.score(raw)
        except ScoringStoppedError as error:
            raise StoppedError(str(error)) from error
        return Made(
            commit=Commit.of(done.record),
            counts=done.record.counts,
            is_new=done.is_new,
            num_kept=done.outcome.num_kept,
            times=asdict(done.outcome.times),
        )


def _device(torch_module: Any) -> "torch.device":  # noqa: ANN401 (a module)
    name = "cuda" if torch_module.cuda.is_available() else "cpu"
    device: torch.device = torch_module.device(name)
    return device


def _any_record(corpus: Corpus) -> ShardRecord | None:
    for source in corpus.sources(STAGE):
        for name in map(parse_name, sorted(corpus.store.list(f"{STAGE}/{source}").sizes)):
            if name is not None and name.suffix == MARKER and not name.digest:
                return corpus.record(STAGE, source, name.index)
    return None
