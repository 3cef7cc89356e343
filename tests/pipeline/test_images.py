"""Every kind of image that the web serves: stored as it should look, or refused with a reason."""

import gzip
import io
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from pydantic import ValidationError

from pipeline.image_header import ImageReason, read_header
from pipeline.images import ImageConfig, perceptual_hash, process_image, target_size
from pipeline.sample import SampleError

SMALL = ImageConfig(image_size_px=64)
AS_IS = ImageConfig(resize_mode="no")
RED, GREEN, BLUE, WHITE = (220, 40, 40), (40, 180, 60), (40, 60, 220), (255, 255, 255)


def quarters(width=160, height=120, colours=(RED, GREEN, BLUE, WHITE)):
    """A picture that shows how it is turned: red top left, green top right, blue below, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = colours[:2]
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = colours[2:]
    return Image.fromarray(pixels)


def texture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def saved(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}) | options)
    return stream.getvalue()


def pixels_of(result):
    return np.asarray(Image.open(io.BytesIO(result.data)).convert("RGB")).astype(int)


def assert_quarters(result, colours=(RED, GREEN, BLUE, WHITE), tolerance=25):
    pixels = pixels_of(result)
    height, width = pixels.shape[:2]
    for (y, x), colour in zip([(1, 1), (1, 3), (3, 1), (3, 3)], colours, strict=True):
        seen = pixels[y * height // 4, x * width // 4]
        assert np.abs(seen - colour).max() <= tolerance, f"{seen} at {(y, x)}, not {colour}"


def reason_of(data, config=SMALL):
    with pytest.raises(SampleError) as caught:
        process_image(data, config)
    assert caught.value.message
    return ImageReason(caught.value.reason)


# What is accepted


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_each_accepted_format_becomes_a_small_jpeg(kind):
    result = process_image(saved(quarters(), kind), SMALL)
    assert result.data.startswith(b"\xff\xd8")
    assert (result.width, result.height) == (85, 64)
    assert (result.original_width, result.original_height) == (160, 120)
    assert_quarters(result)


def test_lossless_webp_and_webp_with_alpha_have_their_sizes_read():
    rgba = quarters().convert("RGBA")
    rgba.putalpha(128)
    for data in (saved(quarters(), "WEBP", lossless=True), saved(rgba, "WEBP", lossless=False)):
        header = read_header(data)
        assert (header.width, header.height) == (160, 120)
        process_image(data, SMALL)


def test_a_progressive_jpeg_is_an_image():
    assert_quarters(process_image(saved(quarters(), progressive=True), SMALL))


def test_grey_images_become_rgb():
    grey = quarters().convert("L")
    for kind in ("JPEG", "PNG"):
        pixels = pixels_of(process_image(saved(grey, kind), AS_IS))
        assert np.abs(pixels - np.asarray(grey)[..., None]).max() < 20


def test_cmyk_jpegs_keep_their_colours():
    assert_quarters(process_image(saved(quarters().convert("CMYK")), SMALL), tolerance=40)


def test_sixteen_bits_keep_the_upper_eight():
    ramp = np.linspace(0, 65535, 160, dtype=np.uint16)
    image = Image.fromarray(np.tile(ramp, (120, 1)))
    pixels = pixels_of(process_image(saved(image, "PNG"), AS_IS))
    assert np.abs(pixels[60, :, 0] - (ramp >> 8)).max() <= 3


def test_sixteen_bit_colour_is_read():
    colours = np.asarray(quarters()).astype(np.uint16) * 257
    data = cv2.imencode(".png", colours[..., ::-1])[1].tobytes()
    assert_quarters(process_image(data, SMALL))


def test_one_bit_images_are_black_and_white():
    pixels = pixels_of(process_image(saved(quarters().convert("1"), "PNG"), AS_IS))
    assert pixels.min() < 10
    assert pixels.max() > 245


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_becomes_white(kind):
    rgba = quarters(colours=(RED, GREEN, BLUE, (0, 0, 0))).convert("RGBA")
    alpha = np.full((120, 160), 255, np.uint8)
    alpha[60:, 80:] = 0
    rgba.putalpha(Image.fromarray(alpha))
    assert_quarters(process_image(saved(rgba, kind), SMALL))


def test_a_transparent_palette_entry_becomes_white():
    palette = quarters(colours=(RED, GREEN, BLUE, (0, 0, 0))).quantize(4)
    black = palette.getpixel((159, 119))
    for kind in ("PNG", "GIF"):
        assert_quarters(process_image(saved(palette, kind, transparency=black), SMALL))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    others = [quarters(colours=(BLUE,) * 4), quarters(colours=(GREEN,) * 4)]
    data = saved(quarters(), kind, save_all=True, append_images=others, duration=50)
    assert_quarters(process_image(data, SMALL))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quarters() if orientation == 1 else quarters().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = process_image(saved(stored, kind, exif=exif), SMALL)
    assert_quarters(result)
    assert (result.width, result.height) == (85, 64)
    assert (result.original_width, result.original_height) == (160, 120)


def test_damaged_exif_costs_nothing_but_itself():
    data = saved(quarters(), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert_quarters(process_image(data, SMALL))


def test_no_metadata_survives():
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(quarters(), exif=exif, icc_profile=profile, comment=b"SecretComment")
    assert b"SecretCamera" in data
    for config in (SMALL, AS_IS, ImageConfig(is_original_kept=True)):
        result = process_image(data, config).data
        assert b"Secret" not in result
        assert b"Exif" not in result
        assert b"ICC_PROFILE" not in result


# Size


@pytest.mark.parametrize(
    ("mode", "size", "is_up", "expected"),
    [
        ("keep_ratio", (800, 600), False, (341, 256)),
        ("keep_ratio", (600, 800), False, (256, 341)),
        ("keep_ratio", (300, 200), False, (300, 200)),
        ("keep_ratio", (300, 200), True, (384, 256)),
        ("keep_ratio_largest", (800, 600), False, (256, 192)),
        ("keep_ratio_largest", (5000, 2), False, (256, 1)),
        ("center_crop", (800, 600), False, (256, 256)),
        ("center_crop", (300, 200), False, (300, 200)),
        ("center_crop", (300, 200), True, (256, 256)),
        ("border", (800, 600), False, (256, 256)),
        ("border", (200, 100), False, (200, 100)),
        ("border", (200, 100), True, (256, 256)),
        ("no", (800, 600), False, (800, 600)),
    ],
)
def test_each_resize_mode_gives_its_size(mode, size, is_up, expected):
    config = ImageConfig(resize_mode=mode, is_upscaling_allowed=is_up)
    result = process_image(saved(texture(*size)), config)
    assert (result.width, result.height) == expected
    assert pixels_of(result).shape[1::-1] == expected


def test_border_is_white_and_beside_the_image():
    config = ImageConfig(image_size_px=64, resize_mode="border")
    pixels = pixels_of(process_image(saved(quarters(colours=(RED,) * 4)), config))
    assert pixels[:5].min() > 245
    assert pixels[-5:].min() > 245
    assert np.abs(pixels[32, 32] - RED).max() < 10


def test_center_crop_takes_the_middle():
    image = Image.new("RGB", (300, 100), RED)
    image.paste(GREEN, (100, 0, 200, 100))
    config = ImageConfig(image_size_px=64, resize_mode="center_crop")
    assert_quarters(process_image(saved(image), config), colours=(GREEN,) * 4)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(["keep_ratio", "border"]))
def test_target_size_never_enlarges_and_keeps_the_ratio(width, height, mode):
    config = ImageConfig(resize_mode=mode)
    new_width, new_height = target_size(width, height, config)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    if min(new_width, new_height) > 1:
        scale = new_width / width
        assert abs(new_height - height * scale) <= 0.5 + height / width


@pytest.mark.parametrize(
    "size", [(800, 600), (916, 759), (640, 480), (1601, 1203), (501, 377), (70, 3001), (513, 2)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_shrinking_is_as_good_as_an_area_mean_of_all_pixels(size, kind):
    config = ImageConfig(encode_format="png", encode_quality=1, min_side_px=1)
    image = texture(*size)
    data = saved(image, kind)
    result = process_image(data, config)
    full = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    area = cv2.resize(full, (result.width, result.height), interpolation=cv2.INTER_AREA)
    error = np.square(pixels_of(result) - area.astype(int)).mean()
    psnr = 10 * np.log10(255**2 / max(error, 1e-9))
    assert psnr > 38, f"{psnr:.1f} dB"  # measured: 41 and more


@pytest.mark.parametrize("size", [(916, 759), (1603, 1201), (2047, 1533)])
def test_shrinking_does_not_move_the_picture(size):
    """Sizes that eight does not divide: what the DCT rounds up must not stretch the picture."""
    config = ImageConfig(encode_format="png", encode_quality=1)
    x = np.arange(size[0])[None, :, None] * 255 / size[0]
    ramp = np.broadcast_to(x, (size[1], size[0], 3)).astype(np.uint8)
    result = process_image(saved(Image.fromarray(ramp), quality=98), config)
    wanted = (np.arange(result.width) + 0.5) * 255 / result.width
    middle = slice(3, -3)
    assert np.abs(pixels_of(result)[100, :, 0] - wanted)[middle].mean() < 0.9


# Rules on the original size


def test_small_sides_and_long_shapes_are_left_out_before_decoding():
    broken = saved(texture(300, 200))[:-2000]  # judged by the header alone
    assert reason_of(broken, ImageConfig(min_side_px=256)) is ImageReason.IMAGE_TOO_SMALL
    assert reason_of(broken, ImageConfig(max_aspect=1.4)) is ImageReason.ASPECT_TOO_LARGE
    process_image(saved(texture(300, 200)), ImageConfig(min_side_px=200, max_aspect=1.5))


def test_rules_are_told_from_faults():
    assert {reason for reason in ImageReason if reason.is_rule} == {
        ImageReason.TOO_MANY_PIXELS,
        ImageReason.IMAGE_TOO_SMALL,
        ImageReason.ASPECT_TOO_LARGE,
    }


def test_enlarging_a_thin_line_is_refused():
    config = ImageConfig(is_upscaling_allowed=True)
    assert reason_of(saved(texture(5000, 1), "PNG"), config) is ImageReason.ASPECT_TOO_LARGE


# Bombs


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(side):
    """A PNG of side x side black pixels in a few kilobytes of its first rows."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((3 * side + 1) * 16))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", rows)
        + png_chunk(b"IEND", b"")
    )


