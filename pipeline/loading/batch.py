"""What goes to the workers and what comes back."""

from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.loading.order import Refs


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Which records one batch of one rank is made of."""

    step: int
    micro_batch: int
    epoch: int
    refs: Refs


@dataclass(frozen=True, slots=True)
class Replacement:
    """A record that could not be used, and the one of its shard that stands in for it."""

    shard: str
    key: str
    reason: str
    message: str
    substitute: str  # its key


@dataclass(frozen=True, slots=True)
class BatchFailure:
    """Why a worker could not make a batch at all."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """One rank's share of a step, or one micro-batch of that: B samples, always equally many."""

    step: int  # of the optimizer, from 0
    micro_batch: int  # which of the step's, from 0
    epoch: int  # of the step's first sample
    pixels: Tensor  # (B, 3, S, S) uint8 RGB, channels last in memory; see `Loader.normalise`
    texts: tuple[str, ...]
    image_ids: Tensor  # (B,) int64, in [0, 2**63), equal for equal images
    keys: tuple[str, ...]  # source/key
    replacements: tuple[Replacement, ...] = ()
    token_ids: Tensor | None = None  # (B, T) int64, and
    text_is_real: Tensor | None = None  # (B, T) bool, False on padding: what `tokenize` gave

    def __len__(self) -> int:
        return len(self.texts)

    def pin_memory(self) -> "TrainingBatch":
        """Return the batch in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory(), image_ids=self.image_ids.pin_memory())
