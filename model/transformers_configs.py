"""Our sizes and those of transformers' Blip and Blip2 configurations, both ways."""

from dataclasses import replace
from typing import Any

from transformers import Blip2Config, BlipConfig

from model.bert import BertConfig
from model.med import MedConfig
from model.qformer import QFormerConfig
from model.vision import EVA_CLIP_VIT_G, VisionConfig

# No transformer that anyone trained is larger; a config that says so would only eat memory.
_LIMITS = {"width": 65_536, "layers": 1_024, "vocabulary": 8_388_608, "positions": 1_048_576}


def blip_to_ours(config: BlipConfig) -> tuple[VisionConfig, MedConfig, int]:
    """Return the sizes of tower and text stack, and the joint width, of a Blip configuration.

    transformers does not record [ENC]; BLIP's follows [DEC], as written by `blip_to_theirs`.
    """
    text: Any = config.text_config
    tower: Any = config.vision_config
    bert = BertConfig(
        vocab_size=_sane(text.vocab_size, "vocabulary"),
        dropout=text.hidden_dropout_prob,
        norm_eps=text.layer_norm_eps,
        max_positions=_sane(text.max_position_embeddings, "positions"),
        **_stack(text),
    )
    med = MedConfig(
        bert=bert,
        image_width=_sane(tower.hidden_size, "width"),
        caption_start_id=text.bos_token_id,
        match_start_id=getattr(text, "enc_token_id", text.bos_token_id + 1),
    )
    return _tower(tower, VisionConfig()), med, config.image_text_hidden_size


def blip_to_theirs(vision: VisionConfig, med: MedConfig, joint_width: int) -> BlipConfig:
    """Return the Blip configuration with which transformers computes what ours does.

    Raises ValueError for a tower that its Blip classes do not have.
    """
    if not (vision.has_key_bias and vision.has_patch_bias and vision.has_norm_after):
        raise ValueError("transformers' Blip classes have BLIP's image encoders only")
    text = _bert_to_theirs(med.bert) | {
        "encoder_hidden_size": med.image_width,
        "bos_token_id": med.caption_start_id,
        "enc_token_id": med.match_start_id,
        "projection_dim": joint_width,
        "label_smoothing": 0.1,  # BLIP, as trained
    }
    return BlipConfig(
        text_config=text,
        vision_config=_tower_to_theirs(vision),
        image_text_hidden_size=joint_width,
        label_smoothing=0.1,
    )


def blip2_to_ours(config: Blip2Config, *, has_text: bool) -> tuple[VisionConfig, QFormerConfig]:
    """Return the sizes of tower and Q-Former of a Blip2 configuration."""
    theirs: Any = config.qformer_config
    tower: Any = config.vision_config
    qformer = QFormerConfig(
        vocab_size=_sane(theirs.vocab_size, "vocabulary"),
        dropout=theirs.hidden_dropout_prob,
        norm_eps=theirs.layer_norm_eps,
        max_positions=_sane(theirs.max_position_embeddings, "positions"),
        num_queries=_sane(config.num_query_tokens, "positions"),
        image_width=_sane(tower.hidden_size, "width"),
        cross_attention_every=theirs.cross_attention_frequency,
        has_text=has_text,
        **_stack(theirs),
    )
    return _tower(tower, EVA_CLIP_VIT_G), qformer


def blip2_to_theirs(vision: VisionConfig, qformer: QFormerConfig, **options: object) -> Blip2Config:
    """Return the Blip2 configuration of a tower and a Q-Former; `options` are its other fields.

    Raises ValueError for a tower that its Blip2 classes do not have: they know EVA-CLIP's only.
    """
    if vision.has_norm_before or vision.activation != "gelu" or vision.has_norm_after:
        raise ValueError(
            "transformers' Blip2 classes have no place for this image encoder, only for EVA-CLIP's;"
            " save it in LAVIS names"
        )
    theirs = _bert_to_theirs(qformer) | {
        "encoder_hidden_size": qformer.image_width,
        "cross_attention_frequency": qformer.cross_attention_every,
        "use_qformer_text_input": qformer.has_text,
    }
    make: Any = Blip2Config
    made: Blip2Config = make(
        vision_config=_tower_to_theirs(vision) | {"qkv_bias": True},
        qformer_config=theirs,
        num_query_tokens=qformer.num_queries,
        **options,
    )
    return made


def _tower(config: object, like: VisionConfig) -> VisionConfig:
    theirs: Any = config
    if theirs.hidden_act != "gelu":
        raise ValueError(f"the image encoder's activation is {theirs.hidden_act!r}, not 'gelu'")
    return replace(
        like,
        image_size=_sane(theirs.image_size, "positions"),
        patch_size=_sane(theirs.patch_size, "positions"),
        width=_sane(theirs.hidden_size, "width"),
        num_layers=_sane(theirs.num_hidden_layers, "layers"),
        num_heads=_sane(theirs.num_attention_heads, "width"),
        mlp_width=_sane(theirs.intermediate_size, "width"),
        norm_eps=theirs.layer_norm_eps,
        stem_widths=tuple(_sane(w, "width") for w in getattr(theirs, "stem_widths", ())),
    )


def _tower_to_theirs(vision: VisionConfig) -> dict[str, object]:
    # transformers has no convolutional stem. Our loaders read it back; theirs stops at the shape of
    # the patch embedding, and never computes something else in silence.
    ours_alone = {"stem_widths": list(vision.stem_widths)} if vision.stem_widths else {}
    return ours_alone | {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_width,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": "gelu",
        "initializer_range": vision.init_std,
    }


def _stack(config: object) -> dict[str, Any]:
    theirs: Any = config
    if theirs.hidden_act != "gelu":
        raise ValueError(f"the text stack's activation is {theirs.hidden_act!r}, not 'gelu'")
    return {
        "width": _sane(theirs.hidden_size, "width"),
        "num_layers": _sane(theirs.num_hidden_layers, "layers"),
        "num_heads": _sane(theirs.num_attention_heads, "width"),
        "ffn_width": _sane(theirs.intermediate_size, "width"),
    }


def _bert_to_theirs(bert: BertConfig) -> dict[str, object]:
    return {
        "vocab_size": bert.vocab_size,
        "hidden_size": bert.width,
        "num_hidden_layers": bert.num_layers,
        "num_attention_heads": bert.num_heads,
        "intermediate_size": bert.ffn_width,
        "max_position_embeddings": bert.max_positions,
        "layer_norm_eps": bert.norm_eps,
        "hidden_dropout_prob": bert.dropout,
        "attention_probs_dropout_prob": bert.dropout,
        "initializer_range": bert.init_std,
        "hidden_act": "gelu",
    }


def _sane(size: object, kind: str) -> int:
    if not isinstance(size, int) or not 1 <= size <= _LIMITS[kind]:
        raise ValueError(f"a config asks for {kind} {size!r}; 1 to {_LIMITS[kind]:,} is sane")
    return size
