"""From URLs to a trained model, in order; every step is there already or is made.

Download; captioner and filter, where the recipe trains its own; captions, scores, selection; a page
to look at; then the stages of BLIP-2 that the recipe has a section for, each measured on what none
has seen. The same call continues wherever it ended. A recipe that names published captioner and
filter needs no training in between, and its data stages overlap.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from jobs import run as data_run
from jobs.corpus_root import open_corpus
from jobs.errors import RunError, UserError
from jobs.recipe import Recipe
from jobs.run_config import Until
from jobs.stages.stages import untrained
from jobs.summary import RunSummary
from jobs.training.config import TRAINED, Stage

_BOOTSTRAP: tuple[Stage, ...] = ("med", "captioner", "filter")
_BLIP2: Mapping[Until, tuple[Stage, ...]] = {
    "select": (),
    "stage1": ("stage1",),
    "stage2": ("stage1", "stage2"),
}


def run_whole(
    recipe: Recipe,
    should_stop: Callable[[], bool],
    *,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Make the corpus and the models that a recipe asks for, as far as `run.until`.

    Raises UserError, for what BLIP-2 lacks before anything is fetched, and whatever a stage raises.
    """
    stages = blip2_stages(recipe)
    _require_files(recipe, stages)
    _require_one_qformer(recipe, stages)
    summary = _make_corpus(recipe, should_stop, address, command)
    if summary.exit_code or recipe.select is None:
        return summary
    summary = replace(summary, report=_report(recipe))
    for stage in stages:
        if not train(recipe, (stage,), should_stop):
            return replace(summary, is_stopped=True)
        summary = replace(summary, models=summary.models | {stage: _measured(recipe, stage)})
    return summary


def blip2_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of BLIP-2 that a run of the recipe trains: those it has a section for."""
    if recipe.training is None or recipe.select is None:
        return ()
    wanted = recipe.training.model_fields_set
    return tuple(stage for stage in _BLIP2[recipe.run.until] if stage in wanted)


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


def _make_corpus(
    recipe: Recipe, should_stop: Callable[[], bool], address: str | None, command: str
) -> RunSummary:
    if untrained(recipe):
        summary = data_run.run_stage(
            recipe, "download", should_stop, address=address, command=command
        )
        if summary.exit_code:
            return summary
        if not train(recipe, _BOOTSTRAP, should_stop):
            return replace(summary, is_stopped=True)
    return data_run.run(recipe, should_stop, address=address, command=command)


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


def _measured(recipe: Recipe, stage: Stage) -> dict[str, float]:
    """Return a stage's figures on the held-out source; none where the recipe names no such."""
    if recipe.evaluation is None:
        return {}
    from jobs.evaluate import evaluate

    return evaluate(recipe, stage).figures
