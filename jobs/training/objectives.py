"""What a training stage has to say to the loop: its model, its losses, how to look at it, export.

Five stages are five classes (`blip`, `blip2`); the loop knows this module only.
Dims: B pairs of a micro-batch, T text tokens, S side of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jobs.training.gates import Expectations
from model.weight_files import Reasons


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch on the device: pixels (B, 3, S, S) float32, image ids (B,) int64, texts.

    `text` is what the stage's model reads, made by its `read_texts`; `texts` are the captions
    themselves.
    """

    pixels: Tensor
    image_ids: Tensor
    text: Any
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Moment:
    """What changes from one micro-batch to the next, beside the data."""

    alpha: float
    micro_batch: int
    num_micro_batches: int


@dataclass(frozen=True, slots=True)
class LmLook:
    """The language modelling loss of the same targets with the image, and twice without it.

    `blind` has it masked from the text's attention, so that no image has any say in it. A model
    that never learned without one may do badly then though what it sees tells it nothing; `blank`,
    with an image of the mean colour for every one, finds that out.
    """

    seen: float
    blind: float
    blank: float


@dataclass(frozen=True, slots=True)
class Look:
    """What a model makes of held-out pairs; None for what it cannot do.

    Features are normalised: images (B, E) or (B, Q, E), texts (B, E). `matches` are ITM logits of
    the true pairs and of each image with its neighbour's text, (B,) each. `lm` is what the image
    does to the language modelling loss.
    """

    image_feats: Tensor | None = None
    text_feats: Tensor | None = None
    matches: tuple[Tensor, Tensor] | None = None
    lm: LmLook | None = None
    captions: Sequence[str] | None = None


class Objective(Protocol):
    """One stage's model and what is done with it."""

    model: nn.Module
    frozen: Reasons  # names of weights that no checkpoint holds, each with the reason
    expected: Expectations

    def read_texts(self, texts: Sequence[str], keys: Sequence[str], step: int) -> Any:  # noqa: ANN401
        """Return what `losses` reads of captions, on the CPU; keys and step seed what is drawn."""

    def losses(self, forward: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Return the losses of a batch by name; `loss` is what is minimised.

        `forward` is the model as it has to be called.
        """

    def numbers(self) -> dict[str, float]:
        """Return what else a record should hold, such as the temperature."""

    def look(self, batch: Batch) -> Look:
        """Return what the model makes of held-out pairs, in evaluation mode."""

    def export(self, folder: Path) -> None:
        """Write the model as transformers loads it, with its tokenizer, into an empty folder."""


def to_device(text: Any, device: torch.device) -> Any:  # noqa: ANN401 -- each stage has its own
    """Return what a stage reads of captions on a device: tensors, tuples of them, or our texts."""
    if isinstance(text, tuple):
        return tuple(to_device(part, device) for part in text)
    return text.to(device, non_blocking=True) if isinstance(text, Tensor) else text.to(device)
