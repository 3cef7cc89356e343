"""How the weights of the vision towers are called elsewhere, and the few that are shaped otherwise.

Every table starts at the tower itself; `prefixed` puts it where a larger model keeps its tower.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.names.rename import Rename, to_ours, to_theirs

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionFormat:
    """A file format of one tower: its names, its shapes, and what in it has no use here."""

    table: tuple[Rename, ...]
    reshape_to_theirs: Callable[[Mapping[str, Tensor]], State] = dict
    reshape_to_ours: Callable[[Mapping[str, Tensor]], State] = dict
    unused: tuple[str, ...] = ()  # regular expressions of their names that are dropped


def prefixed(table: Sequence[Rename], *, ours: str = "", theirs: str = "") -> tuple[Rename, ...]:
    """Return `table` for a tower that stands deeper: `prefixed(t, theirs="visual_encoder.")`."""
    return tuple(Rename(ours + line.ours, theirs + line.theirs) for line in table)


def vision_to_theirs(state: Mapping[str, Tensor], format: VisionFormat) -> State:
    """Return an `ImageEncoder`'s weights as `format` names and shapes them.

    Raises ValueError that lists our names that the format cannot hold.
    """
    reshaped = format.reshape_to_theirs(state)
    renamed = {name: to_theirs(name, format.table) for name in reshaped}
    if homeless := sorted(name for name, theirs in renamed.items() if theirs is None):
        raise ValueError(f"this format has no place for {', '.join(homeless)}")
    return {theirs: reshaped[name] for name, theirs in renamed.items() if theirs is not None}


def vision_to_ours(
    state: Mapping[str, Tensor], format: VisionFormat, *, num_layers: int | None = None
) -> State:
    """Return a tower's weights under an `ImageEncoder`'s names and shapes.

    With `num_layers`, later blocks are dropped: BLIP-2 keeps all but the last (Sec. 3.4). Raises
    ValueError that lists their names that are neither in the format nor among its unused ones.
    """
    used = {name: t for name, t in state.items() if not matches_any(name, format.unused)}
    renamed = {name: to_ours(name, format.table) for name in used}
    if strange := sorted(name for name, ours in renamed.items() if ours is None):
        raise ValueError(f"this format knows no tensor named {', '.join(strange)}")
    found = {ours: used[name] for name, ours in renamed.items() if ours is not None}
    reshaped = format.reshape_to_ours(found)
    if num_layers is None:
        return reshaped
    return {name: t for name, t in reshaped.items() if _layer(name) < num_layers}


def join_qkv_bias(state: Mapping[str, Tensor]) -> State:
    """Put EVA's query and value biases into one with zeros for the key: (C,), (C,) -> (3*C,)."""
    joined = dict(state)
    for name in state:
        if name.endswith(".query_bias"):
            block = name.removesuffix("query_bias")
            query, value = joined.pop(name), joined.pop(f"{block}value_bias")
            joined[f"{block}qkv.bias"] = torch.cat((query, torch.zeros_like(query), value))
    return joined


def split_qkv_bias(state: Mapping[str, Tensor]) -> State:
    """Take query and value biases out of a joint one and drop the key's: (3*C,) -> (C,), (C,).

    A key bias that training made non-zero adds the same to all scores of a query: nothing changes.
    """
    split = dict(state)
    for name in state:
        if name.endswith(".qkv.bias"):
            block = name.removesuffix("qkv.bias")
            query, _, value = split.pop(name).chunk(3)
            # Clones: halves of one tensor could not be saved, and would keep all of it alive.
            split[f"{block}query_bias"] = query.clone()
            split[f"{block}value_bias"] = value.clone()
    return split


def flatten_embeddings(state: Mapping[str, Tensor]) -> State:
    """Drop the axes of size one: CLIP's class token is (C,), its positions are (1+P, C)."""
    flat = dict(state)
    flat["cls_token"] = state["cls_token"].flatten()
    flat["positions"] = state["positions"].squeeze(0)
    return flat


def unflatten_embeddings(state: Mapping[str, Tensor]) -> State:
    """Give CLIP's class token and positions the shapes (1, 1, C) and (1, 1+P, C)."""
    full = dict(state)
    full["cls_token"] = state["cls_token"].view(1, 1, -1)
    full["positions"] = state["positions"].unsqueeze(0)
    return full


def split_qkv(state: Mapping[str, Tensor]) -> State:
    """Take each fused projection apart for a transformers CLIP tower; also `flatten_embeddings`."""
    split = flatten_embeddings(state)
    for name in state:
        if found := re.fullmatch(r"(.+\.)qkv\.(weight|bias)", name):
            block, kind = found.groups()
            thirds = zip(("query", "key", "value"), split.pop(name).chunk(3), strict=True)
            split.update({f"{block}{part}.{kind}": third.clone() for part, third in thirds})
    return split


def fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """Stack query, key and value projections, in this order; also `unflatten_embeddings`."""
    fused = unflatten_embeddings(state)
    for name in state:
        if found := re.fullmatch(r"(.+\.)query\.(weight|bias)", name):
            block, kind = found.groups()
            parts = [fused.pop(f"{block}{part}.{kind}") for part in ("query", "key", "value")]
            fused[f"{block}qkv.{kind}"] = torch.cat(parts)
    return fused


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Say whether one of the regular expressions describes all of `name`."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _layer(name: str) -> int:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


