"""Bytes from anywhere to an image of the corpus: judged, upright, shrunk, free of metadata, hashed.

What the published pipelines do with img2dataset's `Resizer`, under the same names of modes, with
these departures: sizes are judged before anything is decoded, EXIF orientation is applied, cut-off
files are refused rather than greyed in, and nothing is enlarged unless asked for.

Shrinking takes three steps, each no more than it must do: the inverse DCT of a JPEG leaves out what
would be averaged away, blocks of whole pixels are averaged, and the rest, less than a factor of
two, is bilinear. All three are integer arithmetic, the same on every processor, and cost a fraction
of one area interpolation of the full image. OpenCV is left at whatever number of threads its
process has set: images of this size are not shared out.

H, W height and width of an image.
"""

import io
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Self

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.image_decode import Decoded, Pixels, decode, is_bare_jpeg, shrink
from pipeline.image_header import ImageFormat, ImageHeader, ImageReason, read_header
from pipeline.sample import SampleError

_MAX_JPEG_SIDE = 65500  # libjpeg's; other encoders allow less or no more
_MAX_WEBP_SIDE = 16383
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_HASH_ROWS, _HASH_COLUMNS = 8, 9


class ResizeMode(StrEnum):
    """How an image comes to its size; img2dataset's names and meanings."""

    NO = "no"
    KEEP_RATIO = "keep_ratio"  # the shorter side becomes image_size_px
    KEEP_RATIO_LARGEST = "keep_ratio_largest"  # the longer side does
    CENTER_CROP = "center_crop"  # as keep_ratio, then cut to a square
    BORDER = "border"  # as keep_ratio_largest, then white bands to a square


class ImageConfig(BaseModel):
    """What an image must be, and what is made of it. Sides are judged on the original, upright."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size_px: Annotated[int, Field(ge=8, le=8192)] = 256
    resize_mode: ResizeMode = ResizeMode.KEEP_RATIO
    is_upscaling_allowed: bool = False
    """When not, smaller images stay as they are, without crop or border."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: Annotated[int, Field(ge=0, le=100)] = 95
    """For png the compression level, 0 to 9."""
    is_original_kept: bool = False
    """Stores a JPEG's own bytes where no resizing is due and they hold nothing but the picture."""
    min_side_px: Annotated[int, Field(ge=1)] = 1
    """LAION's subset for BLIP-2 keeps images whose shorter edge is at least 256 (Sec. 4.1)."""
    max_aspect: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Longer side over shorter side."""
    max_pixels: Annotated[int, Field(ge=1, le=2**28)] = 50_000_000
    """Bounds memory: decoding takes up to 8 bytes a pixel, of WebP 17; 6 more with mode `no`."""

    @model_validator(mode="after")
    def _quality_fits_format(self) -> Self:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError(
                f"encode_quality is {self.encode_quality}; for png it is the compression level, "
                "0 to 9"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedImage:
    """An image as the corpus stores it."""

    data: bytes
    width: int
    height: int
    original_width: int  # upright
    original_height: int
    phash: str  # 16 hexadecimal digits

    @property
    def num_bytes(self) -> int:
        """The size of what is stored."""
        return len(self.data)


def process_image(data: bytes, config: ImageConfig) -> ProcessedImage:
    """Return the image to store; the same bytes give the same result on any machine.

    Raises SampleError with an `ImageReason`. Safe to call from many threads at once.
    """
    header = read_header(data)
    _check_size(header, config)
    # As stored, not upright: the rules are the same for an image that lies on its side.
    width, height = target_size(header.width, header.height, config)
    decoded = decode(data, header, min_width=width, min_height=height)
    pixels = _upright(_resized(decoded, header, width, height), decoded.orientation)
    is_resized = (width, height) != (header.width, header.height)
    final = _cut_or_padded(pixels, config)
    is_kept = config.is_original_kept and not is_resized and final.shape == pixels.shape
    is_sideways = decoded.orientation in _SIDEWAYS
    return ProcessedImage(
        data=data if is_kept and _is_storable(data, header, config) else _encoded(final, config),
        width=final.shape[1],
        height=final.shape[0],
        original_width=header.height if is_sideways else header.width,
        original_height=header.width if is_sideways else header.height,
        phash=perceptual_hash(pixels),
    )


def target_size(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """Return the (width, height) an image is scaled to, before any crop or border."""
    if config.resize_mode is ResizeMode.NO:
        return width, height
    is_by_longer = config.resize_mode in (ResizeMode.KEEP_RATIO_LARGEST, ResizeMode.BORDER)
    side = max(width, height) if is_by_longer else min(width, height)
    if side <= config.image_size_px and not config.is_upscaling_allowed:
        return width, height
    scale = config.image_size_px / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def perceptual_hash(pixels: Pixels) -> str:
    """Return the 64-bit difference hash of (H, W, 3) RGB pixels, as 16 hexadecimal digits.

    Each bit says whether one of 8 x 9 fields is brighter than its right neighbour; pictures that
    differ by size or compression differ in few bits. Sums of integers, so exact.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)  # (H, W)
    height, width = grey.shape
    if height < _HASH_ROWS or width < _HASH_COLUMNS:
        size = max(width, _HASH_COLUMNS), max(height, _HASH_ROWS)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_LINEAR_EXACT)
        height, width = grey.shape
    rows = np.arange(_HASH_ROWS + 1) * height // _HASH_ROWS
    columns = np.arange(_HASH_COLUMNS + 1) * width // _HASH_COLUMNS
    corners = cv2.integral(grey)[np.ix_(rows, columns)]  # (9, 10)
    sums = np.diff(np.diff(corners, axis=0), axis=1).astype(np.int64)  # (8, 9)
    widths = np.diff(columns)
    is_brighter = sums[:, :-1] * widths[1:] > sums[:, 1:] * widths[:-1]  # (8, 8)
    return np.packbits(is_brighter).tobytes().hex()


