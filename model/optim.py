"""Which parameters decay and how fast each learns: groups, AdamW, and the rate at every step.

A rate is a pure function of the step, so training resumes from the step number alone. A step counts
optimiser updates from 0, over all epochs.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypedDict

import torch
from torch import nn


class DecayRule(Enum):
    """Which parameters weight decay pulls on."""

    DEFAULT = "BLIP-2's, but a scalar (the temperature) does not decay"
    BLIP2 = "all but one-dimensional ones and those whose name ends in .bias; so scalars decay too"
    LAVIS = "all of two dimensions and more whose name holds no bias, ln or bn"
    ALL = "every one, as BLIP"

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Say whether a parameter of this name decays."""
        if self is DecayRule.ALL:
            return True
        if self is DecayRule.LAVIS:
            return parameter.ndim >= 2 and not re.search("bias|ln|bn", name)
        is_spared = parameter.ndim == 1 or name.endswith(".bias")
        return not is_spared and (self is DecayRule.BLIP2 or parameter.ndim > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDecay:
    """Let an image encoder's early blocks learn slower than its late ones (BLIP-2, Table 6-8).

    With N blocks, the stem (patches, positions, CLS, LayerNorm before the blocks) has layer id 0,
    block j id j+1, the rest of the encoder N; a layer's rate is multiplied by rate^(N+1-id). What
    lies outside the encoder keeps its rate.
    """

    encoder: str = "image_encoder."  # what the names of the encoder's parameters begin with
    num_blocks: int
    rate: float
    block: str = r"(?:^|\.)(?:blocks|layers|resblocks)\.(\d+)\."  # finds the block's number
    stem: str = r"cls_|class_|pos_embed|position|patch|conv1|ln_pre|pre_layrnorm|norm_before"

    def scale(self, name: str) -> float:
        """Return what the rate of the parameter of this name is multiplied by."""
        if not name.startswith(self.encoder):
            return 1.0
        inside = name.removeprefix(self.encoder)
        if found := re.search(self.block, inside):
            layer = int(found.group(1)) + 1
        else:
            layer = 0 if re.search(self.stem, inside) else self.num_blocks
        return float(self.rate ** (self.num_blocks + 1 - layer))


class ParameterGroup(TypedDict):
    """One group for a torch optimiser; `lr_scale` multiplies every rate that it is given."""

    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float
    lr_scale: float


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float = 0.05,
    rule: DecayRule = DecayRule.DEFAULT,
    layer_decay: LayerDecay | None = None,
) -> list[ParameterGroup]:
    """Return the parameters that learn, by decay and rate, in order of first appearance.

    Frozen parameters are left out. Each group lists the names of its parameters.
    """
    groups: dict[tuple[bool, float], ParameterGroup] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        decays = rule.decays(name, parameter)
        scale = 1.0 if layer_decay is None else layer_decay.scale(name)
        group = groups.setdefault(
            (decays, scale),
            ParameterGroup(
                params=[], names=[], weight_decay=weight_decay if decays else 0.0, lr_scale=scale
            ),
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig:
    """AdamW as the paper has it (BLIP-2, Sec. 4.1); the released yamls leave beta2 at 0.999."""

    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    rule: DecayRule = DecayRule.DEFAULT
    layer_decay: LayerDecay | None = None


def build_adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters, fused where the device has it.

    The rate is 0 until `set_learning_rate` gives one. Raises ValueError when nothing is trainable.
    """
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=config.weight_decay,
        rule=config.rule,
        layer_decay=config.layer_decay,
    )
    if not groups:
        raise ValueError("the model has no trainable parameter: everything is frozen")
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=devices <= {"cuda", "cpu"},
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate times its `lr_scale`; call it before each update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class Schedule(Protocol):
    """A learning rate for every step."""

    def __call__(self, step: int) -> float:
        """Return the rate of optimiser update `step`, counted from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupCosine:
    """Linear warm-up, then one half cosine, both by step (BLIP-2, Sec. 4.1).

    The defaults are stage 1's; stage 2 has total_steps 80,000 and floor 5e-5.
    """

    peak: float = 1e-4
    floor: float = 0.0
    start: float = 1e-6
    warmup_steps: int = 2000
    total_steps: int = 250_000

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, total_steps {self.total_steps}: "
                "the warm-up must end before training does"
            )

    def __call__(self, step: int) -> float:
        """Return the rate: `start` at 0, `peak` when the warm-up ends, `floor` from the last on."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return _half_cosine(self.peak, self.floor, min(done, 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochCosine:
    """LAVIS's schedule: warm-up inside epoch 0, then a cosine that is constant within an epoch.

    A warm-up longer than epoch 0 is cut off there and the rate jumps: kept as it was released. With
    no warm-up and a floor of 0 it is also what BLIP fine-tunes with.
    """

    steps_per_epoch: int
    num_epochs: int
    peak: float = 1e-4
    floor: float = 1e-5
    start: float | None = None  # None: the peak
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Return the rate of the epoch that `step` falls into, or of the warm-up in epoch 0."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        if epoch == 0:
            return _epoch_warmup(inside, self.start, self.peak, self.warmup_steps)
        return _half_cosine(self.peak, self.floor, epoch / self.num_epochs)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochStep:
    """BLIP's pre-training schedule: warm-up inside epoch 0, then times `decay` an epoch (Sec. 4.1).

    The defaults are ViT-B's in the released yaml; the paper's decay is 0.85.
    """

    steps_per_epoch: int
    peak: float = 3e-4
    floor: float = 1e-6
    start: float | None = 1e-6  # None: the peak
    warmup_steps: int = 3000
    decay: float = 0.9

    def __call__(self, step: int) -> float:
        """Return the rate of the epoch that `step` falls into, or of the warm-up in epoch 0."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        if epoch == 0:
            return _epoch_warmup(inside, self.start, self.peak, self.warmup_steps)
        return max(self.floor, self.peak * self.decay**epoch)


def soft_label_weight(step: int, *, ramp_steps: int, peak: float = 0.4) -> float:
    """Return BLIP's alpha, the weight of the momentum model's labels: linear up to `peak`.

    The ramp lasts two epochs in pre-training, one in fine-tuning (BLIP, Sec. 4.1, as released).
    """
    return peak * min(1.0, step / ramp_steps)


def _epoch_warmup(inside: int, start: float | None, peak: float, warmup_steps: int) -> float:
    start = peak if start is None else start
    return min(peak, start + (peak - start) * inside / max(warmup_steps, 1))


def _half_cosine(peak: float, floor: float, done: float) -> float:
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * done))