_TIMM_STEM = (  # BLIP's repository, LAVIS and the EVA-CLIP file follow timm
    Rename("cls_token", "cls_token"),
    Rename("positions", "pos_embed"),
    Rename("patches.{}", "patch_embed.proj.{}"),
)
_TIMM_BLOCKS = (
    Rename("layers.{}.attention.norm.{}", "blocks.{}.norm1.{}"),
    Rename("layers.{}.attention.qkv.{}", "blocks.{}.attn.qkv.{}"),
    Rename("layers.{}.attention.output.{}", "blocks.{}.attn.proj.{}"),
    Rename("layers.{}.mlp.norm.{}", "blocks.{}.norm2.{}"),
    Rename("layers.{}.mlp.up.{}", "blocks.{}.mlp.fc1.{}"),
    Rename("layers.{}.mlp.down.{}", "blocks.{}.mlp.fc2.{}"),
)
_TRANSFORMERS_MLP = (
    Rename("layers.{}.attention.norm.{}", "encoder.layers.{}.layer_norm1.{}"),
    Rename("layers.{}.mlp.norm.{}", "encoder.layers.{}.layer_norm2.{}"),
    Rename("layers.{}.mlp.up.{}", "encoder.layers.{}.mlp.fc1.{}"),
    Rename("layers.{}.mlp.down.{}", "encoder.layers.{}.mlp.fc2.{}"),
)
_TRANSFORMERS_BLIP = (  # of the Blip and Blip2 classes
    Rename("cls_token", "embeddings.class_embedding"),
    Rename("positions", "embeddings.position_embedding"),
    Rename("patches.{}", "embeddings.patch_embedding.{}"),
    Rename("stem.{}.{}", "embeddings.stem.{}.{}"),  # ours alone
    Rename("layers.{}.attention.qkv.{}", "encoder.layers.{}.self_attn.qkv.{}"),
    Rename("layers.{}.attention.output.{}", "encoder.layers.{}.self_attn.projection.{}"),
    *_TRANSFORMERS_MLP,
)

# BLIP's tower, below "visual_encoder." in its repository and in LAVIS; also that of DeiT and timm,
# with which BLIP starts, whose classifier is left out.
BLIP_VIT = VisionFormat(
    table=(*_TIMM_STEM, *_TIMM_BLOCKS, Rename("norm_after.{}", "norm.{}")),
    unused=(r"head\..*",),
)

# The same in transformers' Blip classes, below "vision_model.".
BLIP_VIT_TRANSFORMERS = VisionFormat(
    table=(*_TRANSFORMERS_BLIP, Rename("norm_after.{}", "post_layernorm.{}"))
)

# EVA-CLIP's own file; in LAVIS below "visual_encoder.". Its classifier was never ours.
EVA_VIT = VisionFormat(
    table=(
        *_TIMM_STEM,
        *_TIMM_BLOCKS,
        Rename("layers.{}.attention.query_bias", "blocks.{}.attn.q_bias"),
        Rename("layers.{}.attention.value_bias", "blocks.{}.attn.v_bias"),
    ),
    unused=(r"(fc_)?norm\..*", r"head\..*"),
)

# The same in transformers' Blip2 classes, below "vision_model.". Their post_layernorm is BLIP-2's
# ln_vision, which belongs to the model around the tower.
EVA_VIT_TRANSFORMERS = VisionFormat(
    table=_TRANSFORMERS_BLIP,
    reshape_to_theirs=join_qkv_bias,
    reshape_to_ours=split_qkv_bias,
    unused=(r"post_layernorm\..*",),
)

# The tower of OpenAI's CLIP as LAVIS stores it. What follows the last block is not read.
CLIP_VIT = VisionFormat(
    table=(
        Rename("cls_token", "class_embedding"),
        Rename("positions", "positional_embedding"),
        Rename("patches.{}", "conv1.{}"),
        Rename("norm_before.{}", "ln_pre.{}"),
        Rename("layers.{}.attention.norm.{}", "transformer.resblocks.{}.ln_1.{}"),
        Rename("layers.{}.attention.qkv.{}", "transformer.resblocks.{}.attn.in_proj_{}"),
        Rename("layers.{}.attention.output.{}", "transformer.resblocks.{}.attn.out_proj.{}"),
        Rename("layers.{}.mlp.norm.{}", "transformer.resblocks.{}.ln_2.{}"),
        Rename("layers.{}.mlp.up.{}", "transformer.resblocks.{}.mlp.c_fc.{}"),
        Rename("layers.{}.mlp.down.{}", "transformer.resblocks.{}.mlp.c_proj.{}"),
    ),
    reshape_to_theirs=flatten_embeddings,
    reshape_to_ours=unflatten_embeddings,
    unused=(r"ln_post\..*", r"proj"),
)

# transformers' CLIPVisionModel. Build it with the number of blocks kept plus one to write a file
# that its own class loads, or read hidden_states[-2] of the full one.
CLIP_VIT_TRANSFORMERS = VisionFormat(
    table=(
        Rename("cls_token", "embeddings.class_embedding"),
        Rename("positions", "embeddings.position_embedding.weight"),
        Rename("patches.{}", "embeddings.patch_embedding.{}"),
        Rename("norm_before.{}", "pre_layrnorm.{}"),
        Rename("layers.{}.attention.query.{}", "encoder.layers.{}.self_attn.q_proj.{}"),
        Rename("layers.{}.attention.key.{}", "encoder.layers.{}.self_attn.k_proj.{}"),
        Rename("layers.{}.attention.value.{}", "encoder.layers.{}.self_attn.v_proj.{}"),
        Rename("layers.{}.attention.output.{}", "encoder.layers.{}.self_attn.out_proj.{}"),
        *_TRANSFORMERS_MLP,
    ),
    reshape_to_theirs=split_qkv,
    reshape_to_ours=fuse_qkv,
    unused=(r"post_layernorm\..*", r"embeddings\.position_ids"),
)
