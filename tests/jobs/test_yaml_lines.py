"""YAML is read safely and remembers its lines."""

import pytest

from jobs.errors import RecipeError
from jobs.yaml_lines import parse_yaml


def test_a_key_is_found_again_at_its_line():
    document = parse_yaml("name: x\ndownload:\n  min_side_px: 3\nlist:\n  - a: 1\n", "r.yaml")
    assert document.where(("download", "min_side_px")) == "r.yaml:3"
    assert document.where(("list", "0", "a")) == "r.yaml:5"


def test_a_key_that_is_not_there_is_placed_at_its_section():
    document = parse_yaml("name: x\ndownload:\n  min_side_px: 3\n", "r.yaml")
    assert document.where(("download", "resize_mode")) == "r.yaml:3"
    assert document.where(("elsewhere",)) == "r.yaml"


@pytest.mark.parametrize("text", ["1e-4", "1E5", "-2.5e+3", ".5e1", "1_000e2"])
def test_scientific_notation_is_a_number(text):
    value = parse_yaml(f"x: {text}", "r.yaml").data["x"]
    assert value == pytest.approx(float(text.replace("_", "")))


@pytest.mark.parametrize("text", ["e5", "1e", "1e-", "0x1e5z", "cc3m", "5e3m"])
def test_what_only_looks_like_a_number_stays_text(text):
    assert parse_yaml(f"x: {text}", "r.yaml").data["x"] == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\na: 2\n", r"r\.yaml:2: a stands here twice"),
        ("a:\n  b: 1\n  b: 2\n", r"r\.yaml:3: a\.b stands here twice"),
        ("a: [1, 2\n", r"r\.yaml:2: not valid YAML"),
        ("a: \x01\n", r"r\.yaml: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", r"r\.yaml:1: not valid YAML"),
        ("a: &x [*x]\n", r"r\.yaml:1: .*alias"),
        ('a:\n  "\\ud800"\n', r"r\.yaml:2: not valid Unicode"),
        ("- a\n- b\n", r"r\.yaml: a recipe is a list of"),
        ("", r"r\.yaml: a recipe is a list of"),
        ("a: 2020-99-99\n", r"r\.yaml: not valid YAML"),
        ("? [a, b]\n: 1\n", r"r\.yaml:1: "),
    ],
)
def test_bad_yaml_is_one_clear_error(text, complaint):
    with pytest.raises(RecipeError, match=complaint):
        parse_yaml(text, "r.yaml")


def test_a_bomb_of_aliases_is_refused_in_no_time():
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(RecipeError, match="alias"):
        parse_yaml("\n".join(lines), "r.yaml")


def test_a_deeply_nested_document_is_refused():
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        parse_yaml("a: " + "[" * 5000 + "]" * 5000, "r.yaml")
