"""What a recipe's `evaluation` and `ablation` sections may say. Light: every command reads them."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Arm = Literal["web", "filtered", "captioned", "capfilt"]
ARMS: tuple[Arm, ...] = get_args(Arm)
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class EvaluationConfig(BaseModel):
    """On what models are measured, and how."""

    model_config = _FROZEN

    source: str = Field(
        description="The source of the recipe that models are measured on; none trains on it."
    )
    num_candidates: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=128, description="Candidates of each query that ITM ranks anew (BLIP-2, Sec. 4.4)."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=64, description="Images or texts at a time; decides no figure."
    )
    labels: str | None = Field(
        default=None,
        description="Table of captions that people have looked at (CSV, Parquet or JSON lines), by "
        "which a model is judged as a filter: columns key, is_match and caption, or origin and "
        "index of a caption of the corpus; source where it is another than the one above.",
    )
    uses_java: bool = Field(
        default=False,
        description="Split words as the COCO server does and give METEOR too; both are Java, which "
        "has to be there. Without, figures are the same on every machine.",
    )
    max_images: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Look at the first so many images only."
    )


class AblationConfig(BaseModel):
    """The bootstrapping proof: one small model trained alike on differently cleaned corpora."""

    model_config = _FROZEN

    arms: Annotated[tuple[Arm, ...], Field(min_length=2)] = Field(
        default=ARMS, description="The corpora to compare; the first is what others are held to."
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        default=(0, 1, 2), description="Trainings of each arm; their spread is the error."
    )
    stage: Literal["med", "stage1"] = Field(
        default="stage1", description="What is trained on each arm, as `training` says."
    )
    sources: tuple[str, ...] | None = Field(
        default=None, description="Sources of the arms; left out: those of no human captions."
    )
