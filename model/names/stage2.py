"""How the weights of stage 2 are called in LAVIS and in transformers.

Tables start at `Stage2`, without the image encoder, whose tables stand in `model.names.vision`.
"""

from model.names.blip2 import QFORMER_LAVIS, QFORMER_TRANSFORMERS
from model.names.rename import Rename
from model.names.vision import prefixed


def _lavis(prefix: str) -> tuple[Rename, ...]:
    return (
        *prefixed(QFORMER_LAVIS, ours="qformer."),
        Rename("ln_vision.{}", "ln_vision.{}"),
        Rename("projection.{}", f"{prefix}_proj.{{}}"),
        Rename("llm.model.{}", f"{prefix}_model.{{}}"),
    )


# LAVIS names a model's projection and LLM after the kind of LLM.
STAGE2_LAVIS = {"opt": _lavis("opt"), "t5": _lavis("t5"), "llm": _lavis("llm")}

# Blip2ForConditionalGeneration.
STAGE2_TRANSFORMERS = (
    *prefixed(QFORMER_TRANSFORMERS, ours="qformer."),
    Rename("ln_vision.{}", "vision_model.post_layernorm.{}"),
    Rename("projection.{}", "language_projection.{}"),
    Rename("llm.model.{}", "language_model.{}"),
)
