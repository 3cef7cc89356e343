"""An image encoder alone in a folder of its own, and how a larger model's tower starts from one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.vision import ImageEncoder, VisionConfig, resize_positions
from model.weight_files import CheckpointError, read_json, read_weights, write_weights

_MODEL_TYPE = "capfilt_image_encoder"


def save_image_encoder(model: ImageEncoder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights and sizes under our names; `dtype` is how they are stored, else as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()
    }
    write_weights(weights, folder / "model.safetensors")
    config = asdict(model.config) | {"model_type": _MODEL_TYPE}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_image_encoder(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Return the sizes and the weights, in float32, that `save_image_encoder` wrote.

    Raises CheckpointError.
    """
    path = folder / "config.json"
    found: dict[str, Any] = read_json(path)
    if found.pop("model_type", None) != _MODEL_TYPE:
        raise CheckpointError(f"{path} is not that of an image encoder alone ({_MODEL_TYPE})")
    try:
        config = VisionConfig(**found | {"stem_widths": tuple(found.get("stem_widths", ()))})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, {name: tensor.float() for name, tensor in read_weights(folder).items()}


@torch.no_grad()
def start_from(encoder: ImageEncoder, weights: dict[str, Tensor], source: str) -> list[str]:
    """Load all that an encoder has in common with a trained one; return what it starts anew.

    The trained one may have fewer blocks and no norm after them. Position embeddings are resized;
    where it has biases for queries and values alone, the key's are zero. Raises CheckpointError for
    a weight without a place, or of another shape.
    """
    own = encoder.state_dict()
    found = _with_joint_bias(weights, own)
    side = encoder.config.image_size // encoder.config.patch_size
    found["positions"] = resize_positions(
        found["positions"], side=side, align_corners=encoder.config.align_corners
    )
    wrong = sorted(n for n, tensor in found.items() if n not in own or own[n].shape != tensor.shape)
    if wrong:
        raise CheckpointError(
            f"{source} does not fit this image encoder: {', '.join(wrong[:8])} have no place or "
            "another shape; give the recipe's model the sizes in its config.json"
        )
    encoder.load_state_dict(found, strict=False)
    return sorted(own.keys() - found.keys())


def _with_joint_bias(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(weights)
    for name in weights:
        joint = f"{name.removesuffix('query_bias')}qkv.bias"
        if name.endswith(".query_bias") and joint in own:
            query = found.pop(name)
            value = found.pop(f"{name.removesuffix('query_bias')}value_bias")
            found[joint] = torch.cat((query, torch.zeros_like(query), value))
    return found
