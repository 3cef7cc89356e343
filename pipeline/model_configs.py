"""What a recipe says of captioner and scorer. Light: a recipe is read by commands without torch."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelConfig(BaseModel):
    """Which model: a name on the Hugging Face hub, or a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    """`owner/name` on the hub, or the path of a local folder as transformers saves it."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Commit, tag or branch on the hub; None is the main branch. Not for a folder. Only a commit is
    the same model another day."""


class Method(StrEnum):
    """How captions are decoded."""

    NUCLEUS = "nucleus"  # sampled: CapFilt's, for its captions say more that is new (Sec. 4.2)
    BEAM = "beam"  # searched: the likeliest, and the safest
    GREEDY = "greedy"


class CaptionerConfig(ModelConfig):
    """Which captioner, how many captions an image, and how they are decoded (BLIP, Sec. 3.3)."""

    name: Annotated[str, Field(min_length=1)] = "Salesforce/blip-image-captioning-large"
    """A captioning checkpoint of BLIP: on the hub, or a folder that transformers can read."""
    num_captions: Annotated[int, Field(ge=1, le=1000)] = 1
    """BLIP makes one an image, BLIP-2 ten (Sec. 3.4)."""
    method: Method = Method.NUCLEUS
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus: sample among the likeliest tokens that together have this probability."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Nucleus: sample among at most so many tokens."""
    min_length: Annotated[int, Field(ge=0, le=512)] = 5
    """Tokens before which no caption ends; the prompt's count, as in BLIP."""
    max_length: Annotated[int, Field(ge=1, le=512)] = 20
    """Tokens at which every caption ends, prompt and end included."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.1
    """Tokens so far, the prompt's too, lose by this factor; 1 switches it off."""
    num_beams: Annotated[int, Field(ge=1, le=100)] = 3
    prompt: str = "a picture of "
    """What every caption goes on from; it is cut off again."""
    is_compiled: bool = False
    """Compile a decoding step, and capture it as a graph with CUDA: slow to start, fast to run."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.num_captions > 1 and self.method is not Method.NUCLEUS:
            raise ValueError(
                f"num_captions is {self.num_captions}, but {self.method} finds one caption an "
                f"image; use nucleus, or 1"
            )
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is over max_length {self.max_length}")
        return self

    def content(self) -> dict[str, Any]:
        """Return what decides the captions, beside seed and weights: those have a fingerprint."""
        common = {"method", "num_captions", "min_length", "max_length", "repetition_penalty"}
        own = {
            Method.NUCLEUS: {"top_p", "temperature", "top_k"},
            Method.BEAM: {"num_beams"},
            Method.GREEDY: set[str](),
        }[self.method]
        return self.model_dump(mode="json", include=common | own | {"prompt"})


class ScorerConfig(BaseModel):
    """By which models captions are scored. Both look at every caption, the web's too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter: ModelConfig | None = ModelConfig(name="Salesforce/blip-itm-large-coco")
    """BLIP's image-text matching checkpoint, for ITM and ITC; null leaves both out."""
    clip: ModelConfig | None = ModelConfig(name="openai/clip-vit-large-patch14")
    """BLIP-2 ranks by CLIP ViT-L/14 (Sec. 3.4); null leaves it out."""
    keeps_cls: bool = False
    """Score ITM behind [CLS], not [ENC]: only to compare with scores that were made so."""
    has_itc: bool = True
    """Whether ITC is computed beside ITM; it is a second pass over the texts."""
    is_text_cleaned: bool = True
    """Whether the filter reads texts as BLIP cleaned them for training; CLIP reads them as is."""
    max_tokens: Annotated[int, Field(ge=3, le=512)] = 35
    """What the filter reads of a text; the rest is cut off. BLIP was trained with 35."""

    @model_validator(mode="after")
    def _scores_something(self) -> Self:
        if self.filter is None and self.clip is None:
            raise ValueError("neither filter nor clip is set: there is nothing to score by")
        return self

    def content(self) -> dict[str, Any]:
        """Return what decides the scores, beside the weights: those have fingerprints."""
        content: dict[str, Any] = {"clip": self.clip is not None, "filter": self.filter is not None}
        if self.filter is not None:
            own = {"keeps_cls", "has_itc", "is_text_cleaned", "max_tokens"}
            content |= self.model_dump(mode="json", include=own)
        return content
