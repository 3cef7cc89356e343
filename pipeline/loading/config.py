"""What a loader reads, in which shares, how large its batches are, and how it augments images."""

from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_FRACTION_STEPS = 1_000_000  # shares are rounded to millionths, so that counting them is exact
_LAION_FRACTION = 0.2
_Unit = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=1 / _FRACTION_STEPS, le=1000, allow_inf_nan=False)]
_Three = tuple[float, float, float]
_PACE = {"num_workers", "prefetch_batches", "cache_folder", "cache_bytes", "has_pinned_memory"}


class LoaderError(Exception):
    """Training data that cannot be loaded: what happened, where, and what to do."""


class Augmentation(StrEnum):
    """What is done to an image on its way into a batch (BLIP, Sec. 4.1)."""

    RESIZE = "resize"  # the whole image, direct bicubic resize: evaluation
    CROP = "crop"  # random resized crop and flip: both stages of BLIP-2
    CROP_RANDAUGMENT = "crop_randaugment"  # and RandAugment(2, 5): MED


class SourceConfig(BaseModel):
    """How much of a source an epoch holds: a share of its size, or a share of the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction_per_epoch: _Share | None = None
    """Passes over the source in an epoch. Unless set, 1, and a fifth for LAION (BLIP, Sec. 4.1)."""
    weight: _Share | None = None
    """Share of the epoch relative to the other sources' weights; all sources have one, or none."""

    @model_validator(mode="after")
    def _has_one_share(self) -> Self:
        if self.fraction_per_epoch is not None and self.weight is not None:
            raise ValueError("fraction_per_epoch and weight exclude each other; set one of them")
        return self

    def passes_per_epoch(self, name: str) -> Fraction:
        """Return how often an epoch goes over a source that has no weight."""
        default = _LAION_FRACTION if name.startswith("laion") else 1.0
        return exact(default if self.fraction_per_epoch is None else self.fraction_per_epoch)


class LoaderConfig(BaseModel):
    """What decides every batch of a training stage, and at what pace they are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Literal["clean", "raw"] = "clean"
    """Which shards are read; raw ones are the web as it came, with no caption filtered or made."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**20)] = 2880
    """Samples per optimizer step over all ranks and micro-batches."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """The sources to read; empty: all that the corpus has shards of."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides order, captions and augmentation."""
    group_shards: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Samples are shuffled over this many shards of a source at once; so many are kept open."""
    holdout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images that is kept from training, chosen by a hash of the image's bytes."""
    is_holdout: bool = False
    """Loads the images that are held out instead of the others."""

    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    """Side of the square images, in pixels."""
    augmentation: Augmentation = Augmentation.CROP
    """Which of the published recipes is followed."""
    min_crop_area: _Unit = 0.5
    """Least share of the image's area that a random crop shows."""
    mean: _Three = (0.48145466, 0.4578275, 0.40821073)
    """Of each channel in [0, 1], subtracted; CLIP's unless set."""
    std: _Three = (0.26862954, 0.26130258, 0.27577711)
    """Of each channel in [0, 1], divided by; CLIP's unless set."""
    max_pixels: Annotated[int, Field(ge=1, le=2**28)] = 50_000_000
    """Larger images are replaced, so that one file cannot take a worker's memory."""

    are_texts_cleaned: bool = True
    """Lower-cases captions, drops most punctuation and collapses spaces (BLIP's `pre_caption`)."""
    max_words: Annotated[int, Field(ge=1)] = 50
    """Cleaned captions end after so many words; BLIP's pretraining took 30."""

    num_workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Processes that decode; 0 decodes in the training process. Never changes a batch."""
    prefetch_batches: Annotated[int, Field(ge=1, le=64)] = 2
    """Batches per worker that are made ahead of their use."""
    has_pinned_memory: bool = False
    """Puts batches in page-locked memory, from which a CUDA device copies faster."""
    cache_folder: str | None = None
    """Local folder for copies of a remote corpus's shards; needed for one, unused otherwise."""
    cache_bytes: Annotated[int, Field(ge=1)] = 100 * 2**30
    """What the copies may take on disk; the least recently used are deleted."""

    @model_validator(mode="after")
    def _shares_are_of_one_kind(self) -> Self:
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = sorted(self.sources.keys() - set(weighted))
            raise ValueError(f"sources {without} have no weight while others do; give all one")
        if self.is_holdout and not self.holdout_fraction:
            raise ValueError("is_holdout needs a holdout_fraction above 0, the same as training's")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; each channel's must be positive")
        return self

    def content(self) -> dict[str, Any]:
        """Return what decides the batches, and nothing of their pace."""
        return self.model_dump(mode="json", exclude=_PACE)


def exact(share: float) -> Fraction:
    """Return the rational number that a share stands for, such as 1/5 for 0.2."""
    return Fraction(share).limit_denominator(_FRACTION_STEPS)