def _check_size(header: ImageHeader, config: ImageConfig) -> None:
    """Raise SampleError for an image that breaks a rule; nothing has been decoded yet."""
    short, long = sorted((header.width, header.height))
    size = f"{header.width} x {header.height} pixels"
    if short * long > config.max_pixels:
        raise SampleError(ImageReason.TOO_MANY_PIXELS, f"{size}, over {config.max_pixels:,}")
    if short < config.min_side_px:
        raise SampleError(ImageReason.IMAGE_TOO_SMALL, f"{size}, a side under {config.min_side_px}")
    if config.max_aspect is not None and long > config.max_aspect * short:
        raise SampleError(ImageReason.ASPECT_TOO_LARGE, f"{size}, over {config.max_aspect:g} to 1")
    new_short, new_long = target_size(short, long, config)
    max_side = _MAX_WEBP_SIDE if config.encode_format == "webp" else _MAX_JPEG_SIDE
    if new_long > max_side or new_short * new_long > config.max_pixels:
        raise SampleError(
            ImageReason.ASPECT_TOO_LARGE,
            f"{size} would become {new_short} x {new_long}, too long to store",
        )


def _resized(decoded: Decoded, header: ImageHeader, width: int, height: int) -> Pixels:
    """Return the pixels at exactly width x height, still as stored."""
    pixels, scale = decoded.pixels, decoded.scale
    if (width, height) == (header.width, header.height):
        return pixels
    if width > header.width or height > header.height:
        enlarged = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LANCZOS4)
        return enlarged.astype(np.uint8, copy=False)
    factor = min(int(header.width * scale // width), int(header.height * scale // height))
    if factor > 1:
        pixels, scale = shrink(pixels, factor), scale / factor
    # By the factor that is meant, not by the ratio of sizes: they differ where an edge was cut.
    fx, fy = width / (header.width * scale), height / (header.height * scale)
    if fx < 1 or fy < 1:
        rest = cv2.resize(pixels, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR_EXACT)
        pixels = rest.astype(np.uint8, copy=False)
    return pixels[:height, :width]


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return the pixels turned and mirrored as EXIF asks for."""
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _cut_or_padded(pixels: Pixels, config: ImageConfig) -> Pixels:
    """Return the middle square, or the image between white bands; smaller ones as they are."""
    size, (height, width) = config.image_size_px, pixels.shape[:2]
    if config.resize_mode is ResizeMode.CENTER_CROP and min(height, width) == size:
        top, left = (height - size) // 2, (width - size) // 2
        return np.ascontiguousarray(pixels[top : top + size, left : left + size])
    if config.resize_mode is ResizeMode.BORDER and max(height, width) == size:
        top, left = (size - height) // 2, (size - width) // 2
        square = np.full((size, size, 3), 255, np.uint8)
        square[top : top + height, left : left + width] = pixels
        return square
    return pixels


def _is_storable(data: bytes, header: ImageHeader, config: ImageConfig) -> bool:
    is_jpeg = header.format is ImageFormat.JPEG and config.encode_format == "jpg"
    return is_jpeg and is_bare_jpeg(data)


def _encoded(pixels: Pixels, config: ImageConfig) -> bytes:
    """Return the file; no metadata is written, for none was carried this far."""
    if config.encode_format == "jpg":
        data: bytes = simplejpeg.encode_jpeg(pixels, config.encode_quality, "RGB", "420")
        return data
    stream, image = io.BytesIO(), Image.fromarray(pixels)
    if config.encode_format == "png":
        image.save(stream, "PNG", compress_level=config.encode_quality)
    else:
        image.save(stream, "WEBP", quality=config.encode_quality)
    return stream.getvalue()
