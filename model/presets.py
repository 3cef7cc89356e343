"""Named sizes: the models of both papers, and tiny ones that train on a laptop's CPU.

A preset is data: configurations, the hyper-parameters that the paper trained them with, and methods
that build the modules. Under `torch.device("meta")` any of them is built in seconds, without
weights. Nothing here reads a file or the hub: a language model is described, and loaded by
`model.llm.load_llm` from its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from transformers import OPTConfig, PreTrainedConfig, T5Config

from model.bert import BertConfig
from model.capfilt import MedCaptioner, MedFilter
from model.llm import FrozenLlm, build_llm
from model.med import TINY_MED, MedConfig
from model.med_pretraining import MedObjectives, MedPretraining
from model.qformer import QFormerConfig
from model.stage1 import Stage1, Stage1Config
from model.stage2 import Stage2, Stage2Config
from model.vision import (
    BLIP_VIT_B,
    BLIP_VIT_L,
    CLIP_VIT_L,
    EVA_CLIP_VIT_G,
    TINY_VIT,
    FrozenImageEncoder,
    VisionConfig,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingHints:
    """How a paper trained a model: AdamW, linear warm-up, then a cosine or BLIP's decay.

    Steps count optimiser updates; `num_steps` None means that the paper counts epochs.
    """

    global_batch_size: int
    peak_rate: float
    floor_rate: float
    warmup_steps: int
    num_steps: int | None = None
    num_epochs: int | None = None
    warmup_rate: float = 1e-6  # where warm-up starts
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    rate_decay_per_epoch: float | None = None  # BLIP: instead of the cosine


def _blip_training(batch_size: int, peak_rate: float) -> TrainingHints:
    return TrainingHints(  # BLIP, Sec. 4.1; the released code decays by 0.9
        global_batch_size=batch_size,
        peak_rate=peak_rate,
        floor_rate=1e-6,
        warmup_steps=3000,
        num_epochs=20,
        betas=(0.9, 0.999),
        rate_decay_per_epoch=0.85,
    )


def _stage1_training(batch_size: int) -> TrainingHints:
    return TrainingHints(  # BLIP-2, Sec. 3.4; the paper gives a floor for stage 2 alone
        global_batch_size=batch_size,
        peak_rate=1e-4,
        floor_rate=1e-5,
        warmup_steps=2000,
        num_steps=250_000,
    )


def _stage2_training(batch_size: int) -> TrainingHints:
    return TrainingHints(  # BLIP-2, Sec. 3.4
        global_batch_size=batch_size,
        peak_rate=1e-4,
        floor_rate=5e-5,
        warmup_steps=2000,
        num_steps=80_000,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MedPreset:
    """A BLIP: MED for pretraining, and the captioner and filter that CapFilt makes of it."""

    vision: VisionConfig = BLIP_VIT_B
    med: MedConfig = field(default_factory=MedConfig)
    objectives: MedObjectives = field(default_factory=MedObjectives)
    training: TrainingHints = field(default_factory=lambda: _blip_training(2880, 3e-4))
    fine_tuned_image_size: int = 384  # of captioner and filter

    def pretraining(self) -> MedPretraining:
        """Return the model of all three objectives, with random weights (BLIP, Sec. 3.2)."""
        return MedPretraining(self.vision, self.med, self.objectives)

    def captioner(self) -> MedCaptioner:
        """Return the captioner, at the resolution of fine-tuning (BLIP, Sec. 3.3)."""
        return MedCaptioner(self._fine_tuned_vision(), self.med)

    def filter(self) -> MedFilter:
        """Return the filter, at the resolution of fine-tuning (BLIP, Sec. 3.3)."""
        joint_width = self.objectives.joint_width
        return MedFilter(self._fine_tuned_vision(), self.med, joint_width=joint_width)

    def with_vocabulary(self, size: int) -> Self:
        """Return the preset for a tokenizer of `size` tokens, behind which come [DEC] and [ENC]."""
        bert = replace(self.med.bert, vocab_size=size + 2)
        med = replace(self.med, bert=bert, caption_start_id=size, match_start_id=size + 1)
        return replace(self, med=med)

    def _fine_tuned_vision(self) -> VisionConfig:
        return replace(self.vision, image_size=self.fine_tuned_image_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlmPreset:
    """A language model: where it is found, how it is stored, and its sizes."""

    name: str | None  # on the hub; None: there is none, it is built with random weights
    dtype: torch.dtype
    config: PreTrainedConfig
    has_own_head: bool = False  # not tied to the word embeddings

    def build(self, *, has_dropout: bool = True) -> FrozenLlm:
        """Return it with random weights; for the trained ones, see `model.llm.load_llm`."""
        llm = build_llm(self.config, dtype=self.dtype, has_dropout=has_dropout)
        if self.has_own_head:
            llm.untie_head()
        return llm


@dataclass(frozen=True, kw_only=True, slots=True)
class Blip2Preset:
    """A BLIP-2: image encoder, Q-Former and language model, and how both stages were trained."""

    llm: LlmPreset
    vision: VisionConfig = EVA_CLIP_VIT_G
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage1_training: TrainingHints = field(default_factory=lambda: _stage1_training(1680))
    stage2_training: TrainingHints = field(default_factory=lambda: _stage2_training(1920))

    def build_stage1(self, *, image_dtype: torch.dtype = torch.float32) -> Stage1:
        """Return stage 1 with random weights around a frozen image encoder (BLIP-2, Sec. 3.2)."""
        return Stage1(self.stage1, FrozenImageEncoder(self.vision, dtype=image_dtype))

    def build_stage2(
        self, llm: FrozenLlm | None = None, *, image_dtype: torch.dtype = torch.float32
    ) -> Stage2:
        """Return stage 2 around `llm`, or around the preset's own with random weights (Sec. 3.3).

        Any LLM fits: the projection takes its width.
        """
        qformer = replace(self.stage1.qformer, has_text=False)
        tower = FrozenImageEncoder(self.vision, dtype=image_dtype)
        return Stage2(Stage2Config(qformer=qformer), tower, llm or self.llm.build())

    def with_vocabulary(self, size: int) -> Self:
        """Return the preset for a Q-Former tokenizer of `size` tokens, behind which comes [DEC]."""
        qformer = replace(self.stage1.qformer, vocab_size=size + 1)
        return replace(self, stage1=replace(self.stage1, qformer=qformer, caption_start_id=size))


def _opt(name: str | None, width: int, num_layers: int, num_heads: int) -> LlmPreset:
    config = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
    )
    return LlmPreset(name=name, dtype=torch.float16, config=config)


def _flan_t5(name: str, width: int, ffn_width: int, num_heads: int) -> LlmPreset:
    make: Any = T5Config  # its signature lacks what it takes over from its base
    config = make(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=ffn_width,
        num_layers=24,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",  # BLIP-2 was trained with the exact one
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return LlmPreset(name=name, dtype=torch.bfloat16, config=config, has_own_head=True)


_OPT_2_7B = _opt("facebook/opt-2.7b", 2560, 32, 32)
_OPT_6_7B = _opt("facebook/opt-6.7b", 4096, 32, 32)
_FLAN_T5_XL = _flan_t5("google/flan-t5-xl", 2048, 5120, 32)
_FLAN_T5_XXL = _flan_t5("google/flan-t5-xxl", 4096, 10240, 64)

_TINY_TRAINING = TrainingHints(
    global_batch_size=16, peak_rate=1e-3, floor_rate=1e-5, warmup_steps=20, num_steps=400
)


def _tiny_med() -> MedPreset:
    return MedPreset(
        vision=TINY_VIT,
        med=replace(TINY_MED, bert=replace(TINY_MED.bert, max_positions=64)),
        objectives=MedObjectives(joint_width=16, queue_size=256),
        training=_TINY_TRAINING,
        fine_tuned_image_size=TINY_VIT.image_size,
    )


def _large_med() -> MedPreset:
    return MedPreset(
        vision=BLIP_VIT_L,
        med=MedConfig(image_width=BLIP_VIT_L.width),
        objectives=MedObjectives(),
        training=_blip_training(2400, 2e-4),
    )


def _tiny_blip2() -> Blip2Preset:
    config = OPTConfig(
        vocab_size=512,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    qformer = QFormerConfig(
        vocab_size=129,
        width=64,
        num_layers=4,
        num_heads=4,
        ffn_width=128,
        max_positions=64,
        num_queries=8,
        image_width=TINY_VIT.width,
    )
    return Blip2Preset(
        vision=replace(TINY_VIT, has_key_bias=False, has_norm_after=False),
        stage1=Stage1Config(qformer=qformer, joint_width=16, caption_start_id=128),
        llm=LlmPreset(name=None, dtype=torch.float32, config=config),
        stage1_training=_TINY_TRAINING,
        stage2_training=_TINY_TRAINING,
    )


# What the demo trains: pictures of 48 px, captions of a hundred words, minutes on two cores. Its
# image encoder is given, as ImageNet's is to BLIP and CLIP's to BLIP-2.
DEMO_VIT = VisionConfig(
    image_size=48,
    patch_size=8,
    width=96,
    num_layers=2,
    num_heads=4,
    mlp_width=384,
    has_key_bias=False,
    has_norm_after=False,
    stem_widths=(24, 48, 96),
)
# BERT's 0.02 is for widths of 768 and above: at 96 it makes every layer nearly silent, and what is
# learned in 150 steps with 0.1 (retrieval of .33) is not begun with 0.02 (.02).
_DEMO_INIT_STD = 0.1
_DEMO_BERT = BertConfig(
    vocab_size=130,
    width=96,
    num_layers=2,
    num_heads=8,
    ffn_width=384,
    max_positions=64,
    dropout=0.0,
    init_std=_DEMO_INIT_STD,
)


def _demo_med() -> MedPreset:
    return MedPreset(
        # One block more than is given: what MED itself learns of images.
        vision=replace(DEMO_VIT, num_layers=3, has_key_bias=True, has_norm_after=True),
        med=MedConfig(
            bert=_DEMO_BERT,
            image_width=DEMO_VIT.width,
            caption_start_id=128,
            match_start_id=129,
        ),
        # So few steps are nothing to a momentum encoder: batches are compared with themselves.
        objectives=MedObjectives(joint_width=64, queue_size=0, momentum=0.0),
        training=replace(_TINY_TRAINING, global_batch_size=32, peak_rate=2e-3, num_steps=600),
        fine_tuned_image_size=DEMO_VIT.image_size,
    )


def _demo_blip2() -> Blip2Preset:
    config = OPTConfig(
        vocab_size=512,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    qformer = QFormerConfig(
        vocab_size=129,
        width=96,
        num_layers=2,
        num_heads=8,
        ffn_width=384,
        max_positions=64,
        dropout=0.0,
        init_std=_DEMO_INIT_STD,
        num_queries=8,
        image_width=DEMO_VIT.width,
        cross_attention_every=1,
    )
    training = replace(_TINY_TRAINING, global_batch_size=32, peak_rate=2e-3, num_steps=350)
    return Blip2Preset(
        vision=DEMO_VIT,
        stage1=Stage1Config(qformer=qformer, joint_width=64, caption_start_id=128),
        llm=LlmPreset(name=None, dtype=torch.float32, config=config),
        stage1_training=training,
        stage2_training=training,
    )


def _vit_g(llm: LlmPreset, stage2_batch_size: int) -> Blip2Preset:
    return Blip2Preset(llm=llm, stage2_training=_stage2_training(stage2_batch_size))


def _vit_l(llm: LlmPreset, stage2_batch_size: int) -> Blip2Preset:
    return Blip2Preset(
        llm=llm,
        vision=CLIP_VIT_L,
        stage1=Stage1Config(qformer=QFormerConfig(image_width=CLIP_VIT_L.width)),
        stage1_training=_stage1_training(2320),
        stage2_training=_stage2_training(stage2_batch_size),
    )


# BLIP (Table 10 compares the sizes); "large" is ViT-L with the same text stack.
MED_PRESETS: Mapping[str, MedPreset] = MappingProxyType(
    {"tiny": _tiny_med(), "demo": _demo_med(), "base": MedPreset(), "large": _large_med()}
)

# BLIP-2 (Table 2); its stage 1 does not depend on the language model.
BLIP2_PRESETS: Mapping[str, Blip2Preset] = MappingProxyType(
    {
        "tiny": _tiny_blip2(),
        "demo": _demo_blip2(),
        "blip2-opt-2.7b": _vit_g(_OPT_2_7B, 1920),
        "blip2-opt-6.7b": _vit_g(_OPT_6_7B, 1920),
        "blip2-flan-t5-xl": _vit_g(_FLAN_T5_XL, 1520),
        "blip2-flan-t5-xxl": _vit_g(_FLAN_T5_XXL, 1520),
        "blip2-vit-l-opt-2.7b": _vit_l(_OPT_2_7B, 1920),
        "blip2-vit-l-flan-t5-xl": _vit_l(_FLAN_T5_XL, 1520),
    }
)
