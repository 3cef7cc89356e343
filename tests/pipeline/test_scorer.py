"""Scores are transformers' scores, and functions of an image and its texts alone."""

import blip_folders
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipeline.scorer import DECIMALS, Scorer, ScorerConfig, Scores, cleaned

EXACT = 0.5 * 10**-DECIMALS + 1e-6  # what rounding to so many decimals may take, and float32
TEXTS = [
    ["a cat on the tree", "two red box", "a"],
    ["a big dog"],
    [],
    ["the car", "the car", "a picture of a small blue car on the tree", "w3 w4 w5 w6 w7 w8 w9"],
    ["w1 " * 60, "dog"],
    ["cat " * n for n in range(1, 30)],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return root / "filter", root / "clip"


@pytest.fixture(scope="module")
def peers(folders):
    return blip_folders.save_filter(folders[0]), blip_folders.save_clip(folders[1])


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 30 + n, 3), dtype=np.uint8) for n in range(len(TEXTS))]


@pytest.fixture(scope="module")
def load(folders, peers):
    def load(dtype=torch.float32, **options):
        named = {"filter": {"name": str(folders[0])}, "clip": {"name": str(folders[1])}}
        return Scorer.load(ScorerConfig(**(named | options)), dtype=dtype)

    return load


@pytest.fixture(scope="module")
def scorer(load):
    return load()


def score(scorer, images, texts=TEXTS):
    return scorer.score([scorer.preprocess(image) for image in images], texts)


@pytest.fixture(scope="module")
def scored(scorer, images):
    return score(scorer, images)


# --- transformers ---------------------------------------------------------------------------------


def test_itm_and_itc_equal_transformers(load, folders, peers, images):
    scorer = load(keeps_cls=True, clip=None)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    found = score(scorer, images)
    for image, texts, scores in zip(images, TEXTS, found, strict=True):
        pixels = scorer.preprocess(image).filter[None]
        for text, own in zip(texts, scores, strict=True):
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=35)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                logits = peers[0](pixel_values=pixels, **inputs).itm_score
                cosine = peers[0](pixel_values=pixels, **inputs, use_itm_head=False).itm_score
            assert own.itm == pytest.approx(logits.softmax(dim=1)[0, 1].item(), abs=EXACT)
            assert own.itc == pytest.approx(cosine.item(), abs=EXACT)


def test_d23_enc_takes_the_place_of_cls_unless_it_is_kept(folders, peers, images, scored):
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    inputs = tokenizer(TEXTS[1], return_tensors="pt")
    inputs["input_ids"][:, 0] = tokenizer.convert_tokens_to_ids("[ENC]")
    preprocess = ScorerPixels(images[1])
    with torch.no_grad():
        logits = peers[0](pixel_values=preprocess.filter, input_ids=inputs["input_ids"]).itm_score
    assert scored[1][0].itm == pytest.approx(logits.softmax(dim=1)[0, 1].item(), abs=EXACT)


class ScorerPixels:
    """An image as transformers' processor makes it."""

    def __init__(self, image):
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
        self.filter = processor(image, return_tensors="pt")["pixel_values"]


def test_clip_similarities_equal_transformers(scored, scorer, folders, peers, images):
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    for image, texts, scores in zip(images, TEXTS, scored, strict=True):
        if not texts:
            continue
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=40)
        with torch.no_grad():
            output = peers[1](pixel_values=scorer.preprocess(image).clip[None], **inputs)
        expected = (output.text_embeds @ output.image_embeds[0]).tolist()
        assert [own.clip for own in scores] == pytest.approx(expected, abs=EXACT)


# --- what a score depends on ----------------------------------------------------------------------


def test_each_text_has_its_scores_and_scores_tell_texts_and_images_apart(scored):
    assert [len(scores) for scores in scored] == [len(texts) for texts in TEXTS]
    assert len({own.itm for scores in scored for own in scores}) > 30
    assert all(0 <= own.itm <= 1 for scores in scored for own in scores)
    assert all(-1 <= own.clip <= 1 for scores in scored for own in scores)
    assert all(-1 <= own.itc <= 1 for scores in scored for own in scores)
    assert scored[3][0] == scored[3][1]  # the same text


