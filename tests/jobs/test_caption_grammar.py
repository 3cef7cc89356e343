"""The grammar and its parser: what is generated is right, what is wrong is caught."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.demo.caption_check import check_caption, check_claims, parse_caption
from jobs.demo.captions import (
    LEAD_INS,
    Claims,
    Mention,
    choose_claims,
    full_caption,
    phrase,
    terse_caption,
    words,
)
from jobs.demo.noise import GENERIC_TEXTS, Noise, NoiseConfig, spoil, vocabulary, web_caption
from jobs.demo.scenes import OPPOSITE, Scene, SceneConfig, SceneObject, sample_scene

scenes = st.builds(
    sample_scene,
    st.integers(0, 1000),
    st.integers(0, 1_000_000),
    st.builds(SceneConfig, max_objects=st.integers(1, 3)),
)
generators = st.builds(np.random.default_rng, st.integers(0, 2**32))

RED_CIRCLE = SceneObject("circle", "red", "striped", "small", 0.25, 0.5, 0.13, 0.0)
BLUE_STAR = SceneObject("star", "blue", "solid", "big", 0.7, 0.5, 0.22, 0.0)
SCENE = Scene((RED_CIRCLE, BLUE_STAR), "navy")


@settings(max_examples=300, deadline=None)
@given(scenes, generators)
def test_every_full_caption_is_exact(scene, rng):
    caption = full_caption(scene, rng)
    check = check_caption(caption, scene)
    assert check.is_exact, caption
    assert check.is_consistent
    assert check.attribute_share == 1


@settings(max_examples=200, deadline=None)
@given(scenes, generators)
def test_every_terse_caption_is_consistent_and_names_one_object(scene, rng):
    caption = terse_caption(scene, rng)
    assert check_caption(caption, scene).is_consistent, caption
    assert len(parse_caption(caption).mentions) == 1


@settings(max_examples=200, deadline=None)
@given(scenes, generators)
def test_what_is_said_can_be_read_back(scene, rng):
    claims = choose_claims(scene, rng)
    first, *others = claims.mentions
    turned = claims
    if claims.relation:
        mentions = (others[0], first, *others[1:])
        turned = Claims(mentions, OPPOSITE[claims.relation], claims.background)
    assert parse_caption(phrase(claims, rng)) in (claims, turned)


@settings(max_examples=300, deadline=None)
@given(scenes, generators)
def test_a_wrong_attribute_is_caught(scene, rng):
    claims = choose_claims(scene, rng)
    caption = phrase(spoil(claims, scene, rng), rng)
    check = check_caption(caption, scene)
    assert not check.is_consistent, caption
    assert not check.is_exact
    assert check.num_stated - 2 <= check.num_right < check.num_stated


def test_both_orders_of_a_relation_and_all_lead_ins_are_used():
    rng = np.random.default_rng(0)
    said = [full_caption(SCENE, rng) for _ in range(300)]
    parsed = Counter((parse_caption(text).relation) for text in said)
    assert set(parsed) == {"left", "right"}
    assert min(parsed.values()) > 100
    assert all(any(text.startswith(lead_in) for text in said) for lead_in in LEAD_INS)
    assert len(set(said)) > 200


@pytest.mark.parametrize("caption", GENERIC_TEXTS)
def test_generic_text_is_consistent_with_nothing(caption):
    check = check_caption(caption, SCENE)
    assert not check.is_consistent
    assert check.attribute_share == 0


@pytest.mark.parametrize(
    ("caption", "num_right", "num_stated", "is_exact", "is_consistent"),
    [
        ("a red circle to the left of a blue star", 5, 5, True, True),
        ("A Crimson disc left of an azure star on a midnight background", 6, 6, True, True),
        ("a blue star and a red circle", 4, 4, True, True),
        ("a blue star right of a small banded scarlet circle", 7, 7, True, True),
        ("a circle left of a star", 3, 3, False, True),  # no colours: not exact
        ("red circle icon", 2, 2, False, True),
        ("a blue circle to the left of a red star", 3, 5, False, False),
        ("a red circle above a blue star", 4, 5, False, False),
        ("a red circle left of a blue star on a white background", 5, 6, False, False),
        ("a red circle and a red circle", 2, 4, False, False),  # there is one only
        ("a red circle and a blue star and a green plus", 4, 6, False, False),
        ("a red circle on the table", 2, 2, False, False),  # words of another language
        ("a red circle left of a blue", 2, 3, False, False),  # cut short
        ("a red blue star", 2, 2, False, False),  # two colours
        ("red circle blue star left of", 5, 5, False, False),  # a relation out of place
        ("", 0, 0, False, False),
    ],
)
def test_captions_are_judged_by_what_they_state(
    caption, num_right, num_stated, is_exact, is_consistent
):
    check = check_caption(caption, SCENE)
    assert (check.num_right, check.num_stated) == (num_right, num_stated)
    assert (check.is_exact, check.is_consistent) == (is_exact, is_consistent)


def test_a_text_of_very_many_objects_is_judged_in_bounded_time():
    check = check_caption("a red circle and " * 5000, SCENE)
    assert not check.is_consistent
    assert check.num_stated == 10_000


def test_mentions_are_matched_with_the_objects_that_suit_them_best():
    claims = Claims((Mention("star", "blue"), Mention("circle", "red")), relation="right")
    assert check_claims(claims, SCENE).is_exact


def test_captions_have_the_length_and_the_words_of_the_published_figures():
    rng = np.random.default_rng(0)
    said = [full_caption(sample_scene(0, index), rng) for index in range(2000)]
    with_end_mark = [len(words(text)) + 1 for text in said]
    assert 11.0 < np.mean(with_end_mark) < 12.5
    assert 100 <= len(vocabulary()) <= 110


@settings(max_examples=100, deadline=None)
@given(scenes, scenes, generators)
def test_the_vocabulary_covers_every_caption(scene, other, rng):
    text = web_caption(scene, other, rng, NoiseConfig()).text
    assert set(words(text)) <= set(vocabulary())


def test_noise_comes_at_its_configured_rates():
    num_rows = 6000
    rng = np.random.default_rng(1)
    worlds = [sample_scene(1, index) for index in range(num_rows)]
    said = [
        web_caption(scene, worlds[(row + 997) % num_rows], rng, NoiseConfig())
        for row, scene in enumerate(worlds)
    ]
    counts = Counter(each.noise for each in said)
    for noise, share in (
        (Noise.SWAPPED, 0.20),
        (Noise.GENERIC, 0.12),
        (Noise.WRONG, 0.13),
        (Noise.TERSE, 0.55 * 0.30),
        (Noise.FULL, 0.55 * 0.70),
    ):
        deviation = np.sqrt(num_rows * share * (1 - share))
        assert abs(counts[noise] - num_rows * share) < 4 * deviation, noise
    # A swapped caption may fit by chance, which is why truth is measured and not assumed.
    is_right = [
        check_caption(each.text, scene).is_consistent
        for each, scene in zip(said, worlds, strict=True)
    ]
    assert 0.42 < 1 - np.mean(is_right) < 0.475  # 4 standard deviations around 0.448
    for each, right in zip(said, is_right, strict=True):
        assert each.noise is Noise.SWAPPED or right == (each.noise in (Noise.FULL, Noise.TERSE))


def test_shares_of_noise_above_one_are_refused():
    with pytest.raises(ValidationError, match="more than 1"):
        NoiseConfig(swapped=0.6, generic=0.6)
