import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sample import Caption, Origin, Sample, SampleError, canonical_json

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
CAPTIONS = st.builds(
    Caption,
    text=TEXTS,
    origin=st.sampled_from(Origin),
    index=st.integers(0, 50),
    seed=st.none() | st.integers(0, 2**64),
    scores=st.dictionaries(st.sampled_from(["itm", "itc", "clip"]), NUMBERS),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
SAMPLES = st.builds(
    Sample,
    key=st.just("000000001"),
    image=st.binary(max_size=200),
    extension=st.sampled_from(["jpg", "png", "webp"]),
    captions=st.lists(CAPTIONS, max_size=4).map(tuple),
    metadata=st.dictionaries(TEXTS.filter(lambda name: name != "captions"), JSON, max_size=4),
)


def a_sample(**fields):
    return Sample(**{"key": "000000001", "image": b"\xff\xd8", **fields})


@given(SAMPLES)
def test_writing_then_reading_is_the_identity(sample):
    assert Sample.from_members(sample.key, sample.to_members()) == sample


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "a\0b\r\n\x1f",
        "👩‍👩‍👧‍👦 🇺🇦",
        "كلب على العشب \u202e",
        "e\u0301",
        "\ufeff",
        "\U0010ffff",
        "é" * 500_000,
    ],
    ids=["nul", "controls", "emoji", "rtl", "combining", "bom", "last", "one_megabyte"],
)
def test_any_text_is_read_back_as_it_was(text):
    sample = a_sample(captions=(Caption(text=text, origin=Origin.WEB),))
    members = sample.to_members()
    assert members["txt"] == text.encode()
    assert Sample.from_members(sample.key, members) == sample


def test_half_a_surrogate_pair_drops_the_sample_when_written():
    for sample in (
        a_sample(captions=(Caption(text="a\ud800", origin=Origin.WEB),)),
        a_sample(metadata={"title": "\udfff"}),
    ):
        with pytest.raises(SampleError, match="000000001.*surrogate") as caught:
            sample.to_members()
        assert caught.value.reason == "bad_text"


def test_half_a_surrogate_pair_drops_the_sample_when_read():
    members = {"jpg": b"", "json": rb'{"captions":[{"text":"\ud800","origin":"web"}]}'}
    with pytest.raises(SampleError) as caught:
        Sample.from_members("k", members)
    assert caught.value.reason == "bad_metadata"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"])
def test_metadata_that_json_cannot_hold_drops_the_sample(value):
    with pytest.raises(SampleError) as caught:
        a_sample(metadata={"x": value}).to_members()
    assert caught.value.reason == "bad_metadata"


def test_metadata_may_not_hide_the_captions():
    with pytest.raises(ValueError, match="captions"):
        a_sample(metadata={"captions": []}).to_members()


def test_an_image_may_not_take_the_place_of_the_captions():
    with pytest.raises(ValueError, match="txt"):
        a_sample(extension="txt").to_members()


def test_json_is_the_same_whatever_order_fields_came_in():
    first = a_sample(metadata={"b": 1, "a": {"d": 1, "c": 2}})
    second = a_sample(metadata={"a": {"c": 2, "d": 1}, "b": 1})
    assert first.to_members() == second.to_members()
    assert canonical_json({"ü": 1, "a": None}) == '{"a":null,"ü":1}'


def test_the_text_file_of_another_webdataset_is_its_web_caption():
    members = {"jpg": b"x", "txt": b"a dog", "json": b'{"url":"http://a"}'}
    sample = Sample.from_members("k", members)
    assert sample.captions == (Caption(text="a dog", origin=Origin.WEB),)
    assert sample.metadata == {"url": "http://a"}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"json": b"{}"}, "no_single_image"),
        ({"jpg": b"", "png": b""}, "no_single_image"),
        ({"jpg": b"", "json": b"{"}, "bad_metadata"),
        ({"jpg": b"", "json": b"[]"}, "bad_metadata"),
        ({"jpg": b"", "json": b"\xff"}, "bad_metadata"),
        ({"jpg": b"", "json": b'{"a":NaN}'}, "bad_metadata"),
        ({"jpg": b"", "json": b"[" * 100_000}, "bad_metadata"),
        ({"jpg": b"", "txt": b"\xff"}, "bad_text"),
        ({"jpg": b"", "json": b'{"captions":{}}'}, "bad_metadata"),
        ({"jpg": b"", "json": b'{"captions":["a"]}'}, "bad_metadata"),
        ({"jpg": b"", "json": b'{"captions":[{"text":"a","origin":"dog"}]}'}, "bad_metadata"),
        ({"jpg": b"", "json": b'{"captions":[{"text":1,"origin":"web"}]}'}, "bad_metadata"),
        (
            {"jpg": b"", "json": b'{"captions":[{"text":"a","origin":"web","seed":"1"}]}'},
            "bad_metadata",
        ),
        (
            {"jpg": b"", "json": b'{"captions":[{"text":"a","origin":"web","scores":[1]}]}'},
            "bad_metadata",
        ),
    ],
)
def test_members_that_make_no_sample_drop_it_with_a_reason(members, reason):
    with pytest.raises(SampleError, match="sample k:") as caught:
        Sample.from_members("k", members)
    assert caught.value.reason == reason


@given(st.dictionaries(st.sampled_from(["jpg", "json", "txt", "png"]), st.binary(max_size=60)))
def test_any_bytes_are_a_sample_or_a_counted_drop(members):
    try:
        outcome = json.loads(Sample.from_members("k", members).to_members()["json"])
    except SampleError as error:
        outcome = error.reason
    assert isinstance(outcome, dict) or outcome in {"no_single_image", "bad_metadata", "bad_text"}
