"""What becomes of an image and its captions on the way into a batch."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from loader_corpora import photo
from PIL import Image, ImageOps

from pipeline.loading import randaugment
from pipeline.loading.config import Augmentation, LoaderConfig
from pipeline.loading.draws import draw
from pipeline.loading.images import NUM_DRAWS, normalised, random_crop, resize, training_image
from pipeline.loading.texts import clean_caption, draw_text
from pipeline.sample import SampleError

CROP = LoaderConfig(image_size=32)
RANDAUGMENT = LoaderConfig(image_size=32, augmentation="crop_randaugment")
RESIZE = LoaderConfig(image_size=32, augmentation="resize")


def pixels_of(number=0, width=48, height=40):
    return simplejpeg.decode_jpeg(photo(number, width, height), "RGB")


def draws(number=0):
    return draw(NUM_DRAWS, "test", number)


def bicubic(pixels, side):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def levels_apart(first, second):
    return np.abs(first.astype(int) - second.astype(int))


# Crop, resize, flip


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10_000))
def test_a_random_crop_lies_within_the_image(width, height, number):
    crop = random_crop(width, height, 0.5, draws(number))
    assert crop.width >= 1
    assert crop.height >= 1
    assert 0 <= crop.left <= width - crop.width
    assert 0 <= crop.top <= height - crop.height


def test_random_crops_have_the_areas_and_ratios_of_the_paper():
    crops = [random_crop(512, 384, 0.5, draws(number)) for number in range(2000)]
    areas = [crop.width * crop.height / (512 * 384) for crop in crops]
    ratios = [crop.width / crop.height for crop in crops]
    assert min(areas) > 0.49
    assert max(areas) <= 1
    assert min(ratios) > 0.74
    assert max(ratios) < 1.35
    assert {crop.left == 0 for crop in crops} == {True, False}
    assert np.mean([c.left / max(512 - c.width, 1) for c in crops]) == pytest.approx(0.5, abs=0.03)


def test_an_image_too_long_for_any_crop_is_cut_in_the_middle():
    crop = random_crop(1000, 30, 0.5, draws())
    assert (crop.width, crop.height, crop.left, crop.top) == (40, 30, 480, 0)


@pytest.mark.parametrize(("width", "height"), [(48, 40), (31, 77), (400, 300), (20, 20)])
def test_resizing_agrees_with_pillow_to_one_level(width, height):
    pixels = pixels_of(1, width, height)
    assert levels_apart(resize(pixels, 32), bicubic(pixels, 32)).max() <= 1


def test_evaluation_sees_the_whole_image_squeezed():
    image = training_image(photo(2), RESIZE, draws())
    assert levels_apart(image, bicubic(pixels_of(2), 32)).max() <= 1


def test_training_sees_the_crop_that_its_numbers_say_and_its_mirror_image():
    numbers = draws(5)
    crop = random_crop(48, 40, 0.5, numbers)
    cut = pixels_of(3)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    seen = {}
    for is_flipped in (False, True):
        numbers[22] = 0.4 if is_flipped else 0.6
        seen[is_flipped] = training_image(photo(3), CROP, numbers)
    assert levels_apart(seen[False], bicubic(cut, 32)).max() <= 1
    assert (seen[True] == seen[False][:, ::-1]).all()


@pytest.mark.parametrize("number", range(6))
def test_a_large_jpeg_decoded_small_shows_the_same_crop(number):
    data, numbers = photo(4, 900, 700), draws(number)
    numbers[22] = 0.6
    crop = random_crop(900, 700, 0.5, numbers)
    whole = simplejpeg.decode_jpeg(data, "RGB")
    cut = whole[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    error = levels_apart(training_image(data, CROP, numbers), bicubic(cut, 32))
    shifted = levels_apart(bicubic(np.roll(cut, 28, axis=1), 32), bicubic(cut, 32))
    assert error.mean() < 2 < shifted.mean()  # one pixel of the result to the side is far off


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_other_formats_are_read_too(suffix):
    stream = io.BytesIO()
    Image.fromarray(pixels_of(5)).save(stream, suffix, lossless=True)
    image = training_image(stream.getvalue(), RESIZE, draws())
    assert levels_apart(image, bicubic(pixels_of(5), 32)).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html>gone</html>", "not_an_image"),
        (photo(6)[:700], "truncated_image"),
        (photo(6)[:200] + b"\0" * 500, "bad_image"),
    ],
)
def test_bytes_that_are_no_sound_image_are_refused_with_a_reason(data, reason):
    with pytest.raises(SampleError) as caught:
        training_image(data, CROP, draws())
    assert caught.value.reason == reason


def test_an_image_larger_than_allowed_is_not_decoded():
    with pytest.raises(SampleError, match="48 x 40 pixels, at most 1,000"):
        training_image(photo(7), LoaderConfig(max_pixels=1000), draws())


def test_normalising_gives_each_channel_its_mean_and_deviation():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (pixels.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    torch.testing.assert_close(normalised(pixels, mean, std), expected.float())


# RandAugment


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (randaugment.auto_contrast, ImageOps.autocontrast),
        (randaugment.equalize, ImageOps.equalize),
    ],
)
@pytest.mark.parametrize("number", range(4))
def test_look_up_operations_are_pillows(operation, reference, number):
    pixels = (pixels_of(number) // 2 + 40).astype(np.uint8)
    assert (operation(pixels, 1.0) == np.asarray(reference(Image.fromarray(pixels)))).all()


@pytest.mark.parametrize("operation", [randaugment.auto_contrast, randaugment.equalize])
def test_look_up_operations_leave_one_colour_alone(operation):
    plain = np.full((8, 8, 3), 77, np.uint8)
    assert (operation(plain, 1.0) == plain).all()


def test_translations_move_by_five_pixels_and_fill_with_grey():
    pixels = pixels_of()
    right, down = randaugment.translate_x(pixels, -1.0), randaugment.translate_y(pixels, -1.0)
    assert (right[:, 5:] == pixels[:, :-5]).all()
    assert (right[:, :5] == 128).all()
    assert (down[5:] == pixels[:-5]).all()
    assert (randaugment.translate_x(pixels, 1.0)[:, :-5] == pixels[:, 5:]).all()


def test_rotation_is_fifteen_degrees_counter_clockwise():
    pixels = pixels_of(0, 64, 64)
    image = Image.fromarray(pixels)
    for sign in (1, -1):
        expected = image.rotate(15 * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        other = image.rotate(-15 * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        turned = cv2.blur(randaugment.rotate(pixels, sign), (3, 3))
        inner = np.s_[8:-8, 8:-8]
        error = levels_apart(turned, cv2.blur(np.asarray(expected), (3, 3)))[inner].mean()
        assert error < 4
        assert error < levels_apart(turned, np.asarray(other))[inner].mean() / 4


def test_shears_move_a_row_or_column_in_proportion_to_its_place():
    pixels = pixels_of(0, 64, 64)
    sheared = randaugment.shear_x(pixels, 1.0)
    assert (sheared[0] == pixels[0]).all()
    assert (sheared[20, 3:] == pixels[20, :-3]).all()  # 20 rows at 0.15
    assert (randaugment.shear_y(pixels, 1.0)[3:, 20] == pixels[:-3, 20]).all()
    assert (randaugment.shear_x(pixels, -1.0)[20, :-3] == pixels[20, 3:]).all()


def test_each_operation_is_drawn_a_tenth_and_done_half_of_the_time():
    pixels = pixels_of()
    outcomes = [randaugment.apply(pixels, draw(6, "augment", number)) for number in range(1500)]
    share_unchanged = np.mean([(outcome == pixels).all() for outcome in outcomes])
    # Each of two draws leaves all as it was if skipped (1/2), or one of the three no-ops (3/20).
    assert share_unchanged == pytest.approx(0.65**2, abs=0.04)


def test_randaugment_comes_after_the_crop():
    numbers = draws(8)
    plain = training_image(photo(8), CROP, numbers)
    assert RANDAUGMENT.augmentation is Augmentation.CROP_RANDAUGMENT
    expected = randaugment.apply(np.ascontiguousarray(plain), numbers[23:])
    assert (training_image(photo(8), RANDAUGMENT, numbers) == expected).all()


# Captions


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('A "Red" Car.', "a red car"),
        ("  dogs;  cats :and ~ (birds)!\n", "dogs cats and birds"),
        ("it's well-known and/or odd, right?", "it's well-known and/or odd, right?"),
        ("one two three four five six", "one two three four five"),
        ("#1 *star*", "1 star"),
    ],
)
def test_captions_are_cleaned_as_blip_does(text, cleaned):
    assert clean_caption(text, max_words=5) == cleaned


def test_each_kept_caption_is_drawn_equally_often():
    texts = ("one", "two", "three")
    drawn = [draw_text(texts, float(draw(1, "text", n)[0]), CROP) for n in range(3000)]
    assert [drawn.count(text) for text in texts] == pytest.approx([1000] * 3, abs=120)


def test_a_caption_that_cleaning_empties_gives_way_to_the_next():
    assert draw_text(("...", "a dog"), 0.0, CROP) == "a dog"
    with pytest.raises(SampleError, match="nothing of its captions"):
        draw_text(("...", "!!"), 0.7, CROP)


def test_captions_stay_as_they_are_if_asked():
    assert draw_text(("A Dog.",), 0.5, LoaderConfig(are_texts_cleaned=False)) == "A Dog."
