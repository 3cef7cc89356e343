"""How raw shards are scored: what decides the captions' bytes, and what only decides the pace."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_PACE = frozenset({"batch_size", "max_batch_size", "num_decoders"})


class ScoreConfig(BaseModel):
    """How images are read for the models, how many at a time, and in which precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Images captioned and scored at a time; halved whenever memory runs out. `auto` is what fits
    the GPU, tried once per process; on a CPU, where more gains nothing, it is small."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 128
    """The most that `auto` chooses, a power of two. Twice as many images wait in memory, at up to
    5 MB each."""
    num_decoders: Annotated[int, Field(ge=1, le=256)] = 2
    """Threads that decode ahead of the models, each with one image at a time."""
    max_pixels: Annotated[int, Field(ge=1, le=2**28)] = 50_000_000
    """Bounds memory, as for downloads: decoding takes up to 8 bytes a pixel, of WebP 17."""
    max_aspect: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 100.0
    """Longer side over shorter side. CLIP makes the shorter side its own, and a line one pixel high
    would become billions of pixels."""
    max_caption_chars: Annotated[int, Field(ge=1)] = 10_000
    """Longer texts are no captions; they are dropped unscored, and cut to this in the sidecar."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations. In float32 a caption does not depend on what shares its batch; in
    bfloat16, which is what GPUs are fast in, it may change with the batch size."""

    def content(self) -> dict[str, Any]:
        """Return the settings that decide what sidecars hold, for their fingerprint."""
        return self.model_dump(mode="json", exclude=set(_PACE))
