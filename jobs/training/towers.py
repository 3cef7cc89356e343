"""Image encoders by name: each form in which a pretrained one is found, into our own."""

from pathlib import Path

from torch import Tensor

from jobs.checkpoint import fingerprint_tensors
from jobs.errors import UserError
from model import image_encoder_files, lavis_files
from model.names.vision import (
    BLIP_VIT,
    BLIP_VIT_TRANSFORMERS,
    CLIP_VIT,
    EVA_VIT,
    EVA_VIT_TRANSFORMERS,
    VisionFormat,
    vision_to_ours,
)
from model.vision import ImageEncoder, VisionConfig
from model.weight_files import CheckpointError, read_json, read_weights

RANDOM = "random"
_BLIP_TYPES = ("blip", "blip-2")
_TOWER = "vision_model."


def load_tower(encoder: ImageEncoder, name: str) -> str:
    """Give an image encoder the weights that `name` stands for; return their fingerprint.

    `name` is 'random', a folder of an image encoder alone or of a Blip or Blip2 model, or a file of
    EVA-CLIP or CLIP as LAVIS has it, of DeiT as BLIP has it. Raises UserError, CheckpointError.
    """
    path = Path(name)
    if name != RANDOM:
        if not path.exists():
            raise UserError(f"image_encoder = {name!r}: there is no such file or folder")
        if path.is_dir():
            _load_folder(encoder, path)
        else:
            format_ = _file_format(encoder.config)
            lavis_files.load_image_encoder(encoder, path, format_, resizes_positions=True)
    return fingerprint_tensors(encoder.state_dict().items())


def _load_folder(encoder: ImageEncoder, folder: Path) -> None:
    kind = read_json(folder / "config.json").get("model_type")
    if kind in _BLIP_TYPES:
        weights = _blip_tower(folder, encoder.config)
    else:
        weights = image_encoder_files.load_image_encoder(folder)[1]
    image_encoder_files.start_from(encoder, weights, str(folder))


def _blip_tower(folder: Path, config: VisionConfig) -> dict[str, Tensor]:
    """Return a Blip model's tower, without key bias and last norm for an encoder of EVA's kind.

    A key bias moves no attention, and BLIP-2 has a norm of its own behind the tower.
    """
    weights = read_weights(folder)
    tower = {n.removeprefix(_TOWER): t for n, t in weights.items() if n.startswith(_TOWER)}
    if not tower:
        raise CheckpointError(f"{folder} has no weights of an image encoder ({_TOWER}*)")
    format_ = BLIP_VIT_TRANSFORMERS if config.has_key_bias else EVA_VIT_TRANSFORMERS
    return dict(vision_to_ours(tower, format_))


def _file_format(config: VisionConfig) -> VisionFormat:
    if config.has_norm_before:
        return CLIP_VIT
    return BLIP_VIT if config.has_key_bias else EVA_VIT
