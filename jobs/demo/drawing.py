"""Draws a scene at any size: stickers with a white rim and a soft shadow on tinted paper.

Dims: H, W of the picture; h, w of the patch that an object covers. Colours are RGB.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.demo.scenes import Scene, SceneObject

COLOUR_RGB = {
    "red": (222, 45, 48),
    "orange": (250, 140, 28),
    "yellow": (250, 208, 42),
    "green": (52, 160, 78),
    "blue": (42, 108, 214),
    "purple": (124, 66, 182),
    "pink": (246, 128, 182),
    "brown": (128, 78, 44),
}
_BACKGROUND_RGB = {  # at the top and at the bottom
    "white": ((254, 254, 253), (240, 241, 243)),
    "gray": ((176, 180, 186), (148, 153, 161)),
    "beige": ((243, 227, 194), (230, 208, 166)),
    "navy": ((44, 58, 104), (25, 33, 66)),
}
_SUBPIXEL_BITS = 4  # OpenCV takes polygon corners in 1/16 px
_RIM = 0.018  # width of the white rim, of the shorter side
_SHADOW = 0.022  # offset and blur of the shadow, of the shorter side
_SHADOW_STRENGTH = 0.38

Image = NDArray[np.uint8]
_Mask = NDArray[np.float32]


def draw_scene(scene: Scene, *, width: int, height: int) -> Image:
    """Return the picture as (H, W, 3) uint8 RGB.

    The scene fills the central square; a longer side shows more background, so that neither a
    centre crop nor a squeeze to a square loses an object or turns a relation around.
    """
    canvas = _background(scene.background, width, height)
    for each in scene.objects:
        _paste(canvas, each)
    return canvas


def _background(name: str, width: int, height: int) -> Image:
    top, bottom = (np.array(rgb, np.float32) for rgb in _BACKGROUND_RGB[name])
    down = np.arange(height, dtype=np.float32)[:, None, None] / np.float32(height)  # (H, 1, 1)
    column = np.round(top + (bottom - top) * down).astype(np.uint8)  # (H, 1, 3)
    return np.broadcast_to(column, (height, width, 3)).copy()  # (H, W, 3)


def _paste(canvas: Image, each: SceneObject) -> None:
    height, width = canvas.shape[:2]
    side = min(height, width)
    centre = np.array([(width - side) / 2 + each.x * side, (height - side) / 2 + each.y * side])
    radius, rim, drop = each.radius * side, max(1.0, _RIM * side), max(1.0, _SHADOW * side)
    reach = radius * 1.35 + rim + 4 * drop
    left, top = np.maximum(0, np.floor(centre - reach)).astype(int).tolist()
    right, bottom = np.minimum((width, height), np.ceil(centre + reach)).astype(int).tolist()
    patch: Image = canvas[top:bottom, left:right]  # (h, w, 3)

    outline = centre - (left, top) + radius * _rotated(_UNIT_SHAPES[each.shape], each.tilt_degrees)
    inside = _filled(outline, patch.shape[:2])
    sticker = _filled(outline, patch.shape[:2], rim=rim)
    patch = _blended(patch, np.zeros_like(patch), _shadow(sticker, drop))
    patch = _blended(patch, np.full_like(patch, 252), _weights(sticker))
    paint = _paint(each, patch.shape[:2], centre - (left, top), radius)
    canvas[top:bottom, left:right] = _blended(patch, paint, _weights(inside))


def _shadow(sticker: Image, drop: float) -> _Mask:
    soft = cv2.stackBlur(sticker, (4 * round(drop) + 1, 4 * round(drop) + 1))
    shift = np.array([[1, 0, 0.5 * drop], [0, 1, drop]], np.float32)
    return _weights(cv2.warpAffine(soft, shift, soft.shape[::-1])) * np.float32(_SHADOW_STRENGTH)


def _weights(coverage: NDArray[Any]) -> _Mask:
    return coverage.astype(np.float32) / np.float32(255)


def _blended(under: Image, over: Image, mask: _Mask) -> Image:
    return np.asarray(cv2.blendLinear(over, under, mask, 1 - mask), np.uint8)


def _filled(outline: NDArray[np.float64], shape: tuple[int, ...], rim: float = 0.0) -> Image:
    """Return the anti-aliased coverage (h, w) in 0..255 of a polygon, widened by `rim` pixels."""
    mask = np.zeros(shape[:2], np.uint8)
    # OpenCV's pixel (0, 0) has its centre at the origin, ours at (0.5, 0.5).
    corners = np.round((outline - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    if rim:
        thickness = max(2, round(2 * rim))  # the line is centred on the outline
        cv2.polylines(mask, [corners], True, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return mask


def _paint(
    each: SceneObject, shape: tuple[int, ...], centre: NDArray[np.float64], radius: float
) -> Image:
    """Return (h, w, 3): the colour, lit from above, under the object's texture."""
    u = (np.arange(shape[1], dtype=np.float32) + 0.5 - np.float32(centre[0])) / np.float32(radius)
    v = (np.arange(shape[0], dtype=np.float32) + 0.5 - np.float32(centre[1])) / np.float32(radius)
    lit = np.float32(1.03) - np.float32(0.10) * np.clip(v, -1, 1)
    base = np.array(COLOUR_RGB[each.colour], np.float32)
    column = np.clip(base * lit[:, None, None] + 0.5, 0, 255).astype(np.uint8)  # (h, 1, 3)
    paint = np.broadcast_to(column, (*shape[:2], 3)).copy()  # (h, w, 3)
    if each.texture == "solid":
        return paint
    white = _pattern(each.texture, u[None, :], v[:, None], np.float32(1 / radius))
    return _blended(paint, np.full_like(paint, 250), np.float32(0.82) * white)


