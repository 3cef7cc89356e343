"""Folders of transformers: every model from them, and into them for its Blip and Blip2 classes.

A folder holds config.json, safetensors, and beside them what transformers has no place for, which
comes back on loading. A tensor that is missing, unexpected or misshapen is an error that lists
names; nothing is allocated before names and shapes are known to fit. Files of LAVIS and BLIP are
read and written by `model.lavis_files`.

One deviation remains: transformers gives BLIP-2's `ln_vision` (its post_layernorm) the eps of the
blocks, 1e-6, where BLIP-2 has 1e-5. A loaded model computes what transformers does; a saved one
differs there by a share of 4.5e-6 over the variance of the image tokens. Our own loader finds the
right eps in config.json again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Blip2Config, BlipConfig, PreTrainedConfig

from model.capfilt import MedCaptioner, MedFilter
from model.llm import build_llm
from model.names.blip import (
    CAPTIONER_TRANSFORMERS,
    FILTER_TRANSFORMERS,
    MedFormat,
    med_to_ours,
    med_to_theirs,
)
from model.names.blip2 import STAGE1_NOT_IN_TRANSFORMERS, STAGE1_TRANSFORMERS
from model.names.stage2 import STAGE2_TRANSFORMERS
from model.names.towers import Table, with_tower_to_ours, with_tower_to_theirs
from model.names.vision import EVA_VIT_TRANSFORMERS
from model.stage1 import Stage1, Stage1Config
from model.stage2 import Stage2, Stage2Config
from model.transformers_configs import (
    blip2_to_ours,
    blip2_to_theirs,
    blip_to_ours,
    blip_to_theirs,
)
from model.vision import FrozenImageEncoder, ImageEncoder
from model.weight_files import (
    CheckpointError,
    Reasons,
    load_strictly,
    matches,
    read_json,
    read_weights,
    write_weights,
)

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config", BlipConfig, Blip2Config)

OURS_ALONE = "capfilt.safetensors"  # beside model.safetensors: what transformers cannot hold
# What may be missing from a folder, and why.
NOT_IN_TRANSFORMERS: Reasons = {
    pattern: "Blip2ForImageTextRetrieval has no such weight: without our own file it starts anew"
    for pattern in STAGE1_NOT_IN_TRANSFORMERS
}
# The image token of the converted models on the hub: by kind of LLM and size of its vocabulary.
_IMAGE_TOKENS = {("opt", 50272): 50265, ("opt", 50304): 50265, ("t5", 32128): 32100}


def load_captioner(folder: Path) -> MedCaptioner:
    """Return the captioner of BlipForConditionalGeneration, in evaluation mode, float32."""
    vision, med, _ = blip_to_ours(_config(folder, BlipConfig))
    weights = med_to_ours(read_weights(folder), CAPTIONER_TRANSFORMERS)
    return _built(lambda: MedCaptioner(vision, med), weights, folder)


def save_captioner(model: MedCaptioner, folder: Path) -> None:
    """Write a folder that BlipForConditionalGeneration loads, with equal logits."""
    config = blip_to_theirs(model.image_encoder.config, model.text.config, joint_width=256)
    _save_med(model, config, "BlipForConditionalGeneration", CAPTIONER_TRANSFORMERS, folder)


def load_filter(folder: Path) -> MedFilter:
    """Return the filter of BlipForImageTextRetrieval, in evaluation mode, float32.

    Its scores are transformers' with `keeps_cls`; without, [ENC] takes [CLS]'s place as in BLIP.
    """
    vision, med, joint_width = blip_to_ours(_config(folder, BlipConfig))
    weights = med_to_ours(read_weights(folder), FILTER_TRANSFORMERS)
    return _built(lambda: MedFilter(vision, med, joint_width=joint_width), weights, folder)


def save_filter(model: MedFilter, folder: Path) -> None:
    """Write a folder that BlipForImageTextRetrieval loads, with equal logits."""
    joint_width = model.vision_proj.out_features
    config = blip_to_theirs(model.image_encoder.config, model.text.config, joint_width)
    _save_med(model, config, "BlipForImageTextRetrieval", FILTER_TRANSFORMERS, folder)


def load_stage1(
    folder: Path, *, ln_vision_eps: float | None = None, image_dtype: torch.dtype = torch.float32
) -> Stage1:
    """Return stage 1 of Blip2ForImageTextRetrieval, in evaluation mode.

    Temperature and language head come from our own file where there is one, and start anew
    otherwise. `ln_vision_eps` None computes what transformers does, or what was saved; 1e-5 is
    right for weights that LAVIS trained. `image_dtype` is how the frozen tower is stored.
    """
    theirs = _config(folder, Blip2Config)
    vision, qformer = blip2_to_ours(theirs, has_text=True)
    config = Stage1Config(
        qformer=qformer,
        joint_width=theirs.image_text_hidden_size,
        # transformers does not record [DEC]; it is what BLIP-2 appends to BERT's vocabulary.
        caption_start_id=getattr(theirs, "caption_start_id", qformer.vocab_size - 1),
    )
    weights = _read_blip2(folder, STAGE1_TRANSFORMERS)

    def build() -> Stage1:
        return Stage1(config, FrozenImageEncoder(vision, dtype=image_dtype))

    model = _built(build, weights, folder, NOT_IN_TRANSFORMERS)
    model.ln_vision.eps = _ln_vision_eps(theirs, ln_vision_eps)
    return model


def save_stage1(model: Stage1, folder: Path) -> None:
    """Write a folder that Blip2ForImageTextRetrieval loads; temperature and head stand beside.

    Raises ValueError for an image encoder that transformers' Blip2 classes do not have.
    """
    config = blip2_to_theirs(
        _tower_of(model).config,
        model.config.qformer,
        image_text_hidden_size=model.config.joint_width,
        caption_start_id=model.config.caption_start_id,
        ln_vision_eps=model.ln_vision.eps,
        architectures=["Blip2ForImageTextRetrieval"],
    )
    _save_blip2(model, config, STAGE1_TRANSFORMERS, NOT_IN_TRANSFORMERS, folder)


def load_stage2(
    folder: Path,
    *,
    llm_dtype: torch.dtype = torch.float32,
    has_dropout: bool = True,
    ln_vision_eps: float | None = None,
    image_dtype: torch.dtype = torch.float32,
) -> Stage2:
    """Return stage 2 of Blip2ForConditionalGeneration with its language model, in evaluation mode.

    Other options are those of `load_stage1` and of `FrozenLlm`. The LLM's vocabulary is the
    folder's, with transformers' image token, which nothing here reads or writes.
    """
    theirs = _config(folder, Blip2Config)
    vision, qformer = blip2_to_ours(theirs, has_text=False)
    llm_config: Any = theirs.text_config
    weights = _read_blip2(folder, STAGE2_TRANSFORMERS)

    def build() -> Stage2:
        llm = build_llm(llm_config, dtype=llm_dtype, has_dropout=has_dropout)
        llm.untie_head_of({n.removeprefix("llm."): t for n, t in weights.items()})
        tower = FrozenImageEncoder(vision, dtype=image_dtype)
        return Stage2(Stage2Config(qformer=qformer), tower, llm)

    model = _built(build, weights, folder)
    model.ln_vision.eps = _ln_vision_eps(theirs, ln_vision_eps)
    return model


def save_stage2(model: Stage2, folder: Path, *, image_token_id: int | None = None) -> None:
    """Write a folder that Blip2ForConditionalGeneration loads, language model included.

    transformers marks the queries' places by an image token in front of the text:
    `image_token_id`, an id of the LLM's vocabulary that no text has. None takes that of the
    converted models on the hub. Raises ValueError when there is none for this LLM, or for an image
    encoder that transformers' Blip2 classes do not have.
    """
    llm = model.llm.model.config
    if image_token_id is None:
        image_token_id = _IMAGE_TOKENS.get((llm.model_type, llm.vocab_size))
    if image_token_id is None or not 0 <= image_token_id < llm.vocab_size:
        raise ValueError(
            f"image_token_id is {image_token_id}; a {llm.model_type} with a vocabulary of "
            f"{llm.vocab_size} needs an id below that, which its tokenizer never gives"
        )
    config = blip2_to_theirs(
        _tower_of(model).config,
        model.config.qformer,
        text_config=llm.to_dict(),
        image_token_index=image_token_id,
        ln_vision_eps=model.ln_vision.eps,
        architectures=["Blip2ForConditionalGeneration"],
    )
    _save_blip2(model, config, STAGE2_TRANSFORMERS, {}, folder)


def image_token(llm: PreTrainedConfig, num_tokens: int) -> int:
    """Return the id that marks an image: the converted models', or one that no text has.

    `num_tokens` is how many ids the tokenizer gives. Raises ValueError when it gives them all.
    """
    known = _IMAGE_TOKENS.get((llm.model_type, llm.vocab_size))
    if known is not None:
        return known
    if llm.vocab_size <= num_tokens:
        raise ValueError(
            f"its tokenizer has {num_tokens} tokens and the model a vocabulary of "
            f"{llm.vocab_size}: transformers' Blip2 marks an image by an id that no text has; "
            "enlarge the model's embeddings by one (resize_token_embeddings)"
        )
    return int(llm.vocab_size) - 1


def _config(folder: Path, kind: type[Config]) -> Config:
    """Return config.json of a folder, with transformers' defaults for what it leaves out."""
    expected, found = kind.model_type, read_json(folder / "config.json").get("model_type")
    if found != expected:
        raise CheckpointError(f"{folder / 'config.json'} is of {found!r}, not of {expected!r}")
    config: Config = kind.from_pretrained(str(folder), local_files_only=True)
    return config


