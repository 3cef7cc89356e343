"""Files of LAVIS and of BLIP's repository: weights alone, into a model that the caller built.

`.pth` files are read as plain tensors; what is written are `.safetensors` files with the same
names, whose content LAVIS takes as the value of "model". Files of training hold what learned: a
frozen tower or language model that a file leaves out keeps the weights that it has, but it is left
out whole or not at all.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.names.blip import MedFormat, med_to_ours, med_to_theirs
from model.names.blip2 import LAVIS_ALIASES, LAVIS_UNUSED, STAGE1_LAVIS
from model.names.stage2 import STAGE2_LAVIS
from model.names.towers import Table, with_tower_to_ours, with_tower_to_theirs
from model.names.vision import CLIP_VIT, EVA_VIT, VisionFormat, vision_to_ours
from model.stage1 import Stage1
from model.stage2 import Stage2
from model.vision import ImageEncoder, resize_positions
from model.weight_files import (
    CheckpointError,
    Reasons,
    load_strictly,
    read_weights,
    without,
    write_weights,
)

# What a file may leave out, and why: each of these whole.
LEFT_OUT = {
    "image_encoder.": "LAVIS saves what learned; a frozen tower comes from its own file",
    "llm.": "LAVIS saves what learned; the language model comes from the hub",
}
# What in a file is not used, and why.
CONSTANTS: Reasons = {
    pattern: "a constant that older versions saved as a buffer" for pattern in LAVIS_UNUSED
}
OF_STAGE_1: Reasons = {
    r"Qformer\.cls\..*": "in stage 2 the language model writes the text",
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\..*": "no text is read in stage 2",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*": "the FFN of that text",
}


def stage1_weights(path: Path, *, tower: VisionFormat = EVA_VIT) -> dict[str, Tensor]:
    """Return the weights of a stage-1 file under `Stage1`'s names, as far as they are there.

    For `Stage2.load_stage1`, which needs no tower; `load_stage1` loads and checks all of them.
    Raises CheckpointError when tensors that should be tied differ.
    """
    theirs = without(read_weights(path), CONSTANTS)
    for alias, name in LAVIS_ALIASES.items():
        if alias in theirs and name in theirs and not torch.equal(theirs[alias], theirs[name]):
            raise CheckpointError(f"{path}: {alias} and {name} differ, but should be one")
        if alias in theirs:
            theirs.setdefault(name, theirs[alias])
            del theirs[alias]
    return with_tower_to_ours(theirs, STAGE1_LAVIS, tower, "visual_encoder.")


def load_stage1(model: Stage1, path: Path, *, resizes_positions: bool = False) -> None:
    """Load a LAVIS stage-1 file; the frozen tower may be left out of it.

    Raises CheckpointError that lists what else is missing, unexpected or misshapen.
    """
    weights = stage1_weights(path, tower=_tower_format(model))
    _load(model, weights, path, resizes_positions)


def save_stage1(model: Stage1, path: Path, *, with_frozen: bool = False) -> None:
    """Write stage 1 in LAVIS names; frozen weights only `with_frozen`, as LAVIS does."""
    theirs = _to_lavis(model, STAGE1_LAVIS, with_frozen)
    aliases = {alias: theirs[name] for alias, name in LAVIS_ALIASES.items() if name in theirs}
    write_weights(theirs | aliases, path)


def load_stage2(model: Stage2, path: Path, *, resizes_positions: bool = False) -> None:
    """Load a LAVIS stage-2 file; tower and language model may be left out of it.

    What stage 1 alone uses (`OF_STAGE_1`) is passed over. To start from a stage-1 file, give
    `stage1_weights(path)` to `Stage2.load_stage1`. Raises CheckpointError that lists what else is
    missing, unexpected or misshapen.
    """
    theirs = without(read_weights(path), {**CONSTANTS, **OF_STAGE_1})
    table = STAGE2_LAVIS[_kind_of_llm(model)]
    weights = with_tower_to_ours(theirs, table, _tower_format(model), "visual_encoder.")
    model.llm.untie_head_of({name.removeprefix("llm."): t for name, t in weights.items()})
    _load(model, weights, path, resizes_positions)


def save_stage2(model: Stage2, path: Path, *, with_frozen: bool = False) -> None:
    """Write stage 2 in LAVIS names; frozen weights only `with_frozen`, as LAVIS does."""
    write_weights(_to_lavis(model, STAGE2_LAVIS[_kind_of_llm(model)], with_frozen), path)


def load_med(model: nn.Module, path: Path, format: MedFormat) -> None:
    """Load a file of BLIP's repository; `format` is one of `model.names.blip`.

    Position embeddings of another resolution are an error; `capfilt.load_part` resizes them. Raises
    ValueError that lists what is missing, unexpected or misshapen.
    """
    load_strictly(model, med_to_ours(read_weights(path), format), source=str(path))


def save_med(model: nn.Module, path: Path, format: MedFormat) -> None:
    """Write a MED model as BLIP's repository names it; shared weights are written twice."""
    write_weights(med_to_theirs(model.state_dict(), format), path)


def load_image_encoder(
    encoder: ImageEncoder, path: Path, format: VisionFormat, *, resizes_positions: bool = False
) -> None:
    """Load a tower's own file, of EVA-CLIP, CLIP or BLIP, without the blocks that are not kept.

    Raises CheckpointError that lists what is missing, unexpected or misshapen.
    """
    config = encoder.config
    weights = vision_to_ours(read_weights(path), format, num_layers=config.num_layers)
    if resizes_positions and "positions" in weights:
        side = config.image_size // config.patch_size
        align = config.align_corners
        weights["positions"] = resize_positions(
            weights["positions"], side=side, align_corners=align
        )
    load_strictly(encoder, weights, source=str(path))


def _load(
    model: nn.Module, weights: Mapping[str, Tensor], path: Path, resizes_positions: bool
) -> None:
    may_lack = {f"{prefix}.*": why for prefix, why in _left_out(weights).items()}
    load_strictly(
        model,
        weights,
        may_lack=may_lack,
        source=str(path),
        resizes_positions=resizes_positions,
    )


def _left_out(names: Iterable[str]) -> dict[str, str]:
    """Return those of `LEFT_OUT` of which nothing is there."""
    present = tuple(names)
    return {
        prefix: why
        for prefix, why in LEFT_OUT.items()
        if not any(name.startswith(prefix) for name in present)
    }


def _to_lavis(model: Stage1 | Stage2, table: Table, with_frozen: bool) -> dict[str, Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {n: t for n, t in model.state_dict().items() if with_frozen or n not in frozen}
    if not with_frozen:
        state = {name: t for name, t in state.items() if not name.startswith("llm.")}
    return with_tower_to_theirs(state, table, _tower_format(model), "visual_encoder.")


def _tower_format(model: Stage1 | Stage2) -> VisionFormat:
    encoder = model.image_encoder
    is_clip = isinstance(encoder, ImageEncoder) and encoder.config.has_norm_before
    return CLIP_VIT if is_clip else EVA_VIT


def _kind_of_llm(model: Stage2) -> str:
    if model.llm.is_encoder_decoder:
        return "t5"
    return "opt" if model.llm.model.config.model_type == "opt" else "llm"
