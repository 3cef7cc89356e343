"""A rehearsal: the same recipe on a thousandth of the lists and of the steps, in a root of its own.

Models, policies, batches and workers are the run's, so that what fits there fits here; only what
counts rows or steps is divided.
"""

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from jobs.errors import UserError
from jobs.training.config import STAGES

if TYPE_CHECKING:  # the recipe has this file's section
    from jobs.recipe import Recipe
    from jobs.training.config import Stage, StageConfig, TrainingConfig, WatchConfig

SUFFIX = "-rehearsal"
_MAX_NAME_CHARS = 63
# So much is left of a count, however large the run: less would rehearse nothing.
_MIN_ROWS_PER_SHARD = 100
_MIN_STEPS = 20
_MIN_STEPS_BETWEEN = 10  # checkpoints, probes
_MIN_STEPS_LOGGED = 5
_MIN_IMAGES_EVALUATED = 50
_MAX_HELD_OUT_SHARE = 0.05


class RehearsalConfig(BaseModel):
    """The section `rehearsal` of a recipe: what `--rehearsal` makes of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    one_in: Annotated[int, Field(ge=2)] = Field(
        default=1000, description="Reads one row in so many, and trains one step in so many."
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of the recipe, dotted as --set has them, and their values in a "
        "rehearsal, where a part of the recipe's own would be too little.",
    )


def rehearsed(recipe: "Recipe", config: RehearsalConfig) -> "Recipe":
    """Return the recipe of a rehearsal, without the overrides.

    Every list is read evenly, one row in so many. Raises UserError for a preset that is none, and
    for a root that has no place beside it.
    """
    one_in = config.one_in
    download = recipe.download
    evaluation = recipe.evaluation
    if evaluation is not None and evaluation.max_images is not None:
        max_images = _part(evaluation.max_images, one_in, _MIN_IMAGES_EVALUATED)
        evaluation = evaluation.model_copy(update={"max_images": max_images})
    training = recipe.training
    return recipe.model_copy(
        update={
            "name": recipe.name[: _MAX_NAME_CHARS - len(SUFFIX)] + SUFFIX,
            "root": _beside(recipe.root),
            "sources": tuple(
                each.model_copy(update={"one_in": each.one_in * one_in}) for each in recipe.sources
            ),
            # Of fewer rows, so that there are shards for all workers.
            "download": download.model_copy(
                update={
                    "rows_per_shard": _part(download.rows_per_shard, one_in, _MIN_ROWS_PER_SHARD)
                }
            ),
            "evaluation": evaluation,
            "training": None if training is None else _shorter(training, one_in),
            "rehearsal": None,
        }
    )


def _beside(root: str) -> str:
    """Return another root, in the folder or bucket of this one."""
    if "://" in root and not urlsplit(root).path.strip("/"):
        raise UserError(
            f"root = {root}: a rehearsal is written beside its run's root, and beside a whole "
            f"bucket there is only somebody's other one; name a folder in it: {root}/..."
        )
    return root.rstrip("/") + SUFFIX


def _shorter(config: "TrainingConfig", one_in: int) -> "TrainingConfig":
    """Return training of fewer steps, of the stages that the recipe has a section for."""
    asked = [stage for stage in STAGES if stage in config.model_fields_set]
    changes: dict[str, Any] = {stage: _stage(config, stage, one_in) for stage in asked}
    changes["watch"] = _watch(config.watch, one_in)
    # Of few images a larger share, or probes would have nothing to look at.
    most = max(config.held_out_share, _MAX_HELD_OUT_SHARE)
    changes["held_out_share"] = min(config.held_out_share * one_in, most)
    return config.model_copy(update=changes)


def _stage(config: "TrainingConfig", stage: "Stage", one_in: int) -> "StageConfig":
    """Return a stage with its steps divided; epochs are shorter by themselves."""
    from jobs.training.plan import hints_of  # brings torch

    section: StageConfig = getattr(config, stage)
    hints = hints_of(stage, config.of(stage))
    num_steps = section.num_steps
    if num_steps is None and section.num_epochs is None:
        num_steps = hints.num_steps
    warmup = hints.warmup_steps if section.warmup_steps is None else section.warmup_steps
    changes: dict[str, int] = {}
    if num_steps is not None:
        changes["num_steps"] = _part(num_steps, one_in, _MIN_STEPS)
    if warmup:
        changes["warmup_steps"] = _part(warmup, one_in, 1)
    return section.model_copy(update=changes)


def _watch(watch: "WatchConfig", one_in: int) -> "WatchConfig":
    """Return shorter pauses; alarms keep their patience, for few steps teach little."""
    return watch.model_copy(
        update={
            "log_every_steps": _part(watch.log_every_steps, one_in, _MIN_STEPS_LOGGED),
            "checkpoint_every_steps": _part(
                watch.checkpoint_every_steps, one_in, _MIN_STEPS_BETWEEN
            ),
            "probe_every_steps": _part(watch.probe_every_steps, one_in, _MIN_STEPS_BETWEEN),
        }
    )


def _part(count: int, one_in: int, minimum: int) -> int:
    """Return a part of a count, no less than `minimum` and no more than there was."""
    return min(count, max(minimum, round(count / one_in)))
