"""Accepted bytes to RGB pixels, no larger than they need to be, or one reason why not.

H, W height and width of an image. Everything here is safe to call from many threads at once.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, PngImagePlugin, WebPImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.image_header import ImageFormat, ImageHeader, ImageReason, read_jpeg_frame
from pipeline.sample import SampleError

Pixels = npt.NDArray[np.uint8]

# What Pillow's parsers raise on bytes that were made or damaged to be wrong.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,  # a frame larger than the header said
)
# Named directly, for Image.open would offer the bytes to every plugin there is, and warn of sizes
# that have been judged already.
_PLUGINS: dict[ImageFormat, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    ImageFormat.JPEG: JpegImageFile,
    ImageFormat.PNG: PngImagePlugin.PngImageFile,
    ImageFormat.WEBP: WebPImagePlugin.WebPImageFile,
    ImageFormat.GIF: GifImagePlugin.GifImageFile,
    ImageFormat.BMP: BmpImagePlugin.BmpImageFile,
}
_ORIENTATION_TAG, _SHORT = 0x0112, 3  # of EXIF
_SOF2, _SOS, _APP1 = 0xC2, 0xDA, 0xE1  # JPEG markers: progressive frame, scan, EXIF
_NO_LENGTH = (0x01, 0xFF, *range(0xD0, 0xD9))  # padding and markers that stand alone
_MAX_SCANS = 100  # encoders write about ten; each costs a pass over all pixels
_TRUNCATED = re.compile("truncat|premature end|unexpected end|broken data stream", re.IGNORECASE)
# Anything that describes rather than depicts: APP1-13 and APP15 (EXIF, XMP, ICC, IPTC), comments.
_METADATA_MARKER = re.compile(rb"\xff[\xe1-\xed\xef\xfe]")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels as stored, and how much smaller than the image they are."""

    pixels: Pixels  # (H, W, 3) RGB
    scale: float  # the image is exactly 1/scale times as large; the last row and column may be cut
    orientation: int  # EXIF's, 1 to 8


def decode(data: bytes, header: ImageHeader, *, min_width: int, min_height: int) -> Decoded:
    """Return all of an image's pixels, or fewer, but never fewer than asked for in either side.

    Alpha is laid over white, of an animation the first frame is taken, 16 bits become 8, CMYK
    becomes RGB; colour profiles are ignored, as in the published pipelines. Raises SampleError.
    """
    if header.format is not ImageFormat.JPEG:
        return _decode_with_pillow(data, header, min_width, min_height)
    orientation = 1
    for marker, segment in _head_segments(data):
        if marker == _SOF2:
            _check_num_scans(data)
        elif marker == _APP1 and segment.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(segment)
    if read_jpeg_frame(data)[2] in ("CMYK", "YCCK"):
        return _decode_with_pillow(data, header, min_width, min_height)
    pixels = _decode_jpeg(data, min_width, min_height)
    return Decoded(pixels, _eighths(header, pixels) / 8, orientation)


def is_bare_jpeg(data: bytes) -> bool:
    """Say whether a JPEG holds nothing but its picture: no EXIF, no profile, no hidden tail.

    Compressed pixels never hold such a marker; a table that does, by chance, costs a re-encoding.
    """
    return data.endswith(b"\xff\xd9") and _METADATA_MARKER.search(data) is None


def shrink(pixels: Pixels, factor: int) -> Pixels:
    """Return the means of factor x factor blocks; blocks that the edge cuts are means as well."""
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def bad_image(message: str) -> SampleError:
    """Return the error for what a decoder said: the file is cut short, or damaged otherwise."""
    is_cut = _TRUNCATED.search(message) is not None
    reason = ImageReason.TRUNCATED_IMAGE if is_cut else ImageReason.BAD_IMAGE
    return SampleError(reason, message[:200])


def _head_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of each segment before the first scan, as far as they are sound."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _NO_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == _SOS:
            return
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        yield marker, data[position + 4 : end]
        position = end


def _check_num_scans(data: bytes) -> None:
    """Raise SampleError for a progressive JPEG of so many scans that decoding would not end."""
    num_scans = data.count(b"\xff\xda")
    if num_scans > _MAX_SCANS:
        raise SampleError(ImageReason.BAD_IMAGE, f"{num_scans} scans, at most {_MAX_SCANS}")


def _decode_jpeg(data: bytes, min_width: int, min_height: int) -> Pixels:
    """Let the inverse DCT do most of the shrinking: it never computes what would be averaged away.

    Scales between a half and one would save nothing and blur, hence min_factor. OpenCV and Pillow
    fill what is missing with grey and go on; strict decoding tells.
    """
    sides = {"min_width": min_width, "min_height": min_height, "min_factor": 2}
    try:
        return _three_channels(simplejpeg.decode_jpeg(data, "RGB", strict=True, **sides))
    except ValueError as error:
        if re.search("premature end|corrupt|not a jpeg", str(error), re.IGNORECASE):
            raise bad_image(str(error)) from error
    try:  # harmless oddities, such as a version number from the future
        return _three_channels(simplejpeg.decode_jpeg(data, "RGB", strict=False, **sides))
    except ValueError as error:
        raise bad_image(str(error)) from error


def _three_channels(pixels: Pixels) -> Pixels:
    assert pixels.ndim == 3, pixels.shape
    assert pixels.shape[2] == 3, pixels.shape
    return pixels


def _eighths(header: ImageHeader, pixels: Pixels) -> int:
    stored, decoded = max(header.width, header.height), max(pixels.shape[:2])
    return max(1, int(8 * decoded / stored + 1e-9)) if decoded < stored else 8


def _exif_orientation(exif: bytes) -> int:
    """Return the orientation that an EXIF block asks for; 1 where it is damaged or silent."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(num_entries):
            at = start + 2 + 12 * entry
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _ORIENTATION_TAG and kind == _SHORT:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # it ends early: damaged EXIF says nothing of the picture
    return 1


def _decode_with_pillow(
    data: bytes, header: ImageHeader, min_width: int, min_height: int
) -> Decoded:
    try:
        with _PLUGINS[header.format](io.BytesIO(data)) as image:
            if image.size != (header.width, header.height):
                raise SampleError(
                    ImageReason.BAD_IMAGE,
                    f"two sizes: {header.width} x {header.height} and {image.width} x "
                    f"{image.height}",
                )
            image.load()
            orientation = _exif_orientation(image.info.get("exif", b""))
            factor = max(1, min(image.width // min_width, image.height // min_height))
            source = _reducible(image)
            flat = _flatten(source.reduce(factor) if factor > 1 else source)
    except _PILLOW_ERRORS as error:
        raise bad_image(f"{type(error).__name__}: {error}") from error
    return Decoded(np.asarray(flat), 1 / factor, orientation)


def _reducible(image: Image.Image) -> Image.Image:
    """Return the image in a mode of 8 bits a channel whose pixels can be averaged."""
    if image.mode.startswith("I"):  # 16 bits, in 16 or 32
        pixels = np.asarray(image)
        return Image.fromarray(np.clip(pixels >> 8, 0, 255).astype(np.uint8))
    wanted = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as RGB, what is transparent as white; made small first, as it costs less.

    Pillow weighs colours with their alpha when it averages, so what is hidden does not bleed.
    """
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    return flat