def _built(
    build: Callable[[], Model],
    weights: Mapping[str, Tensor],
    folder: Path,
    may_lack: Reasons | None = None,
) -> Model:
    """Build a model and load its weights, which are compared before it takes memory."""
    with torch.device("meta"):
        load_strictly(build(), weights, may_lack=may_lack, source=str(folder))
    model = build()
    load_strictly(model, weights, may_lack=may_lack, source=str(folder))
    return model.eval()


def _read_blip2(folder: Path, table: Table) -> dict[str, Tensor]:
    theirs = read_weights(folder)
    ours = with_tower_to_ours(theirs, table, EVA_VIT_TRANSFORMERS, "vision_model.")
    side = folder / OURS_ALONE
    return ours | (read_weights(side) if side.is_file() else {})


def _save_blip2(
    model: nn.Module, config: PreTrainedConfig, table: Table, ours_alone: Reasons, folder: Path
) -> None:
    once = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in again}
    aside = {name: tensor for name, tensor in state.items() if matches(name, ours_alone)}
    held = {name: tensor for name, tensor in state.items() if name not in aside}
    theirs = with_tower_to_theirs(held, table, EVA_VIT_TRANSFORMERS, "vision_model.")
    _write_folder(config, theirs, aside, folder)


def _save_med(
    model: nn.Module, config: BlipConfig, architecture: str, format: MedFormat, folder: Path
) -> None:
    config.architectures = [architecture]
    _write_folder(config, med_to_theirs(model.state_dict(), format), {}, folder)


def _write_folder(
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    aside: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Write weights, side file and, last, config.json, without which nothing loads the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / OURS_ALONE).unlink(missing_ok=True)  # of another model that was here
    write_weights(weights, folder / "model.safetensors")
    if aside:
        write_weights(aside, folder / OURS_ALONE)
    config.dtype = "float32"  # else transformers takes that of the first tensor for all
    config.save_pretrained(folder)


def _ln_vision_eps(config: Blip2Config, asked: float | None) -> float:
    if asked is not None:
        return asked
    tower: Any = config.vision_config
    return float(getattr(config, "ln_vision_eps", tower.layer_norm_eps))


def _tower_of(model: Stage1 | Stage2) -> ImageEncoder:
    if not isinstance(model.image_encoder, ImageEncoder):
        raise ValueError(f"{type(model.image_encoder).__name__} is no ImageEncoder of ours")
    return model.image_encoder
