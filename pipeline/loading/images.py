"""An image's bytes to the square that a model trains on: decoded, cropped, resized, flipped.

What is random is given as numbers in [0, 1), so the same numbers always give the same pixels. Only
as much of a JPEG is decoded as the crop calls for, and a crop is resized by torch's vectorised
kernel, which agrees with Pillow's antialiased bicubic to one level of 255.

S side of the square, H, W height and width of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, log, sqrt

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.image_decode import Pixels, decode
from pipeline.image_header import ImageReason, read_header
from pipeline.loading import randaugment
from pipeline.loading.config import Augmentation, LoaderConfig
from pipeline.sample import SampleError

_RATIOS = (log(3 / 4), log(4 / 3))  # of width to height, logarithms
_CROP_TRIES = 10
_FLIP = 2 * _CROP_TRIES + 2  # which draw decides it
_RANDAUGMENT = _FLIP + 1
NUM_DRAWS = _RANDAUGMENT + randaugment.NUM_DRAWS

Draws = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of an image, in pixels of the whole."""

    left: int
    top: int
    width: int
    height: int


def training_image(data: bytes, config: LoaderConfig, draws: Draws) -> Pixels:
    """Return the square that a model sees of an image, (S, S, 3) RGB uint8.

    `draws` are NUM_DRAWS numbers in [0, 1); without augmentation they are not used. Raises
    SampleError for bytes that are no sound image of at most `max_pixels`.
    """
    header = read_header(data)
    width, height, side = header.width, header.height, config.image_size
    if width * height > config.max_pixels:
        raise SampleError(
            ImageReason.TOO_MANY_PIXELS,
            f"{width} x {height} pixels, at most {config.max_pixels:,} in all",
        )
    is_random = config.augmentation is not Augmentation.RESIZE
    crop = Crop(0, 0, width, height)
    if is_random:
        crop = random_crop(width, height, config.min_crop_area, draws)
    decoded = decode(
        data,
        header,
        min_width=ceil(width * min(1.0, side / crop.width)),
        min_height=ceil(height * min(1.0, side / crop.height)),
    )
    pixels = resize(_cut(decoded.pixels, crop, decoded.scale), side)
    if is_random and draws[_FLIP] < 0.5:
        pixels = np.asarray(cv2.flip(pixels, 1))  # NumPy's mirrored view is slow to copy
    if config.augmentation is Augmentation.CROP_RANDAUGMENT:
        pixels = randaugment.apply(pixels, draws[_RANDAUGMENT:])
    return pixels


def random_crop(width: int, height: int, min_area: float, draws: Draws) -> Crop:
    """Return a part of `min_area` to all of the area and of 3:4 to 4:3; torchvision's procedure.

    Where ten tries find none that fits, it is the largest such part in the middle.
    """
    low, high = _RATIOS
    for number in range(_CROP_TRIES):
        area_draw, ratio_draw = draws[2 * number : 2 * number + 2].tolist()
        area = width * height * (min_area + (1 - min_area) * area_draw)
        ratio = exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            x, y = draws[2 * _CROP_TRIES : _FLIP].tolist()
            left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
            return Crop(left, top, crop_width, crop_height)
    crop_width = min(width, max(1, round(height * exp(high))))
    crop_height = min(height, max(1, round(width / exp(low))))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return Crop(left, top, crop_width, crop_height)


def resize(pixels: Pixels, side: int) -> Pixels:
    """Return pixels, (H, W, 3) uint8, as a square by antialiased bicubic interpolation."""
    if pixels.shape[:2] == (side, side):
        return pixels
    whole = torch.from_numpy(np.require(pixels, requirements=("C", "W")))
    # In this order of calls torch sees that channels are last and keeps them there: faster twice.
    image = whole[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    square = F.interpolate(image, (side, side), mode="bicubic", antialias=True)
    return square[0].permute(1, 2, 0).numpy()  # (S, S, 3)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 pixels, (B, 3, S, S), as float32 of the given mean and deviation per channel.

    Runs on the pixels' device. Both are channels last in memory, where a row of the image is one
    vector to compute with: a dimension of three would be the innermost loop otherwise.
    """
    batch, channels, height, width = pixels.shape
    centre, spread = (torch.tensor(value, device=pixels.device) for value in (mean, std))
    factor, offset = (1 / (255 * spread)).repeat(width), (centre / spread).repeat(width)
    rows = pixels.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    result = torch.empty(rows.shape, device=pixels.device)
    # One image at a time stays in a processor's cache through all three passes; a device would
    # rather be called once.
    step = 1 if pixels.device.type == "cpu" else batch
    for part, out in zip(torch.split(rows, step), torch.split(result, step), strict=True):
        out.copy_(part).mul_(factor).sub_(offset)
    return result.view(batch, height, width, channels).permute(0, 3, 1, 2)  # (B, 3, S, S)


def _cut(pixels: Pixels, crop: Crop, scale: float) -> Pixels:
    """Return a crop of an image that was decoded at a scale."""
    if scale == 1:
        return pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    height, width = pixels.shape[:2]
    left, top = (min(round(crop.left * scale), width - 1), min(round(crop.top * scale), height - 1))
    right = max(left + 1, round((crop.left + crop.width) * scale))
    bottom = max(top + 1, round((crop.top + crop.height) * scale))
    return pixels[top:bottom, left:right]