def _pattern(
    texture: str, u: NDArray[np.float32], v: NDArray[np.float32], pixel: np.float32
) -> _Mask:
    """Return where the white of a texture lies, (h, w) in 0..1.

    `u` (1, w) and `v` (h, 1) are in radii, `pixel` is a pixel's width in them: edges are one
    pixel soft.
    """
    if texture == "striped":
        period = np.float32(0.56)
        across = (u + v) * np.float32(0.7071)
        from_middle = np.abs((across / period) % 1 - np.float32(0.5)) * period
        reach = np.float32(0.2) * period
    else:
        step = np.float32(0.62)
        row = np.round(v / (step * np.float32(0.866)))
        du = (u / step + row * np.float32(0.5)) % 1
        du = np.minimum(du, 1 - du) * step
        from_middle = np.hypot(du, v - row * step * np.float32(0.866))
        reach = np.float32(0.175)
    coverage = (reach - from_middle) / pixel + np.float32(0.5)
    return np.asarray(np.clip(coverage, 0, 1), np.float32)


def _rotated(points: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cos, sin], [-sin, cos]])
    return np.asarray(points @ turn)


def _around(num_points: int, radii: tuple[float, ...] = (1.0,)) -> NDArray[np.float64]:
    """Return points clockwise from the top, their distances from the centre taken in turn."""
    angles = np.arange(num_points) * 2 * np.pi / num_points
    away = np.resize(np.array(radii), num_points)
    return np.stack((np.sin(angles) * away, -np.cos(angles) * away), axis=1)


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack((x, y + 1.5), axis=1) / 16.0


def _plus(arm: float = 0.36) -> NDArray[np.float64]:
    quarter = np.array([(-arm, -1.0), (arm, -1.0), (arm, -arm)])
    return np.concatenate([_rotated(quarter, 90.0 * turn) for turn in range(4)])


# Circles of radius 1 would make stars look small beside squares: the factors even that out.
_UNIT_SHAPES = {
    "circle": _around(96) * 0.95,
    "square": _rotated(_around(4), 45) * 1.16,
    "triangle": (_around(3) + (0.0, 0.18)) * 1.12,
    "star": (_around(10, (1.0, 0.46)) + (0.0, 0.06)) * 1.2,
    "heart": _heart() * 1.02,
    "plus": _plus() * 1.02,
}
