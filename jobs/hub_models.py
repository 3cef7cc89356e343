"""Which models of a recipe come from the hub, and whether they are the same ones another day."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.recipe import Recipe
from jobs.training.config import CORPUS_TOKENIZER, STAGES, TRAINED, Stage
from pipeline.model_configs import ModelConfig

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model by its name on the hub."""

    key: str
    """The key of the recipe that names it."""
    revision_key: str
    """The key that says which commit."""
    name: str
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether the name stands for the same bytes for ever: branches and tags move."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def hub_models(recipe: Recipe, stages: Sequence[Stage] = STAGES) -> list[HubModel]:
    """Return the models on the hub that a recipe names for its data and these stages of training.

    A name for which there is a folder here is that folder.
    """
    found = [*_of_data(recipe), *_of_training(recipe, stages)]
    return [each for each in found if not Path(each.name).exists()]


def unpinned(models: Sequence[HubModel]) -> Iterator[str]:
    """Yield a line for each model that may be another one another day."""
    for each in models:
        if not each.is_pinned:
            says = "no revision" if each.revision is None else f"revision {each.revision!r}"
            yield (
                f"{each.key} = {each.name}: {says}, so the hub may give other weights another "
                f"day; pin it to a commit: {each.revision_key}"
            )


def _of_data(recipe: Recipe) -> Iterator[HubModel]:
    configs: dict[str, ModelConfig | None] = {"captioner": recipe.captioner}
    if recipe.scorer is not None:
        configs |= {"scorer.filter": recipe.scorer.filter, "scorer.clip": recipe.scorer.clip}
    for key, config in configs.items():
        if config is not None and config.name != TRAINED:
            yield HubModel(f"{key}.name", f"{key}.revision", config.name, config.revision)


def _of_training(recipe: Recipe, stages: Sequence[Stage]) -> Iterator[HubModel]:
    training = recipe.training
    if training is None:
        return
    names: dict[str, str] = {}
    if stages and training.tokenizer != CORPUS_TOKENIZER:
        names["training.tokenizer"] = training.tokenizer
    for stage in stages:
        section = getattr(training, stage)
        for key in ("start_from", "text_model", "llm"):
            if (name := getattr(section, key)) is not None:
                names[f"training.{stage}.{key}"] = name
    for key, name in names.items():
        yield HubModel(key, "training.revisions", name, training.revisions.get(name))