def test_neighbours_batch_size_and_order_change_no_score(scorer, images, scored):
    for start, stop in ((0, 1), (1, 2), (3, 6), (2, 3)):
        assert score(scorer, images[start:stop], TEXTS[start:stop]) == scored[start:stop]
    assert score(scorer, images[::-1], TEXTS[::-1]) == scored[::-1]


def test_other_texts_of_an_image_change_a_score_by_rounding_at_most(scorer, images, scored):
    for image, texts, scores in zip(images, TEXTS, scored, strict=True):
        for text, own in zip(texts, scores, strict=True):
            ((alone,),) = score(scorer, [image], [[text]])
            for name in ("itm", "itc", "clip"):
                assert getattr(alone, name) == pytest.approx(getattr(own, name), abs=2 * EXACT)


def test_each_image_goes_through_each_encoder_once(load, images):
    scorer = load()
    seen = {"filter": 0, "clip": 0}
    towers = {
        "filter": scorer._filter._model.image_encoder,
        "clip": scorer._clip._model.vision_model,
    }
    handles = [
        tower.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update(
                {name: seen[name] + len(args[0] if args else kwargs["pixel_values"])}
            ),
            with_kwargs=True,
        )
        for name, tower in towers.items()
    ]
    score(scorer, images)
    for handle in handles:
        handle.remove()
    with_texts = sum(bool(texts) for texts in TEXTS)
    assert seen == {"filter": with_texts, "clip": with_texts}


def test_weights_that_are_no_numbers_score_nan(load, images):
    scorer = load()
    with torch.no_grad():
        scorer._filter._model.itm_head.bias.fill_(torch.nan)
    (own,) = score(scorer, images[1:2], TEXTS[1:2])[0]
    assert own.itm != own.itm
    assert own.itc == own.itc
    assert own.clip == own.clip


def test_bfloat16_scores_are_near(load, images, scored):
    for half, full in zip(score(load(torch.bfloat16), images), scored, strict=True):
        for low, high in zip(half, full, strict=True):
            assert low.itm == pytest.approx(high.itm, abs=0.1)
            assert low.clip == pytest.approx(high.clip, abs=0.1)


# --- configuration --------------------------------------------------------------------------------


def test_models_that_are_left_out_score_nothing(load, images):
    itm_only = score(load(clip=None, has_itc=False), images[1:2], TEXTS[1:2])[0][0]
    clip_only = score(load(filter=None), images[1:2], TEXTS[1:2])[0][0]
    assert (itm_only.itc, itm_only.clip) == (None, None)
    assert itm_only.itm is not None
    assert clip_only == Scores(clip=clip_only.clip)
    assert load(clip=None).fingerprints.keys() == {"filter"}
    assert load().fingerprints.keys() == {"filter", "clip"}


def test_without_any_model_there_is_nothing_to_score_by():
    with pytest.raises(ValueError, match="nothing to score by"):
        ScorerConfig(filter=None, clip=None)


def test_the_filter_reads_texts_as_blip_cleaned_them(scorer, load, images):
    loud, quiet = ["A CAT! (on the:tree)"], ["a cat on the tree"]
    assert score(scorer, images[:1], [loud])[0][0].itm == scored_one(scorer, images, quiet).itm
    as_is = load(is_text_cleaned=False)
    assert scored_one(as_is, images, loud).itm != scored_one(as_is, images, quiet).itm


def scored_one(scorer, images, texts):
    return score(scorer, images[:1], [texts])[0][0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('A "big" DOG...  on#the*tree~\n', "a big dog on the tree"),
        ("it's well-known, isn't it? 1/2", "it's well-known, isn't it? 1/2"),
        ("!!!", ""),
    ],
)
def test_cleaning_is_blips(text, expected):
    assert cleaned(text) == expected


def test_content_is_what_decides_scores_and_nothing_else():
    content = ScorerConfig(clip={"name": "a"}).content()
    assert content == ScorerConfig(clip={"name": "b"}).content()
    assert content != ScorerConfig(clip=None).content()
    assert content != ScorerConfig(keeps_cls=True).content()
    clip_only = ScorerConfig(filter=None)
    assert clip_only.content() == ScorerConfig(filter=None, keeps_cls=True).content()


def test_images_and_texts_of_different_number_are_refused(scorer, images):
    with pytest.raises(ValueError, match="6 images with texts for 1"):
        score(scorer, images, TEXTS[:1])
