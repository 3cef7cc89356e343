"""A recipe is read completely or refused with every problem, its place, and the nearest key."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.errors import RecipeError
from jobs.recipe import dump_recipe, load_recipe, recipe_schema

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
MINIMAL = """\
name: pets
root: out
sources:
  - name: cats
    format: cc3m
    paths: [cats.tsv]
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_minimal_recipe_has_the_papers_defaults(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.seed == 42
    assert recipe.download.rows_per_shard == 10_000
    assert recipe.sources[0].column_names == ("caption", "url")


def test_overrides_reach_into_sections_and_lists_and_the_last_one_wins(write):
    recipe = load_recipe(
        write(MINIMAL),
        [
            "download.min_side_px=100",
            "download.min_side_px=256",
            "sources.cats.max_caption_chars=99",
            "sources.0.paths=[a.tsv, b.tsv]",
            "fetch.retry.base_delay_seconds=1e-2",
            "seed=7",
        ],
    )
    assert recipe.download.min_side_px == 256
    assert recipe.sources[0].max_caption_chars == 99
    assert recipe.sources[0].paths == ("a.tsv", "b.tsv")
    assert recipe.fetch.retry.base_delay_seconds == 0.01
    assert recipe.seed == 7


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (
            "download:\n  min_side: 256\n",
            "r.yaml:8: download.min_side = 256: unknown key; did you mean 'min_side_px'?",
        ),
        (
            "min_side_px: 256\n",
            "r.yaml:7: min_side_px = 256: unknown key; did you mean 'download.min_side_px'?",
        ),
        ("download:\n  qqq: 1\n", "unknown key; valid here: encode_format, "),
        ("download:\n  min_side_px: big\n", "r.yaml:8: download.min_side_px = 'big': "),
        ("download:\n  rows_per_shard: 0\n", "r.yaml:8: download.rows_per_shard = 0: "),
        ("fetch:\n  timeout_seconds: .nan\n", "r.yaml:8: fetch.timeout_seconds = nan: "),
        ("fetch: 3\n", "r.yaml:7: fetch = 3: "),
        (
            "fetch:\n  retry:\n    max_attempt: 3\n",
            "r.yaml:9: fetch.retry.max_attempt = 3: unknown key; did you mean 'max_attempts'?",
        ),
        ("name: dogs\n", "r.yaml:7: name stands here twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_the_nearest_key(write, extra, complaint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(MINIMAL + extra))
    assert complaint in str(caught.value)


def test_every_problem_is_told_at_once(write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("name: UPPER\nsources: []\nsed: 1\n"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert any("root: missing" in line for line in lines)
    assert any("did you mean 'seed'?" in line for line in lines)


def test_two_sources_of_one_name_are_refused(write):
    twice = MINIMAL + "  - {name: cats, format: cc3m, paths: [more.tsv]}\n"
    with pytest.raises(RecipeError, match="the name 'cats' is used twice"):
        load_recipe(write(twice))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("a..b=3", "not of the form key=value"),
        ("seed.more=3", "seed is a value, not a section"),
        ("sources.dogs.paths=[x]", "no item 'dogs' in the list; there is: cats"),
        ("sources.7.paths=[x]", "no item '7' in the list"),
        ("seed=[1", "--set seed:1: not valid YAML"),
        ("sed=3", "--set sed: sed = 3: unknown key; did you mean 'seed'?"),
    ],
)
def test_a_wrong_override_is_named(write, override, complaint):
    path = write(MINIMAL + "seed: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert complaint in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"x" * 2_000_000], ids=len)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="r.yaml"):
        load_recipe(str(path))


def test_a_missing_file_is_refused():
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe("nowhere.yaml")


def test_recipes_are_frozen(write):
    recipe = load_recipe(write(MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def quoted(value):
    return yaml.safe_dump(value, default_style='"', width=1e6)


@given(
    seed=st.integers(0, 2**63 - 1),
    quality=st.integers(1, 100),
    seconds=st.floats(0.001, 60.0),
    agent=st.from_regex(r"[\x20-\x7e]{1,40}", fullmatch=True),
    paths=st.lists(st.text(min_size=1), min_size=1),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dumped_recipe_reads_back_equal(tmp_path, seed, quality, seconds, agent, paths):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    sets = [
        f"seed={seed}",
        f"download.encode_quality={quality}",
        f"fetch.timeout_seconds={seconds!r}",
        f"fetch.user_agent={quoted(agent)}",
        f"sources.cats.paths={quoted(paths)}",
    ]
    recipe = load_recipe(str(path), sets)
    assert (recipe.seed, recipe.fetch.user_agent) == (seed, agent)
    assert recipe.sources[0].paths == tuple(paths)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_pace_does_not_belong_to_a_recipes_content_and_policy_does(write):
    path = write(MINIMAL)
    content = load_recipe(path).content()
    pace = ["name=other", "root=elsewhere", "download.num_threads=3", "fetch.timeout_seconds=1"]
    pace += ["sources.cats.paths=[/mnt/moved/cats.tsv]"]
    assert load_recipe(path, pace).content() == content
    for policy in ["seed=1", "download.min_side_px=9", "fetch.max_body_bytes=1000"]:
        assert load_recipe(path, [policy]).content() != content


def test_the_schema_beside_the_recipes_is_the_models():
    stored = json.loads((RECIPES / "recipe.schema.json").read_text())
    assert stored == recipe_schema(), "out of date: run `make schema`"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_names_its_schema_and_command(path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert "#   capfilt " in text
    assert load_recipe(str(path)).name == path.stem
    assert yaml.safe_load(text)["name"] == path.stem


def test_a_dumped_recipe_has_sections_of_the_stages_that_it_had_and_of_no_others(write):
    recipe = load_recipe(write(MINIMAL + "training: {stage1: {preset: tiny}, med_data: clean}\n"))
    again = load_recipe(write(dump_recipe(recipe)))
    assert again == recipe
    stages = {"med", "captioner", "filter", "stage1", "stage2"}
    assert again.training.model_fields_set & stages == {"stage1"}
    rehearsal = load_recipe(write(dump_recipe(recipe)), is_rehearsal=True)
    assert rehearsal.training.model_fields_set & stages == {"stage1"}
    assert rehearsal.training.stage1.num_steps == 20
