"""RandAugment as BLIP's training uses it: two of ten operations, each half of the time, level 5.

Brightness and sharpness have a factor of exactly 1 at this level, so they change nothing; they are
drawn all the same, as is the identity, for that is what the published models were trained with.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.image_decode import Pixels

_NUM_OPERATIONS = 2
_PROBABILITY = 0.5
_DRAWS_EACH = 3  # which, whether, to which side
NUM_DRAWS = _NUM_OPERATIONS * _DRAWS_EACH

# At level 5 of 10.
_SHEAR, _TRANSLATE, _ROTATE = 0.15, 5.0, 15.0  # of the side, in pixels, in degrees
_GREY = (128, 128, 128)
_LEVELS = np.arange(256)

Matrix = npt.NDArray[np.floating]


def apply(pixels: Pixels, draws: npt.NDArray[np.float64]) -> Pixels:
    """Return pixels, (H, W, 3) uint8, after two operations that NUM_DRAWS numbers pick."""
    for which, whether, side in draws.reshape(_NUM_OPERATIONS, _DRAWS_EACH).tolist():
        operation = OPERATIONS[int(which * len(OPERATIONS))]
        if whether < _PROBABILITY:
            pixels = operation(pixels, -1.0 if side < 0.5 else 1.0)
    return pixels


def same(pixels: Pixels, sign: float) -> Pixels:
    """Return the pixels; also what brightness and sharpness do at level 5."""
    return pixels


def auto_contrast(pixels: Pixels, sign: float) -> Pixels:
    """Return each channel stretched to all 256 levels."""
    return _look_up(pixels, _stretched)


def equalize(pixels: Pixels, sign: float) -> Pixels:
    """Return each channel with its histogram made even."""
    return _look_up(pixels, _evened)


def shear_x(pixels: Pixels, sign: float) -> Pixels:
    """Return the pixels with rows moved sideways in proportion to their height."""
    return _warp(pixels, np.array([[1, sign * _SHEAR, 0], [0, 1, 0]], dtype=np.float32))


def shear_y(pixels: Pixels, sign: float) -> Pixels:
    """Return the pixels with columns moved up or down in proportion to their place."""
    return _warp(pixels, np.array([[1, 0, 0], [sign * _SHEAR, 1, 0]], dtype=np.float32))


def translate_x(pixels: Pixels, sign: float) -> Pixels:
    """Return the pixels moved sideways by five."""
    return _warp(pixels, np.array([[1, 0, -sign * _TRANSLATE], [0, 1, 0]], dtype=np.float32))


def translate_y(pixels: Pixels, sign: float) -> Pixels:
    """Return the pixels moved up or down by five."""
    return _warp(pixels, np.array([[1, 0, 0], [0, 1, -sign * _TRANSLATE]], dtype=np.float32))


def rotate(pixels: Pixels, sign: float) -> Pixels:
    """Return the pixels turned by 15 degrees around their centre."""
    centre = pixels.shape[1] / 2, pixels.shape[0] / 2
    return _warp(pixels, np.asarray(cv2.getRotationMatrix2D(centre, sign * _ROTATE, 1)))


OPERATIONS: tuple[Callable[[Pixels, float], Pixels], ...] = (
    same,
    auto_contrast,
    same,  # brightness
    same,  # sharpness
    equalize,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    rotate,
)


def _warp(pixels: Pixels, matrix: Matrix) -> Pixels:
    height, width = pixels.shape[:2]
    return np.asarray(cv2.warpAffine(pixels, matrix, (width, height), borderValue=_GREY))


def _look_up(pixels: Pixels, table_of: Callable[[Pixels], Pixels]) -> Pixels:
    tables = np.stack([table_of(pixels[..., channel]) for channel in range(3)], axis=-1)
    return np.asarray(cv2.LUT(pixels, tables[None]))


def _stretched(channel: Pixels) -> Pixels:
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return _LEVELS.astype(np.uint8)
    scale = 255 / (high - low)
    return (_LEVELS * scale - low * scale).clip(0, 255).astype(np.uint8)


def _evened(channel: Pixels) -> Pixels:
    histogram = np.bincount(channel.reshape(-1), minlength=256)
    step = int(histogram[histogram > 0][:-1].sum()) // 255
    if step == 0:
        return _LEVELS.astype(np.uint8)
    before = np.concatenate(([step // 2], histogram[:-1]))
    return (np.cumsum(before) // step).clip(0, 255).astype(np.uint8)
