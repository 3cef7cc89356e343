"""How BLIP's repository and transformers' Blip classes call the weights of MED.

Ours stores what encoder and decoder share once; theirs has a copy for each. So a format is several
tables: a weight of ours is written once for every table that knows it, and two tensors of theirs
that are one of ours have to be equal.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.names.rename import Rename, to_ours, to_theirs
from model.names.vision import BLIP_VIT, BLIP_VIT_TRANSFORMERS, matches_any, prefixed

Table = tuple[Rename, ...]

_BLOCK = (
    Rename("query.{}", "self.query.{}"),
    Rename("key.{}", "self.key.{}"),
    Rename("value.{}", "self.value.{}"),
    Rename("output.{}", "output.dense.{}"),
    Rename("norm.{}", "output.LayerNorm.{}"),
)


def _bert(role: str) -> Table:
    """Return the table of one BERT of theirs, whose self-attention is that of `role` in ours."""
    return (
        Rename("embeddings.both.words.{}", "embeddings.word_embeddings.{}"),
        Rename("embeddings.both.positions.{}", "embeddings.position_embeddings.{}"),
        Rename("embeddings.both.norm.{}", "embeddings.LayerNorm.{}"),
        *prefixed(
            _BLOCK, ours=f"layers.{{}}.self_attention.{role}.", theirs="encoder.layer.{}.attention."
        ),
        *prefixed(
            _BLOCK,
            ours="layers.{}.cross_attention.both.",
            theirs="encoder.layer.{}.crossattention.",
        ),
        Rename("layers.{}.ffn.both.up.{}", "encoder.layer.{}.intermediate.dense.{}"),
        Rename("layers.{}.ffn.both.down.{}", "encoder.layer.{}.output.dense.{}"),
        Rename("layers.{}.ffn.both.norm.{}", "encoder.layer.{}.output.LayerNorm.{}"),
    )


ENCODER = prefixed(_bert("encoder"), ours="text.", theirs="text_encoder.")
DECODER = (
    *prefixed(_bert("decoder"), ours="text.", theirs="text_decoder.bert."),
    Rename("text.head.bias", "text_decoder.cls.predictions.bias"),
    Rename("text.head.dense.{}", "text_decoder.cls.predictions.transform.dense.{}"),
    Rename("text.head.norm.{}", "text_decoder.cls.predictions.transform.LayerNorm.{}"),
)
# transformers and BLIP's repository also store what the language head is tied to.
DECODER_TIES = (
    Rename("text.embeddings.both.words.weight", "text_decoder.cls.predictions.decoder.weight"),
    Rename("text.head.bias", "text_decoder.cls.predictions.decoder.bias"),
)
HEADS = (
    Rename("vision_proj.{}", "vision_proj.{}"),
    Rename("text_proj.{}", "text_proj.{}"),
    Rename("itm_head.{}", "itm_head.{}"),
)
# bert-base-uncased with its masked-language head, for a role that shares everything.
_BERT_WITH_HEAD = (
    *prefixed(_bert("both"), theirs="bert."),
    Rename("head.bias", "cls.predictions.bias"),
    Rename("head.dense.{}", "cls.predictions.transform.dense.{}"),
    Rename("head.norm.{}", "cls.predictions.transform.LayerNorm.{}"),
)
IMAGE_ENCODER = prefixed(BLIP_VIT.table, ours="image_encoder.", theirs="visual_encoder.")
IMAGE_ENCODER_TRANSFORMERS = prefixed(
    BLIP_VIT_TRANSFORMERS.table, ours="image_encoder.", theirs="vision_model."
)
MOMENTUM = (
    *prefixed(BLIP_VIT.table, ours="momentum.image_encoder.", theirs="visual_encoder_m."),
    *prefixed(_bert("encoder"), ours="momentum.text.", theirs="text_encoder_m."),
    Rename("momentum.vision_proj.{}", "vision_proj_m.{}"),
    Rename("momentum.text_proj.{}", "text_proj_m.{}"),
    Rename("temperature", "temp"),
    Rename("queue.image_feats", "image_queue"),
    Rename("queue.text_feats", "text_queue"),
)
QUEUE_OF_PRETRAINING = (Rename("queue.pointer", "queue_ptr"),)
QUEUE_OF_RETRIEVAL = (Rename("queue.pointer", "ptr_queue"), Rename("queue.image_ids", "idx_queue"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MedFormat:
    """A file format of one MED model; all of it is for `Sharing.ALL_BUT_SELF_ATTENTION`."""

    tables: tuple[Table, ...]
    unused: tuple[str, ...] = ()  # regular expressions of their names that are dropped
    not_held: tuple[str, ...] = ()  # regular expressions of our names without a place in it


_CONSTANTS = (r".*\.position_ids",)

PRETRAINING_BLIP = MedFormat(
    tables=(
        IMAGE_ENCODER + HEADS + ENCODER + MOMENTUM + QUEUE_OF_PRETRAINING,
        DECODER,
        DECODER_TIES,
    ),
    unused=_CONSTANTS,
    not_held=(r"queue\.image_ids",),  # pretraining tells pairs apart by their place in the batch
)
CAPTIONER_BLIP = MedFormat(tables=(IMAGE_ENCODER + DECODER, DECODER_TIES), unused=_CONSTANTS)
FILTER_BLIP = MedFormat(
    tables=(IMAGE_ENCODER + HEADS + ENCODER,),
    # A file of fine-tuning carries what only training needs; `FILTER_TRAINING_BLIP` reads it.
    unused=(*_CONSTANTS, r".*_m\..*", r"temp", r"(image|text|idx|ptr)_queue"),
)
FILTER_TRAINING_BLIP = MedFormat(
    tables=(IMAGE_ENCODER + HEADS + ENCODER + MOMENTUM + QUEUE_OF_RETRIEVAL,),
    unused=_CONSTANTS,
)

# BlipForConditionalGeneration and BlipForImageTextRetrieval.
CAPTIONER_TRANSFORMERS = MedFormat(
    tables=(IMAGE_ENCODER_TRANSFORMERS + DECODER, DECODER_TIES), unused=_CONSTANTS
)
FILTER_TRANSFORMERS = MedFormat(
    tables=(IMAGE_ENCODER_TRANSFORMERS + HEADS + ENCODER,),
    unused=_CONSTANTS,
    not_held=(r"momentum\..*", r"queue\..*", r"temperature"),  # of a model in training
)


def bert_name(ours: str) -> str | None:
    """Return which tensor of BERT a weight of `MedText` starts from; None for cross-attention.

    Encoder and decoder start from the same, whatever they share.
    """
    if ".cross_attention." in ours:
        return None
    return to_theirs(re.sub(r"\.(encoder|decoder)\.", ".both.", ours), _BERT_WITH_HEAD)


def modern_bert_name(name: str) -> str:
    """Return a tensor's present name: bert-base-uncased's file has LayerNorm.gamma and .beta."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def med_to_theirs(state: Mapping[str, Tensor], format: MedFormat) -> dict[str, Tensor]:
    """Return our weights as `format` names them; what it stores twice is cloned.

    Raises ValueError that lists our names that the format neither holds nor declares `not_held`.
    """
    theirs: dict[str, Tensor] = {}
    homeless: list[str] = []
    for name, tensor in state.items():
        names = [found for table in format.tables if (found := to_theirs(name, table))]
        theirs |= {found: tensor if n == 0 else tensor.clone() for n, found in enumerate(names)}
        if not names and not matches_any(name, format.not_held):
            homeless.append(name)
    if homeless:
        raise ValueError(f"this format has no place for {', '.join(sorted(homeless))}")
    return theirs


def med_to_ours(state: Mapping[str, Tensor], format: MedFormat) -> dict[str, Tensor]:
    """Return their weights under our names; what they store twice is taken once.

    Raises ValueError that lists their names that the format does not know, or the two names whose
    tensors should be one and differ.
    """
    ours: dict[str, Tensor] = {}
    taken_from: dict[str, str] = {}
    strange: list[str] = []
    for name, tensor in state.items():
        if matches_any(name, format.unused):
            continue
        found = next((hit for t in format.tables if (hit := to_ours(name, t))), None)
        if found is None:
            strange.append(name)
        elif found in ours and not torch.equal(ours[found], tensor):
            raise ValueError(f"{taken_from[found]} and {name} differ, but MED shares {found}")
        else:
            ours[found], taken_from[found] = tensor, name
    if strange:
        raise ValueError(f"this format knows no tensor named {', '.join(sorted(strange))}")
    return ours
