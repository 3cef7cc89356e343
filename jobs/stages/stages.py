"""Which stages a recipe's run has, upstream first."""

from collections.abc import Sequence

from jobs.recipe import Recipe
from jobs.stages.download import DownloadStage, Visit
from jobs.stages.stage import Stage


def chain_of(recipe: Recipe) -> list[Stage]:
    """Return every stage that the recipe asks for."""
    return stages_of(recipe, ["download"])


def stages_of(recipe: Recipe, names: Sequence[str], *, visit: Visit = Visit.MISSING) -> list[Stage]:
    """Return the stages of these names; `visit` is for a download."""
    config = recipe.run
    stages: list[Stage] = []
    if "download" in names:
        workers = config.max_actors(config.download)
        stages.append(DownloadStage(recipe, visit, workers))
    return stages
