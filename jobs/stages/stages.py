"""Which stages a recipe's run has, upstream first."""

import logging
from collections.abc import Sequence

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.stages.download import DownloadStage, Visit
from jobs.stages.stage import Stage
from jobs.training.config import TRAINED
from jobs.training.config import Stage as TrainingStage

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


def untrained(recipe: Recipe) -> list[TrainingStage]:
    """Return which of captioner and filter are to be the run's own and do not exist yet."""
    captioner, scorer = recipe.captioner, recipe.scorer
    wanted: list[TrainingStage] = []
    if captioner is not None and captioner.name == TRAINED:
        wanted.append("captioner")
    if scorer is not None and scorer.filter is not None and scorer.filter.name == TRAINED:
        wanted.append("filter")
    if not wanted:
        return []
    from jobs.training.exports import read_card  # brings torch

    store = open_corpus(recipe.root).store
    return [stage for stage in wanted if read_card(store, stage) is None]


def stages_of(recipe: Recipe, names: Sequence[str], *, visit: Visit = Visit.MISSING) -> list[Stage]:
    """Return the stages of these names; `visit` is for a download.

    Raises UserError for a stage that the recipe says nothing of, and UntrainedError.
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
    if missing := untrained(recipe):
        raise UntrainedError(
            f"the recipe asks for the {' and '.join(missing)} that this run trains itself, which "
            "it has not yet: capfilt pretrain does, and capfilt run does all in order"
        )
    # It brings torch, which a download does without.
    from jobs.stages.score import ScoreStage

    return ScoreStage(recipe.root, recipe.captioner, recipe.scorer, recipe.score, recipe.seed)


def _select(recipe: Recipe, *, is_replacing: bool) -> Stage:
    from jobs.stages.select import SelectStage

    if recipe.select is None:
        raise UserError("the recipe has no `select`: say which captions to keep, e.g. select: {}")
    return SelectStage(recipe.root, recipe.select, is_replacing)
