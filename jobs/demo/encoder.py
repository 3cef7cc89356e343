"""Trains the demo's image encoder: a stand-in for the pretrained ViT that every BLIP starts from.

BLIP starts from ImageNet's labels and BLIP-2 from CLIP's pairs. A laptop has neither, so this one
is taught to name what stands in each patch of drawn scenes: shape, colour, texture and size. These
scenes are in no list of the demo's web, and no caption is seen. The result is kept in
`jobs/demo/encoder/`, and the same encoder serves every arm of the proof.

    python -m jobs.demo.encoder FOLDER
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from jobs.demo.drawing import draw_scene
from jobs.demo.plan import NUM_SPLIT_SCENES
from jobs.demo.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, sample_scene
from jobs.progress import stage_meter
from model.image_encoder_files import save_image_encoder
from model.losses import IGNORED
from model.presets import DEMO_VIT
from model.vision import ImageEncoder
from pipeline.models import CLIP_MEAN, CLIP_STD

_QUESTIONS = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
_COVERED = 0.85  # a patch shows an object if its centre is within so much of the object's radius
_ASPECTS = (0.65, 1.55)  # of a picture before it is squeezed to a square
_SIDES = (56, 104)  # px, of the shorter side


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTraining:
    """How the encoder is trained; small batches and many steps do better than the reverse."""

    num_scenes: int = 24_000
    num_steps: int = 8_000
    batch_size: int = 16
    peak_rate: float = 2e-3
    seed: int = 0


def train_encoder(config: EncoderTraining) -> tuple[ImageEncoder, dict[str, float]]:
    """Return the encoder and, for each question, the share of right answers on unseen scenes."""
    torch.manual_seed(config.seed)
    encoder = ImageEncoder(DEMO_VIT)
    encoder.stem = _with_batch_norm(encoder.stem)
    heads = nn.ModuleDict({q: nn.Linear(DEMO_VIT.width, len(a)) for q, a in _QUESTIONS.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.peak_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.peak_rate, total_steps=config.num_steps, pct_start=0.05
    )
    pictures, labels = _draw(range(config.num_scenes), config.seed)
    rng = np.random.default_rng(config.seed)
    with stage_meter("encoder", config.num_steps, unit="steps", stream=sys.stderr) as meter:
        for _ in range(config.num_steps):
            rows = rng.integers(0, config.num_scenes, config.batch_size)
            losses = _losses(encoder, heads, pictures[rows], labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(list(losses.values()))
            optimizer.step()
            schedule.step()
            meter.advance(1, 1)
    encoder.eval()
    encoder.stem = _without_batch_norm(encoder.stem)
    unseen = range(config.num_scenes, config.num_scenes + 500)
    return encoder, _accuracies(encoder, heads, *_draw(unseen, config.seed))


def normalised(pictures: NDArray[np.uint8]) -> Tensor:
    """Return (B, 3, S, S) float32 of (B, S, S, 3) uint8 RGB, as CLIP and BLIP normalise."""
    mean, std = np.asarray((CLIP_MEAN, CLIP_STD), np.float32)
    scaled = (pictures.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def _draw(scenes: range, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return squeezed pictures (N, S, S, 3) and labels (N, questions, G*G)."""
    pictures, labels = [], []
    for index in scenes:
        scene = sample_scene(seed, NUM_SPLIT_SCENES + index)
        rng = np.random.default_rng((seed, index))
        short, aspect = rng.integers(*_SIDES), np.exp(rng.uniform(*np.log(_ASPECTS)))
        width, height = (round(short * max(a, 1)) for a in (aspect, 1 / aspect))
        drawn = draw_scene(scene, width=width, height=height)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
        decoded = cv2.imdecode(cv2.imencode(".jpg", drawn, quality)[1], cv2.IMREAD_COLOR)
        assert decoded is not None, "it was just encoded"
        size = DEMO_VIT.image_size
        pictures.append(cv2.resize(decoded, (size, size), interpolation=cv2.INTER_AREA))
        labels.append(_labels(scene, width, height))
    return np.stack(pictures).astype(np.uint8), np.stack(labels)


def _labels(scene: Scene, width: int, height: int) -> NDArray[np.int64]:
    """Return the answers for each patch, (questions, G*G); IGNORED where there is no object."""
    side = DEMO_VIT.image_size // DEMO_VIT.patch_size
    centres = (np.arange(side) + 0.5) / side
    # In units of the scene's square, which fills the middle of the picture.
    shorter = min(width, height)
    xs = (centres * width - (width - shorter) / 2) / shorter
    ys = (centres * height - (height - shorter) / 2) / shorter
    labels = np.full((len(_QUESTIONS), side, side), IGNORED, np.int64)
    for each in scene.objects:
        distance = np.hypot(xs[None, :] - each.x, ys[:, None] - each.y)
        covered = distance <= max(_COVERED * each.radius, distance.min())
        for question, (name, answers) in zip(labels, _QUESTIONS.items(), strict=True):
            question[covered] = answers.index(getattr(each, name))
    return labels.reshape(len(_QUESTIONS), side * side)


def _losses(
    encoder: ImageEncoder, heads: nn.ModuleDict, pictures: NDArray[np.uint8], labels: NDArray[Any]
) -> dict[str, Tensor]:
    patches = encoder(normalised(pictures))[:, 1:]  # (B, G*G, C)
    return {
        name: F.cross_entropy(
            head(patches).flatten(0, 1),
            torch.from_numpy(labels[:, number].copy()).flatten(),
            ignore_index=IGNORED,
        )
        for number, (name, head) in enumerate(heads.items())
    }


@torch.no_grad()
def _accuracies(
    encoder: ImageEncoder, heads: nn.ModuleDict, pictures: NDArray[np.uint8], labels: NDArray[Any]
) -> dict[str, float]:
    patches = encoder(normalised(pictures))[:, 1:]
    found = {}
    for number, (name, head) in enumerate(heads.items()):
        asked = torch.from_numpy(labels[:, number].copy())
        right = head(patches).argmax(dim=2) == asked
        found[name] = float(right[asked != IGNORED].float().mean())
    return found


def _with_batch_norm(stem: nn.Sequential | None) -> nn.Sequential:
    """Return the stem with a norm behind each convolution; without, this one hardly learns."""
    layers: list[nn.Module] = []
    for layer in stem or ():
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*layers)


def _without_batch_norm(stem: nn.Sequential) -> nn.Sequential:
    """Return the same function with each norm folded into the convolution before it."""
    layers: list[nn.Module] = []
    for layer in stem:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers.pop()
            assert isinstance(convolution, nn.Conv2d), "a norm follows its convolution"
            layers.append(fuse_conv_bn_eval(convolution, layer))
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def main() -> None:
    """Train the encoder and write it; takes some minutes on one core."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    encoder, accuracies = train_encoder(EncoderTraining())
    save_image_encoder(encoder, Path(sys.argv[1]), torch.float16)
    sys.stdout.write(f"right answers on unseen scenes: {accuracies}\n")


if __name__ == "__main__":
    main()