def peak_bytes_of(action):
    import tracemalloc  # numpy and Python report to it; decoders never get as far

    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def oversized():
    jpeg = bytearray(saved(texture(64, 64)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    gif = bytearray(saved(texture(64, 64), "GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    bmp = bytearray(saved(texture(64, 64), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, -60_000)
    webp = bytearray(saved(texture(64, 64), "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    return [png_bomb(60_000), bytes(jpeg), bytes(gif), bytes(bmp), bytes(webp)]


@pytest.mark.parametrize("data", oversized(), ids=["png", "jpeg", "gif", "bmp", "webp"])
def test_a_bomb_is_refused_by_its_header(data, recwarn):
    peak = peak_bytes_of(lambda: reason_of(data))
    assert reason_of(data) is ImageReason.TOO_MANY_PIXELS
    assert peak < 1_000_000
    assert not recwarn.list


def test_a_second_png_header_does_not_change_the_size_that_was_judged():
    big = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    good = saved(texture(64, 64), "PNG")
    assert reason_of(good[:33] + png_chunk(b"IHDR", big) + good[33:]) is ImageReason.BAD_IMAGE


def test_a_jpeg_of_endless_scans_is_refused():
    data = saved(texture(64, 64), progressive=True)
    start = data.rindex(b"\xff\xda")
    assert reason_of(data[:-2] + data[start:-2] * 200 + data[-2:]) is ImageReason.BAD_IMAGE


def test_a_text_bomb_in_a_png_is_refused():
    good = saved(texture(64, 64), "PNG")
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000), 9))
    assert reason_of(good[:33] + bomb + good[33:]) is ImageReason.BAD_IMAGE


# Damage


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
@pytest.mark.parametrize("ending", [b"", b"\xff\xd9"], ids=["cut", "cut and closed"])
def test_a_jpeg_that_is_cut_short_is_never_greyed_in(options, ending):
    data = saved(texture(320, 240), **options)
    assert reason_of(data[: len(data) // 2] + ending) in (
        ImageReason.TRUNCATED_IMAGE,
        ImageReason.BAD_IMAGE,  # where a restart marker made something else of it
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_other_formats_cut_short_are_refused(kind, share):
    data = saved(texture(320, 240), kind)
    reason = reason_of(data[: int(len(data) * share)])
    assert reason in (ImageReason.TRUNCATED_IMAGE, ImageReason.BAD_IMAGE)


def test_damage_inside_a_jpeg_is_refused():
    data = bytearray(saved(texture(320, 240)))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(range(1, 65))
    assert reason_of(bytes(data)) in (ImageReason.BAD_IMAGE, ImageReason.TRUNCATED_IMAGE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", ImageReason.NOT_AN_IMAGE),
        (b"<!DOCTYPE html><html><body>404</body></html>", ImageReason.NOT_AN_IMAGE),
        (b"\xef\xbb\xbf  <html>", ImageReason.NOT_AN_IMAGE),
        (gzip.compress(b"data"), ImageReason.NOT_AN_IMAGE),
        (b"PK\x03\x04 an archive", ImageReason.NOT_AN_IMAGE),
        (b'{"error": 1}', ImageReason.NOT_AN_IMAGE),
        (bytes(range(256)), ImageReason.NOT_AN_IMAGE),
        (b"BM", ImageReason.NOT_AN_IMAGE),
        (
            b"<svg onload='alert(1)' xmlns='http://www.w3.org/2000/svg'/>",
            ImageReason.FORMAT_REFUSED,
        ),
        (b"<?xml version='1.0'?>\n<!-- x --><svg >", ImageReason.FORMAT_REFUSED),
        (b"II*\0\x08\0\0\0", ImageReason.FORMAT_REFUSED),
        (b"\0\0\0\x1cftypavif\0\0\0\0", ImageReason.FORMAT_REFUSED),
        (b"\xff\xd8\xff\xe0", ImageReason.BAD_IMAGE),
        (b"\x89PNG\r\n\x1a\n", ImageReason.BAD_IMAGE),
        (b"GIF89a\0\0\0\0\0\0\0", ImageReason.BAD_IMAGE),
        (b"RIFF\0\0\0\0WEBPXXXX" + bytes(20), ImageReason.BAD_IMAGE),
    ],
)
def test_what_is_no_image_is_refused_by_name(data, reason):
    assert reason_of(data) is reason


SEEDS = [saved(texture(48, 40), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
SEEDS.append(saved(texture(48, 40).convert("CMYK")))
SEEDS.append(saved(texture(48, 40).quantize(9), "GIF", transparency=2))


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 300),
)
def test_any_damage_is_an_image_or_a_reason(seed, changes, num_cut):
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    try:
        result = process_image(bytes(data[: len(data) - num_cut]), SMALL)
    except SampleError as error:
        ImageReason(error.reason)
    else:
        assert pixels_of(result).size


# What is stored


def test_original_bytes_are_kept_when_asked_for_and_nothing_has_to_be_done():
    config = ImageConfig(is_original_kept=True)
    clean, turned = saved(texture(200, 100)), Image.Exif()
    turned[0x0112] = 6
    assert process_image(clean, config).data == clean
    assert process_image(clean, ImageConfig()).data != clean
    assert process_image(saved(texture(200, 100), "PNG"), config).data.startswith(b"\xff\xd8")
    for dirty in (
        saved(texture(200, 100), exif=turned),
        saved(texture(200, 100), comment=b"hello"),
        clean + b"#!/bin/sh",
        saved(texture(800, 600)),
    ):
        assert process_image(dirty, config).data != dirty


@pytest.mark.parametrize(
    ("name", "quality", "magic"), [("png", 6, b"\x89PNG"), ("webp", 80, b"RIFF")]
)
def test_other_encodings_can_be_asked_for(name, quality, magic):
    config = ImageConfig(image_size_px=64, encode_format=name, encode_quality=quality)
    result = process_image(saved(quarters()), config)
    assert result.data.startswith(magic)
    assert_quarters(result)


def test_png_quality_out_of_range_is_refused():
    with pytest.raises(ValidationError, match="compression level"):
        ImageConfig(encode_format="png", encode_quality=95)


def num_differing_bits(one, other):
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_the_perceptual_hash_outlives_scaling_and_compression():
    image = texture(640, 480, seed=3)
    first = process_image(saved(image), SMALL).phash
    assert len(first) == 16
    for other in (saved(image, quality=40), saved(image.resize((333, 250))), saved(image, "WEBP")):
        assert num_differing_bits(first, process_image(other, SMALL).phash) <= 4
    assert num_differing_bits(first, process_image(saved(texture(640, 480, 9)), SMALL).phash) > 15


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_the_perceptual_hash_says_which_field_is_brighter(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert len(perceptual_hash(pixels)) == 16
    falling = np.broadcast_to(np.arange(90, 0, -1, dtype=np.uint8)[None, :, None], (80, 90, 3))
    assert perceptual_hash(np.ascontiguousarray(falling)) == "ff" * 8
    assert perceptual_hash(np.ascontiguousarray(falling[:, ::-1])) == "00" * 8


def test_threads_do_not_change_a_byte():
    inputs = [saved(texture(300 + 7 * n, 200 + 5 * n, n)) for n in range(12)]
    alone = [process_image(data, SMALL) for data in inputs]
    together = [None] * len(inputs)

    def work(n):
        together[n] = process_image(inputs[n], SMALL)

    num_opencv_threads = cv2.getNumThreads()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert cv2.getNumThreads() == num_opencv_threads
