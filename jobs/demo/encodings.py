"""Encodes a picture as the web would serve it: good files of many kinds, and broken ones."""

import io
import struct
import zlib
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from PIL import Image as PilImage

from jobs.demo.drawing import Image
from jobs.demo.shares import Share, Shares

_JPEG_QUALITY = 90
_WEBP_QUALITY = 85
_BOMB_SIDE = 60_000  # pixels, claimed by the header
# What each EXIF orientation asks a viewer to do (2 to 8), and so what undoes it when storing.
_STORE_FOR_ORIENTATION = {
    2: PilImage.Transpose.FLIP_LEFT_RIGHT,
    3: PilImage.Transpose.ROTATE_180,
    4: PilImage.Transpose.FLIP_TOP_BOTTOM,
    5: PilImage.Transpose.TRANSPOSE,
    6: PilImage.Transpose.ROTATE_90,
    7: PilImage.Transpose.TRANSVERSE,
    8: PilImage.Transpose.ROTATE_270,
}


class FileKind(StrEnum):
    """What the file at a URL is."""

    JPEG = "jpeg"
    JPEG_PROGRESSIVE = "jpeg_progressive"
    JPEG_CMYK = "jpeg_cmyk"
    JPEG_EXIF = "jpeg_exif"  # rotated by its orientation tag, with a GPS position
    PNG = "png"
    PNG_ALPHA = "png_alpha"  # black under transparent corners
    PNG_PALETTE = "png_palette"
    PNG_16BIT = "png_16bit"
    WEBP = "webp"
    GIF = "gif"
    GIF_ANIMATED = "gif_animated"  # its first frame is the picture
    CORRUPT = "corrupt"  # starts like a JPEG, then noise
    CUT = "cut"  # a JPEG whose end is missing; its length is stated rightly
    EMPTY = "empty"
    BOMB = "bomb"  # a PNG header that claims gigapixels
    SVG = "svg"  # a drawing with a script, not a raster image
    HTML = "html"  # an error page that is served as image/jpeg

    @property
    def is_image(self) -> bool:
        """Whether a careful client ends up with the picture."""
        return self not in _BROKEN

    @property
    def suffix(self) -> str:
        """The ending of the URL, with its dot."""
        return "." + _FORMAT.get(self, "jpg")

    @property
    def content_type(self) -> str:
        """The Content-Type that a server states for it."""
        return {"svg": "image/svg+xml"}.get(self.value, f"image/{_FORMAT.get(self, 'jpeg')}")


_BROKEN = frozenset(FileKind(name) for name in ("corrupt", "cut", "empty", "bomb", "svg", "html"))
_FORMAT = {
    FileKind.PNG: "png",
    FileKind.PNG_ALPHA: "png",
    FileKind.PNG_PALETTE: "png",
    FileKind.PNG_16BIT: "png",
    FileKind.BOMB: "png",
    FileKind.WEBP: "webp",
    FileKind.GIF: "gif",
    FileKind.GIF_ANIMATED: "gif",
    FileKind.SVG: "svg",
}


class FileShares(Shares):
    """How many of the web's files are of which kind; the others are plain JPEG."""

    jpeg_progressive: Share = 0.08
    jpeg_cmyk: Share = 0.01
    jpeg_exif: Share = 0.03
    png: Share = 0.12
    png_alpha: Share = 0.03
    png_palette: Share = 0.02
    png_16bit: Share = 0.005
    webp: Share = 0.08
    gif: Share = 0.02
    gif_animated: Share = 0.005
    corrupt: Share = 0.004
    cut: Share = 0.004
    empty: Share = 0.002
    svg: Share = 0.004
    html: Share = 0.004
    bomb: Share = 0.0001  # rounded up: one


def encode(picture: Image, kind: FileKind, rng: np.random.Generator) -> bytes:
    """Return the file's bytes for an (H, W, 3) uint8 RGB picture.

    `rng` decides what a kind leaves open: the orientation, the place, the noise of a corrupt file.
    """
    if kind.value.startswith("jpeg"):
        return _jpeg(picture, kind, rng)
    if kind.value.startswith("png"):
        return _png(picture, kind)
    if kind.value.startswith("gif"):
        return _gif(picture, is_animated=kind is FileKind.GIF_ANIMATED)
    if kind is FileKind.WEBP:
        return _by_opencv(".webp", picture, cv2.IMWRITE_WEBP_QUALITY, _WEBP_QUALITY)
    return _broken(picture, kind, rng)


