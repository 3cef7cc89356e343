"""What an image claims to be, read from its first bytes, before any decoder sees it.

Five formats are accepted: JPEG, PNG, WebP, GIF and BMP, which is what the lists of the web hold.
Everything else is refused by name: SVG may carry scripts, TIFF, AVIF and HEIC bring decoders that
are not worth their risk for the few images that use them.
"""

import re
import struct
from dataclasses import dataclass
from enum import StrEnum

import simplejpeg

from pipeline.sample import SampleError


class ImageFormat(StrEnum):
    """The formats that are decoded."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"
    BMP = "bmp"


class ImageReason(StrEnum):
    """Why bytes that were fetched give no image, as the ledger names it."""

    NOT_AN_IMAGE = "not_an_image"
    FORMAT_REFUSED = "format_refused"
    BAD_IMAGE = "bad_image"
    TRUNCATED_IMAGE = "truncated_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    IMAGE_TOO_SMALL = "image_too_small"
    ASPECT_TOO_LARGE = "aspect_too_large"

    @property
    def is_rule(self) -> bool:
        """Whether a sound image was left out on purpose, rather than lost to a fault."""
        return self in _RULES


_RULES = frozenset(
    {ImageReason.TOO_MANY_PIXELS, ImageReason.IMAGE_TOO_SMALL, ImageReason.ASPECT_TOO_LARGE}
)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the first bytes say: format, and size as stored, before any rotation."""

    format: ImageFormat
    width: int
    height: int


def read_header(data: bytes) -> ImageHeader:
    """Return format and size without decoding; raises SampleError with an `ImageReason`."""
    image_format = next((name for name, magic in _MAGIC if magic.match(data)), None)
    if image_format is None:
        raise _refusal(data)
    try:
        width, height = _READ_SIZE[image_format](data)
    except (struct.error, ValueError) as error:
        raise SampleError(
            ImageReason.BAD_IMAGE, f"the {image_format} header cannot be read ({error})"
        ) from error
    if width < 1 or height < 1:
        raise SampleError(ImageReason.BAD_IMAGE, f"the header says {width} x {height} pixels")
    return ImageHeader(image_format, width, height)


_MAGIC = (
    (ImageFormat.JPEG, re.compile(rb"\xff\xd8\xff")),
    (ImageFormat.PNG, re.compile(rb"\x89PNG\r\n\x1a\n")),
    (ImageFormat.WEBP, re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    (ImageFormat.GIF, re.compile(rb"GIF8[79]a")),
    (ImageFormat.BMP, re.compile(rb"BM.{8}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
)

# Looked for in order, in the first bytes; the name is for people.
_REFUSED = (
    ("SVG", re.compile(rb".{0,2000}?<svg[\s>]", re.DOTALL | re.IGNORECASE)),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("AVIF", re.compile(rb".{4}ftyp(avif|avis)", re.DOTALL)),
    ("HEIC", re.compile(rb".{4}ftyp(heic|heix|hevc|mif1|msf1)", re.DOTALL)),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("ICO", re.compile(rb"\0\0[\x01\x02]\0")),
    ("PSD", re.compile(rb"8BPS")),
)
_OTHER = (
    ("HTML", re.compile(rb"\s*<(!doctype|html|head|body|script|!--)", re.IGNORECASE)),
    ("XML", re.compile(rb"\s*<\?xml", re.IGNORECASE)),
    ("gzip", re.compile(rb"\x1f\x8b")),
    ("zip", re.compile(rb"PK\x03\x04")),
    ("PDF", re.compile(rb"%PDF")),
    ("JSON", re.compile(rb"\s*[{\[]\s*\"")),
)
_SNIFFED_BYTES = 2048


def _refusal(data: bytes) -> SampleError:
    if not data:
        return SampleError(ImageReason.NOT_AN_IMAGE, "zero bytes")
    head = data[:_SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf")
    for name, magic in _REFUSED:
        if magic.match(head):
            return SampleError(ImageReason.FORMAT_REFUSED, f"{name} is not accepted")
    kind = next((name for name, magic in _OTHER if magic.match(head)), "neither image nor page")
    return SampleError(ImageReason.NOT_AN_IMAGE, f"{kind}; it begins {data[:12]!r}")


def read_jpeg_frame(data: bytes) -> tuple[int, int, str]:
    """Return width, height and colour space of a JPEG; raises SampleError."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: a colour space that it has no name for
        raise SampleError(
            ImageReason.BAD_IMAGE, f"the jpeg header cannot be read ({error})"
        ) from error
    return width, height, colours


def _jpeg_size(data: bytes) -> tuple[int, int]:
    width, height, _ = read_jpeg_frame(data)
    return width, height


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">4x4sII", data, 8)[1:]
    return width, height


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _bmp_size(data: bytes) -> tuple[int, int]:
    is_os2 = data[14] == 12
    width, height = struct.unpack_from("<HH" if is_os2 else "<ii", data, 18)
    return width, abs(height)  # rows from the top down are written as a negative height


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        flags_and_width, low, high = struct.unpack_from("<IHB", data, 23)
        return (flags_and_width >> 8) + 1, (low | high << 16) + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"unknown first chunk {chunk!r}")


_READ_SIZE = {
    ImageFormat.JPEG: _jpeg_size,
    ImageFormat.PNG: _png_size,
    ImageFormat.GIF: _gif_size,
    ImageFormat.BMP: _bmp_size,
    ImageFormat.WEBP: _webp_size,
}
