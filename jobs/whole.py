"""From URLs to a trained model, in order; every step is there already or is made.

Download; captioner and filter, where the recipe trains its own; captions, scores, selection; a page
to look at; then the stages of BLIP-2 that the recipe has a section for, each measured on what none
has seen. The same call continues wherever it ended. A recipe that names published captioner and
filter needs no training in between, and its data stages overlap.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import run as data_run
from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.run_config import Until
from jobs.stages.stages import untrained
from jobs.summary import RunSummary
from jobs.training.config import TRAINED, Stage

if TYPE_CHECKING:
    from jobs.training.exports import ExportCard
    from jobs.training.side_by_side import Task

Figures = dict[str, float]
ShouldStop = Callable[[], bool]

_FINE_TUNED: tuple[Stage, ...] = ("captioner", "filter")  # both begin from med
_BLIP2: Mapping[Until, tuple[Stage, ...]] = {
    "select": (),
    "stage1": ("stage1",),
    "stage2": ("stage1", "stage2"),
}


def run_whole(
    recipe: Recipe,
    should_stop: ShouldStop,
    *,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Make the corpus and the models that a recipe asks for, as far as `run.until`.

    Raises UserError, for what BLIP-2 lacks before anything is fetched, and whatever a stage raises.
    """
    summary = make_corpus(recipe, should_stop, address=address, command=command)
    if summary.exit_code or recipe.select is None:
        return summary
    models = train_blip2(recipe, should_stop)
    return replace(summary, is_stopped=models is None, models=models or {})


def make_corpus(
    recipe: Recipe,
    should_stop: ShouldStop,
    *,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Make the clean corpus, the models that clean it, and its page; raises as `run_whole` does."""
    stages = blip2_stages(recipe)
    _require_files(recipe, stages)
    _require_one_qformer(recipe, stages)
    if untrained(recipe):
        summary = data_run.run_stage(
            recipe, "download", should_stop, address=address, command=command
        )
        if summary.exit_code:
            return summary
        if not all(train(recipe, each, should_stop) for each in (("med",), _FINE_TUNED)):
            return replace(summary, is_stopped=True)
    summary = data_run.run(recipe, should_stop, address=address, command=command)
    if summary.exit_code or recipe.select is None:
        return summary
    return replace(summary, report=_report(recipe))


def train_blip2(recipe: Recipe, should_stop: ShouldStop) -> dict[Stage, Figures] | None:
    """Train the stages of BLIP-2 that a run goes on to; return each one's figures, None if stopped.

    Without a held-out source in the recipe a stage has none.
    """
    models: dict[Stage, Figures] = {}
    for stage in blip2_stages(recipe):
        if not train(recipe, (stage,), should_stop):
            return None
        models[stage] = _measured(recipe, stage)
    return models


def blip2_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of BLIP-2 that a run of the recipe trains: those it has a section for."""
    if recipe.training is None or recipe.select is None:
        return ()
    wanted = recipe.training.model_fields_set
    return tuple(stage for stage in _BLIP2[recipe.run.until] if stage in wanted)


def train(recipe: Recipe, stages: tuple[Stage, ...], should_stop: ShouldStop) -> bool:
    """Train stages that do not need each other; return whether all are, False when stopped."""
    from jobs.pretrain import pretrain  # brings torch
    from jobs.training.job import training_job
    from jobs.training.side_by_side import side_by_side

    assert recipe.training is not None
    tasks: dict[str, Task[ExportCard]] = {
        stage: partial(pretrain, training_job(recipe, stage)) for stage in stages
    }
    return side_by_side(tasks, recipe.training.num_at_once, should_stop) is not None


def _require_files(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Raise UserError for weights that training would miss, days from now."""
    for stage in stages:
        assert recipe.training is not None
        name = recipe.training.of(stage).image_encoder
        is_file = name not in (None, TRAINED, "random")
        if name is not None and is_file and not Path(name).exists():
            raise UserError(
                f"training.{stage}.image_encoder = {name}: there is no such file or folder, and "
                f"this run trains {stage} once the corpus is clean; put it there, or stop before: "
                "--set run.until=select"
            )


def _require_one_qformer(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Raise UserError for a stage 2 that could not take up what stage 1 will have learned."""
    if len(stages) < 2 or recipe.training is None or recipe.training.stage2.start_from is not None:
        return
    from jobs.training.plan import blip2_preset  # brings torch

    first, second = (blip2_preset(stage, recipe.training.of(stage)) for stage in stages)
    if (first.vision, first.stage1) != (second.vision, second.stage1):
        names = [recipe.training.of(stage).preset for stage in stages]
        raise UserError(
            f"training.stage2.preset = {names[1]}: its image encoder or Q-Former has other sizes "
            f"than that of training.stage1.preset = {names[0]}, which it begins from; name presets "
            "that differ by their language model alone"
        )


def _report(recipe: Recipe) -> str | None:
    if not recipe.run.has_report:
        return None
    from pipeline.report.build import build_report

    try:
        return build_report(open_corpus(recipe.root)).page
    except ValueError as error:
        raise UserError(f"{recipe.root}: {error}") from error


def _measured(recipe: Recipe, stage: Stage) -> Figures:
    """Return a stage's figures on the held-out source; none where the recipe names no such."""
    if recipe.evaluation is None:
        return {}
    from jobs.evaluate import evaluate

    return evaluate(recipe, stage).figures
