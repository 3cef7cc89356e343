"""One training job: what a worker is told, and nothing that only one machine knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.training.config import Stage, StageConfig, TrainingConfig
from jobs.training.exports import stage_folder
from pipeline.corpus import Corpus
from pipeline.sources.rows import Origin
from pipeline.store import Store


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A stage to train on a corpus; small and picklable, for it travels to workers."""

    root: str
    stage: Stage
    config: TrainingConfig
    seed: int
    human_sources: tuple[str, ...]  # captioner and filter learn from these
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()  # all that may be trained on; empty: what the corpus has

    @property
    def section(self) -> StageConfig:
        """The stage's own settings."""
        return self.config.of(self.stage)

    @property
    def folder(self) -> str:
        """Where the stage writes, below the root."""
        return stage_folder(self.stage)

    def open_store(self) -> Store:
        """Open the root."""
        return Store(self.root, self.storage_options)

    def open_corpus(self) -> Corpus:
        """Open the corpus at the root."""
        return Corpus(self.root, self.storage_options)


def training_job(recipe: Recipe, stage: Stage) -> TrainingJob:
    """Return the job of one stage of a recipe. Raises UserError for one without training."""
    if recipe.training is None:
        raise UserError(
            "the recipe has no section `training`; add one, even an empty `training: {}`, for the "
            "papers' settings"
        )
    held_out = recipe.evaluation.source if recipe.evaluation else None
    mine = [each for each in recipe.sources if each.name != held_out]
    human = tuple(each.name for each in mine if each.origin is Origin.HUMAN)
    names = tuple(each.name for each in mine) if held_out else ()
    return TrainingJob(recipe.root, stage, recipe.training, recipe.seed, human, sources=names)