def _jpeg(picture: Image, kind: FileKind, rng: np.random.Generator) -> bytes:
    if kind is FileKind.JPEG_CMYK:
        return _by_pillow(PilImage.fromarray(picture).convert("CMYK"), "JPEG")
    if kind is FileKind.JPEG_EXIF:
        orientation = int(rng.integers(2, 9))
        stored = PilImage.fromarray(picture).transpose(_STORE_FOR_ORIENTATION[orientation])
        return _by_pillow(stored, "JPEG", _exif(orientation, rng))
    if kind is FileKind.JPEG_PROGRESSIVE:
        return _by_opencv(".jpg", picture, *_JPEG_OPTIONS, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    return _by_opencv(".jpg", picture, *_JPEG_OPTIONS)


_JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)


def _exif(orientation: int, rng: np.random.Generator) -> bytes:
    exif = PilImage.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Demo Camera"
    degrees, minutes, seconds = rng.integers(0, (60, 60, 60)).tolist()
    exif[ExifTags.IFD.GPSInfo] = {
        ExifTags.GPS.GPSLatitudeRef: "N",
        ExifTags.GPS.GPSLatitude: (float(degrees), float(minutes), float(seconds)),
        ExifTags.GPS.GPSLongitudeRef: "E",
        ExifTags.GPS.GPSLongitude: (float(minutes), float(seconds), float(degrees)),
    }
    return exif.tobytes()


def _png(picture: Image, kind: FileKind) -> bytes:
    if kind is FileKind.PNG_ALPHA:
        alpha = _rounded_corners(*picture.shape[:2])
        visible = np.where(alpha[:, :, None] > 0, picture, np.uint8(0))
        return _by_opencv(".png", np.dstack((visible, alpha)))
    if kind is FileKind.PNG_16BIT:
        return _by_opencv(".png", picture.astype(np.uint16) * np.uint16(257))
    if kind is FileKind.PNG_PALETTE:
        return _by_pillow(_with_palette(picture), "PNG")
    return _by_opencv(".png", picture)


def _rounded_corners(height: int, width: int) -> Image:
    """Return alpha (H, W): 255 inside, 0 in the four corners, anti-aliased."""
    radius = 0.08 * min(height, width)
    down = np.maximum(0, radius - np.minimum(np.arange(height) + 0.5, height - np.arange(height)))
    along = np.maximum(0, radius - np.minimum(np.arange(width) + 0.5, width - np.arange(width)))
    inside = radius - np.hypot(down[:, None], along[None, :]) + 0.5
    return np.asarray(np.round(np.clip(inside, 0, 1) * 255), np.uint8)


def _gif(picture: Image, *, is_animated: bool) -> bytes:
    first = _with_palette(picture)
    if not is_animated:
        return _by_pillow(first, "GIF")
    others = [
        _with_palette(np.ascontiguousarray(np.rot90(picture, 2))),
        _with_palette(255 - picture),
    ]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=400, loop=0)
    return buffer.getvalue()


def _with_palette(picture: Image) -> PilImage.Image:
    return PilImage.fromarray(picture).quantize(128, method=PilImage.Quantize.FASTOCTREE)


def _broken(picture: Image, kind: FileKind, rng: np.random.Generator) -> bytes:
    if kind is FileKind.BOMB:
        return _png_bomb()
    if kind is FileKind.SVG:
        return _SVG
    if kind is FileKind.HTML:
        return _HTML
    if kind is FileKind.EMPTY:
        return b""
    whole = _by_opencv(".jpg", picture, *_JPEG_OPTIONS)
    if kind is FileKind.CUT:
        return whole[: len(whole) * 6 // 10]
    return whole[:4] + rng.bytes(len(whole) - 4)


def _png_bomb() -> bytes:
    header = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * _BOMB_SIDE + 1) * 4, 9)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _by_opencv(suffix: str, picture: NDArray[np.uint8 | np.uint16], *options: int) -> bytes:
    channels = cv2.COLOR_RGBA2BGRA if picture.shape[2] == 4 else cv2.COLOR_RGB2BGR
    done, buffer = cv2.imencode(suffix, cv2.cvtColor(picture, channels), options)
    assert done, f"OpenCV cannot write {suffix}"
    return buffer.tobytes()


def _by_pillow(image: PilImage.Image, file_format: str, exif: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, exif=exif, quality=_JPEG_QUALITY)
    return buffer.getvalue()


_SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" width="96" height="96">
<script>document.title = "a script inside an image";</script>
<circle cx="48" cy="48" r="40" fill="crimson"/></svg>
"""
_HTML = b"""<!doctype html>
<html><head><title>Not here any more</title></head>
<body><h1>Oops</h1><p>The image has moved. <a href="/">Home</a></p></body></html>
"""
