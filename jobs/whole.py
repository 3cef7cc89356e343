"""From URLs to clean shards, in order: download, train captioner and filter, score, select.

Every step is there already or is made, so the same call continues wherever it ended. A recipe that
names published captioner and filter needs no training in between, and its stages overlap. BLIP-2
itself is trained on the result by `capfilt pretrain`.
"""

from collections.abc import Callable
from dataclasses import replace

from jobs import run as data_run
from jobs.errors import RunError
from jobs.recipe import Recipe
from jobs.stages.stages import untrained
from jobs.summary import RunSummary
from jobs.training.config import Stage

_BOOTSTRAP: tuple[Stage, ...] = ("med", "captioner", "filter")


def run_whole(
    recipe: Recipe,
    should_stop: Callable[[], bool],
    *,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Make the corpus that a recipe asks for and return what the data stages came to.

    Raises UserError, and whatever a stage of training raises.
    """
    if untrained(recipe):
        summary = data_run.run_stage(
            recipe, "download", should_stop, address=address, command=command
        )
        if summary.exit_code:
            return summary
        if not train(recipe, _BOOTSTRAP, should_stop):
            return replace(summary, is_stopped=True)
    return data_run.run(recipe, should_stop, address=address, command=command)


def train(recipe: Recipe, stages: tuple[Stage, ...], should_stop: Callable[[], bool]) -> bool:
    """Train stages one after the other; return whether all are trained, False when stopped."""
    from jobs.pretrain import pretrain  # brings torch
    from jobs.training.gates import DivergedError
    from jobs.training.job import training_job

    for stage in stages:
        try:
            if should_stop() or pretrain(training_job(recipe, stage), should_stop) is None:
                return False
        except DivergedError as error:
            raise RunError(f"{stage}: {error}") from error
    return True
