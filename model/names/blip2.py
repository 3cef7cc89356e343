"""How the weights of the Q-Former and of stage 1 are called in LAVIS, transformers and BERT.

Tables of a Q-Former start at the `QFormer` itself; those of stage 1 at `Stage1`, without the image
encoder, whose tables stand in `model.names.vision`.
"""

from model.names.rename import Rename
from model.names.vision import prefixed

_PROJECTIONS = ("query", "key", "value")


def _attention(ours: str, theirs: str, inner: str) -> tuple[Rename, ...]:
    """One attention block; `inner` is what the other format calls its projections' module."""
    return (
        *(Rename(f"{ours}.{name}.{{}}", f"{theirs}.{inner}.{name}.{{}}") for name in _PROJECTIONS),
        Rename(f"{ours}.output.{{}}", f"{theirs}.output.dense.{{}}"),
        Rename(f"{ours}.norm.{{}}", f"{theirs}.output.LayerNorm.{{}}"),
    )


def _ffn(ours: str, suffix: str) -> tuple[Rename, ...]:
    return (
        Rename(f"{ours}.up.{{}}", f"intermediate{suffix}.dense.{{}}"),
        Rename(f"{ours}.down.{{}}", f"output{suffix}.dense.{{}}"),
        Rename(f"{ours}.norm.{{}}", f"output{suffix}.LayerNorm.{{}}"),
    )


def _layers(inner: str, theirs: str) -> tuple[Rename, ...]:
    """All layers; `theirs` leads to layer {}."""
    lines = (
        *_attention("attention", "attention", inner),
        *_attention("cross_attention", "crossattention", inner),
        *_ffn("text_ffn", ""),
        *_ffn("query_ffn", "_query"),
    )
    return prefixed(lines, ours="layers.{}.", theirs=theirs)


def _embeddings(norm: str, text: str) -> tuple[Rename, ...]:
    return (
        Rename("embedding_norm.{}", f"{norm}.{{}}"),
        Rename("word_embeddings.weight", f"{text}.word_embeddings.weight"),
        Rename("position_embeddings.weight", f"{text}.position_embeddings.weight"),
    )


_BERT_HEAD = (
    Rename("language_head.dense.{}", "cls.predictions.transform.dense.{}"),
    Rename("language_head.norm.{}", "cls.predictions.transform.LayerNorm.{}"),
    Rename("language_head.bias", "cls.predictions.bias"),
)

# bert-base-uncased with its masked-language head: what a new Q-Former starts from.
BERT = (
    *_embeddings("bert.embeddings.LayerNorm", "bert.embeddings"),
    *_layers("self", "bert.encoder.layer.{}."),
    *_BERT_HEAD,
)

QFORMER_LAVIS = (
    Rename("query_tokens", "query_tokens"),
    *prefixed(BERT, theirs="Qformer."),
)

# Blip2ForImageTextRetrieval and the Blip2 text and vision models with projection; the classes of
# stage 2 hold the same names without text embeddings and text FFNs.
QFORMER_TRANSFORMERS = (
    Rename("query_tokens", "query_tokens"),
    *_embeddings("qformer.layernorm", "embeddings"),
    *_layers("attention", "qformer.encoder.layer.{}."),
)

# InstructBlip keeps its text embeddings inside the Q-Former.
QFORMER_INSTRUCTBLIP = (
    Rename("query_tokens", "query_tokens"),
    *_embeddings("qformer.embeddings.layernorm", "qformer.embeddings"),
    *_layers("attention", "qformer.encoder.layer.{}."),
)

STAGE1_LAVIS = (
    *prefixed(QFORMER_LAVIS, ours="qformer."),
    Rename("ln_vision.{}", "ln_vision.{}"),
    Rename("vision_proj.{}", "vision_proj.{}"),
    Rename("text_proj.{}", "text_proj.{}"),
    Rename("itm_head.{}", "itm_head.{}"),
    Rename("temperature", "temp"),
)

# Note that transformers builds post_layernorm with eps 1e-6, where ln_vision has 1e-5.
STAGE1_TRANSFORMERS = (
    *prefixed(QFORMER_TRANSFORMERS, ours="qformer."),
    Rename("ln_vision.{}", "vision_model.post_layernorm.{}"),
    Rename("vision_proj.{}", "vision_projection.{}"),
    Rename("text_proj.{}", "text_projection.{}"),
    Rename("itm_head.{}", "itm_head.{}"),
)

# What Blip2ForImageTextRetrieval cannot hold: patterns of our names, for a file beside it.
STAGE1_NOT_IN_TRANSFORMERS = (r"temperature", r"qformer\.language_head\..+")

# LAVIS stores tied tensors twice: the second name and the one it repeats.
LAVIS_ALIASES = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}

# A constant 0..511 that older files carry as a buffer.
LAVIS_UNUSED = (r"Qformer\.bert\.embeddings\.position_ids",)

# What a BERT file holds and a Q-Former does not: token types, pooler and next-sentence head, the
# tied projection, and the constant positions.
BERT_UNUSED = (
    r"bert\.embeddings\.(token_type_embeddings\.weight|position_ids)",
    r"bert\.pooler\.dense\.(weight|bias)",
    r"cls\.seq_relationship\.(weight|bias)",
    r"cls\.predictions\.decoder\.(weight|bias)",
)
