"""The numbers of a training stage: the recipe's where it gives them, else the paper's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from jobs.errors import UserError
from jobs.training.config import Stage, StageConfig, is_med
from model.optim import AdamWConfig, DecayRule, EpochCosine, EpochStep, Schedule, WarmupCosine
from model.presets import BLIP2_PRESETS, MED_PRESETS, Blip2Preset, MedPreset, TrainingHints

Preset = TypeVar("Preset", MedPreset, Blip2Preset)


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of one stage, settled: nothing is left to a default."""

    global_batch_size: int
    num_steps: int
    schedule: Schedule
    adamw: AdamWConfig
    alpha_ramp_steps: int  # of MED's soft labels


def med_preset(stage: Stage, config: StageConfig) -> MedPreset:
    """Return the preset of a stage of BLIP's. Raises UserError for an unknown one."""
    return _preset(stage, config, MED_PRESETS)


def blip2_preset(stage: Stage, config: StageConfig) -> Blip2Preset:
    """Return the preset of a stage of BLIP-2's. Raises UserError for an unknown one."""
    return _preset(stage, config, BLIP2_PRESETS)


def _preset(stage: Stage, config: StageConfig, known: Mapping[str, Preset]) -> Preset:
    if config.preset is None or config.preset not in known:
        raise UserError(f"training.{stage}.preset = {config.preset!r}: none of {', '.join(known)}")
    return known[config.preset]


def hints_of(stage: Stage, config: StageConfig) -> TrainingHints:
    """Return how the paper trained this stage of this preset."""
    if not is_med(stage):
        blip2 = blip2_preset(stage, config)
        return blip2.stage1_training if stage == "stage1" else blip2.stage2_training
    training = med_preset(stage, config).training
    if stage == "med" or training.rate_decay_per_epoch is None:  # not one of the paper's sizes
        return training
    # COCO fine-tuning as released (BLIP): a cosine by epoch, without warm-up, down to zero.
    is_large = config.preset == "large"
    rate = (2e-6 if is_large else 1e-5) if stage == "captioner" else (5e-6 if is_large else 1e-5)
    return TrainingHints(
        global_batch_size=256,
        peak_rate=rate,
        floor_rate=0.0,
        warmup_steps=0,
        num_epochs=5 if stage == "captioner" else 6,
        betas=(0.9, 0.999),
    )


def plan_stage(stage: Stage, config: StageConfig, num_pairs: int) -> Plan:
    """Settle a stage's numbers for an epoch of `num_pairs`. Raises UserError.

    `num_pairs` is how many pairs one epoch has over all sources.
    """
    hints = hints_of(stage, config)
    batch = config.global_batch_size or hints.global_batch_size
    if num_pairs < batch:
        raise UserError(
            f"{stage} trains on {num_pairs:,} pairs, fewer than one global batch of {batch:,}; "
            f"add data or set training.{stage}.global_batch_size"
        )
    steps_per_epoch = num_pairs // batch
    num_steps = config.num_steps
    if num_steps is None and config.num_epochs is not None:
        num_steps = config.num_epochs * steps_per_epoch
    if num_steps is None:
        num_steps = hints.num_steps or (hints.num_epochs or 1) * steps_per_epoch
    return Plan(
        global_batch_size=batch,
        num_steps=num_steps,
        schedule=_schedule(stage, config, hints, num_steps, steps_per_epoch),
        adamw=AdamWConfig(
            weight_decay=hints.weight_decay if config.weight_decay is None else config.weight_decay,
            betas=(hints.betas[0], config.beta2 or hints.betas[1]),
            rule=DecayRule.ALL if is_med(stage) else DecayRule.DEFAULT,
        ),
        alpha_ramp_steps=(2 if stage == "med" else 1) * steps_per_epoch,
    )


def _schedule(
    stage: Stage, config: StageConfig, hints: TrainingHints, num_steps: int, steps_per_epoch: int
) -> Schedule:
    peak = config.peak_rate or hints.peak_rate
    floor = hints.floor_rate if config.floor_rate is None else config.floor_rate
    warmup = hints.warmup_steps if config.warmup_steps is None else config.warmup_steps
    start = min(hints.warmup_rate, peak)
    kind = config.schedule
    if kind is None and hints.rate_decay_per_epoch is not None:
        kind = "epoch_decay"
    if kind is None and hints.warmup_steps == 0:
        kind = "epoch_cosine"
    if kind == "epoch_decay":
        return EpochStep(
            steps_per_epoch=steps_per_epoch,
            peak=peak,
            floor=floor,
            start=start,
            warmup_steps=warmup,
            decay=hints.rate_decay_per_epoch or 0.85,
        )
    if kind == "epoch_cosine":
        epochs = max(-(-num_steps // steps_per_epoch), 1)
        return EpochCosine(
            steps_per_epoch=steps_per_epoch,
            num_epochs=epochs,
            peak=peak,
            floor=floor,
            start=start if warmup else None,
            warmup_steps=warmup,
        )
    if config.warmup_steps is None:
        warmup = min(warmup, num_steps // 10)  # the paper's, when training is as long as there
    return WarmupCosine(
        peak=peak, floor=floor, start=start, warmup_steps=warmup, total_steps=num_steps
    )
