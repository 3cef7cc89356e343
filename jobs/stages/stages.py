"""Which stages a recipe's run has, upstream first."""

import logging
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.stages.download import DownloadStage, Visit
from jobs.stages.stage import Stage
from jobs.training.config import TRAINED
from pipeline.model_configs import CaptionerConfig, ModelConfig, ScorerConfig

_log = logging.getLogger(__name__)
DOWNLOAD, SCORE, SELECT = "download", "score", "select"


def chain_of(recipe: Recipe) -> list[Stage]:
    """Return every stage that the recipe asks for and that can be run yet."""
    if recipe.select is None and recipe.captioner is None and recipe.scorer is None:
        return stages_of(recipe, [DOWNLOAD])
    names = [DOWNLOAD, SCORE] if recipe.select is None else [DOWNLOAD, SCORE, SELECT]
    try:
        return stages_of(recipe, names)
    except UntrainedError as error:
        _log.warning("only downloads for now: %s", error)
        return stages_of(recipe, [DOWNLOAD])


class UntrainedError(UserError):
    """A recipe names a model that it has not trained yet."""


def stages_of(recipe: Recipe, names: Sequence[str], *, visit: Visit = Visit.MISSING) -> list[Stage]:
    """Return the stages of these names; `visit` is for a download.

    Raises UserError for a stage that the recipe says nothing of.
    """
    stages: list[Stage] = []
    for name in names:
        if name == DOWNLOAD:
            config = recipe.run
            stages.append(DownloadStage(recipe, visit, config.max_actors(config.download)))
        elif name == SCORE:
            stages.append(_score(recipe))
        else:
            stages.append(_select(recipe, is_replacing=len(names) == 1))
    return stages


def _score(recipe: Recipe) -> Stage:
    captioner, scorer = recipe.captioner, recipe.scorer
    if captioner is not None and captioner.name == TRAINED:
        captioner = captioner.model_copy(update={"name": _export(recipe, "captioner")})
    if scorer is not None and scorer.filter is not None and scorer.filter.name == TRAINED:
        own = ModelConfig(name=_export(recipe, "filter"))
        scorer = scorer.model_copy(update={"filter": own})
    return _score_stage(recipe, captioner, scorer)


def _score_stage(
    recipe: Recipe, captioner: CaptionerConfig | None, scorer: ScorerConfig | None
) -> Stage:
    # It brings torch, which a download does without.
    from jobs.stages.score import ScoreStage

    return ScoreStage(recipe.root, captioner, scorer, recipe.score, recipe.seed)


def _select(recipe: Recipe, *, is_replacing: bool) -> Stage:
    from jobs.stages.select import SelectStage

    if recipe.select is None:
        raise UserError("the recipe has no `select`: say which captions to keep, e.g. select: {}")
    return SelectStage(recipe.root, recipe.select, is_replacing)


def _export(recipe: Recipe, stage: str) -> str:
    """Return the folder of a model that was trained on this corpus."""
    folder = Path(recipe.root, "train", stage, "export")
    if not folder.is_dir():
        raise UntrainedError(
            f"the {stage} is to be this run's own, and is not trained yet ({folder} is missing): "
            "train it first (capfilt pretrain)"
        )
    return str(folder)
