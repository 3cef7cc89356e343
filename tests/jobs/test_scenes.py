"""Scenes: what they hold, that relations are clear, and that pictures show them."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.demo.drawing import COLOUR_RGB, draw_scene
from jobs.demo.scenes import (
    OPPOSITE,
    Scene,
    SceneConfig,
    SceneObject,
    sample_scene,
    scene_from_json,
)

seeds = st.integers(0, 2**32)
indices = st.integers(0, 10_000_000)
configs = st.builds(SceneConfig, max_objects=st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(seeds, indices, configs)
def test_a_scene_is_a_function_of_seed_and_index(seed, index, config):
    assert sample_scene(seed, index, config) == sample_scene(seed, index, config)
    assert scene_from_json(sample_scene(seed, index, config).to_json()) == sample_scene(
        seed, index, config
    )


def test_other_indices_and_other_seeds_give_other_scenes():
    scenes = [sample_scene(seed, index) for seed in range(20) for index in range(20)]
    assert len(set(scenes)) == len(scenes)


@settings(max_examples=200, deadline=None)
@given(seeds, indices, configs)
def test_objects_are_apart_inside_the_frame_and_told_apart_by_name(seed, index, config):
    objects = sample_scene(seed, index, config).objects
    assert 1 <= len(objects) <= config.max_objects
    assert len({(each.colour, each.shape) for each in objects}) == len(objects)
    for each in objects:
        assert each.radius < each.x < 1 - each.radius
        assert each.radius < each.y < 1 - each.radius
    for here, there in combinations(objects, 2):
        assert np.hypot(here.x - there.x, here.y - there.y) > here.radius + there.radius


@settings(max_examples=100, deadline=None)
@given(seeds, indices)
def test_each_pair_has_a_clear_relation_and_its_opposite_the_other_way_round(seed, index):
    scene = sample_scene(seed, index, SceneConfig(max_objects=3))
    for first, second in combinations(range(len(scene.objects)), 2):
        relation = scene.relation(first, second)
        assert scene.relation(second, first) == OPPOSITE[relation]
        here, there = scene.objects[first], scene.objects[second]
        assert {
            "left": here.x < there.x,
            "right": here.x > there.x,
            "above": here.y < there.y,
            "below": here.y > there.y,
        }[relation]


def test_a_diagonal_pair_has_no_relation():
    near, far = (
        SceneObject("circle", colour, "solid", "small", at, at, 0.1, 0.0)
        for colour, at in (("red", 0.3), ("blue", 0.7))
    )
    assert Scene((near, far), "white").relation(0, 1) is None


def test_the_share_of_lone_objects_is_the_configured_one():
    config = SceneConfig(max_objects=3, lone_share=0.35)
    counts = [len(sample_scene(0, index, config).objects) for index in range(1000)]
    assert counts.count(1) == pytest.approx(350, abs=60)  # 4 standard deviations
    assert counts.count(2) == pytest.approx(325, abs=60)
    assert counts.count(3) == pytest.approx(325, abs=60)


def test_a_config_of_more_objects_than_fit_is_refused():
    with pytest.raises(ValidationError, match="max_objects"):
        SceneConfig(max_objects=4)


@pytest.mark.parametrize(("width", "height"), [(48, 48), (16, 16), (512, 288), (64, 96), (400, 66)])
def test_a_picture_has_the_size_asked_for(width, height):
    picture = draw_scene(sample_scene(0, 0), width=width, height=height)
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8


def test_a_solid_object_shows_its_colour_where_the_scene_says_it_is():
    for index in range(300):
        scene = sample_scene(3, index)
        picture = draw_scene(scene, width=96, height=96).astype(int)
        for each in scene.objects:
            if each.texture == "solid":
                shown = picture[int(each.y * 96), int(each.x * 96)]
                nearest = min(COLOUR_RGB, key=lambda name: np.abs(shown - COLOUR_RGB[name]).sum())
                assert nearest == each.colour


def test_each_texture_shows_its_share_of_white():
    def white_share(texture):
        each = SceneObject("square", "blue", texture, "big", 0.5, 0.5, 0.22, 0.0)
        picture = draw_scene(Scene((each,), "navy"), width=96, height=96)
        inside = picture[36:60, 36:60].astype(int)  # within the square, clear of its rim
        return np.mean(inside.min(axis=2) > 150)

    assert white_share("solid") == 0
    assert 0.25 < white_share("striped") < 0.55
    assert 0.15 < white_share("dotted") < 0.45


def test_a_wider_picture_adds_background_and_leaves_the_square_as_it_is():
    for index in range(50):
        scene = sample_scene(5, index)
        square = draw_scene(scene, width=96, height=96)
        wide = draw_scene(scene, width=160, height=96)
        # Shadows may be cut at the square's edge, and blur is counted in whole pixels.
        difference = np.abs(wide[:, 32:128].astype(int) - square)
        assert difference[:, 8:-8].max() <= 3
