"""Captions are transformers' captions, and functions of their image, seed, key and index alone."""

import blip_folders
import numpy as np
import pytest
import torch

from pipeline.captioner import Captioner, CaptionerConfig, Method
from pipeline.models import ModelError

PROMPT = "a picture of "
KEYS = [f"0000{number}" for number in range(19)]  # more than a group, and no multiple of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "captioner"
    blip_folders.save_captioner(path)
    return path


@pytest.fixture(scope="module")
def peer(folder):
    return blip_folders.save_captioner(folder)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 30 + n, 3), dtype=np.uint8) for n in range(len(KEYS))]


def make(folder, seed=7, **options):
    return Captioner.load(CaptionerConfig(name=str(folder), **options), seed=seed)


def caption(captioner, images, keys=KEYS):
    pixels = torch.stack([captioner.preprocess(image) for image in images])
    return captioner.caption(pixels, keys)


def texts(captions):
    return [[each.text for each in of_image] for of_image in captions]


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "greedy"}, {}),
        ({"method": "greedy", "repetition_penalty": 1.0}, {"repetition_penalty": 1.0}),
        ({"method": "beam"}, {"num_beams": 3}),
        ({"method": "beam", "num_beams": 5, "max_length": 9}, {"num_beams": 5, "max_length": 9}),
        ({"top_p": 1e-6}, {}),  # a nucleus of one token
    ],
)
def test_captions_equal_transformers(folder, peer, images, ours, theirs):
    captioner = make(folder, **ours)
    tokenizer = blip_folders.save_bert_tokenizer(folder)
    pixels = torch.stack([captioner.preprocess(image) for image in images])
    prompt = tokenizer([PROMPT] * len(images), return_tensors="pt")
    options = {"min_length": 5, "max_length": 20, "repetition_penalty": 1.1, "do_sample": False}
    ids = peer.generate(
        pixel_values=pixels,
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        **(options | theirs),
    )
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    expected = [[text[len(PROMPT) :].strip()] for text in decoded]
    assert texts(caption(captioner, images)) == expected
    assert len({text for (text,) in expected}) > 5


# --- what a caption depends on --------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(folder, images):
    return caption(make(folder, num_captions=3), images)


def test_captions_of_an_image_are_several_and_numbered(together):
    assert [[each.index for each in of_image] for of_image in together] == [[0, 1, 2]] * 19
    assert len({each.text for of_image in together for each in of_image}) > 40


def test_neighbours_batch_size_and_order_change_no_caption(folder, images, together):
    captioner = make(folder, num_captions=3)
    for start, stop in ((0, 1), (3, 4), (2, 9), (18, 19), (0, 17)):
        assert caption(captioner, images[start:stop], KEYS[start:stop]) == together[start:stop]
    assert caption(captioner, images[::-1], KEYS[::-1]) == together[::-1]


def test_the_first_of_several_captions_is_the_only_one_of_one(folder, images, together):
    alone = caption(make(folder), images)
    assert texts(alone) == [of_image[:1] for of_image in texts(together)]


def test_another_seed_or_key_is_another_caption(folder, images, together):
    other_seed = texts(caption(make(folder, seed=8, num_captions=3), images))
    other_keys = texts(caption(make(folder, num_captions=3), images, KEYS[::-1]))
    for other in (other_seed, other_keys):
        same = sum(a == b for a, b in zip(other, texts(together), strict=True))
        assert same <= 1  # the one in the middle keeps its key when they are turned round


def test_counts_are_of_the_captions_own_tokens(folder, images):
    captions = caption(make(folder, num_captions=3, max_length=9), images)
    tokenizer = blip_folders.save_bert_tokenizer(folder)
    for each in (each for of_image in captions for each in of_image):
        assert each.num_tokens <= 5
        if "[" not in each.text and "##" not in each.text:
            ids = tokenizer(each.text, add_special_tokens=False)["input_ids"]
            assert len(ids) <= each.num_tokens  # what is special is no text


def test_decoded_captions_have_no_prompt_and_no_special_token(together):
    for each in (each for of_image in together for each in of_image):
        assert not each.text.startswith("a picture of")
        assert "[" not in each.text
        assert each.text == each.text.strip()


def test_memory_that_runs_out_is_told_and_halves_the_groups(folder, images):
    captioner = make(folder)
    expected = caption(captioner, images)
    decoder = captioner._decoder._decoder
    calls = 0

    def step(token_ids, state):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder.step(token_ids, state)

    captioner._decoder._decoder = type(decoder)(step, decoder.reorder, decoder.keep)
    before = captioner.images_at_once
    with pytest.raises(torch.OutOfMemoryError):
        caption(captioner, images)
    assert captioner.images_at_once == before // 2
    assert caption(captioner, images) == expected


def test_bfloat16_makes_captions(folder, images):
    config = CaptionerConfig(name=str(folder), num_captions=2)
    captioner = Captioner.load(config, seed=0, dtype=torch.bfloat16)
    assert [len(of_image) for of_image in caption(captioner, images)] == [2] * 19


# --- configuration --------------------------------------------------------------------------------


def test_no_images_have_no_captions(folder):
    assert make(folder).caption(torch.empty(0, 3, 32, 32), []) == []


def test_images_without_keys_are_refused(folder):
    with pytest.raises(ValueError, match="2 images with 1 keys"):
        make(folder).caption(torch.zeros(2, 3, 32, 32), ["a"])


def test_a_prompt_of_unknown_words_is_refused(folder):
    with pytest.raises(ValueError, match="comes back from the tokenizer as"):
        make(folder, prompt="a photograph of ")


def test_a_prompt_that_leaves_no_room_is_refused(folder):
    with pytest.raises(ValueError, match="nothing can be generated"):
        make(folder, min_length=1, max_length=4)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0},
        {"num_captions": 0},
        {"method": "beam", "num_captions": 2},
        {"min_length": 21},
        {"no_such": 1},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=list(options)[-1].replace("no_such", "Extra")):
        CaptionerConfig(name="any", **options)


def test_content_is_what_decides_captions_and_nothing_else():
    content = CaptionerConfig(name="a").content()
    assert content == CaptionerConfig(name="b", revision="c", is_compiled=True).content()
    assert content == CaptionerConfig(name="a", num_beams=9).content()  # no beams are searched
    assert content != CaptionerConfig(name="a", top_p=0.8).content()
    beams = CaptionerConfig(name="a", method=Method.BEAM)
    assert beams.content() == CaptionerConfig(name="a", method="beam", top_p=0.5).content()


def test_a_model_that_is_nowhere_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ModelError, match="neither a folder nor a name"):
        make(tmp_path / "no where")
