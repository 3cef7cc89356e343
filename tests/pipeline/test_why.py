"""A sample's story has all that happened to it, at any age of the corpus, fit for a terminal."""

import json

import pytest
from select_corpora import (
    commit,
    commit_captions,
    commit_raw,
    human,
    lost,
    raw_row,
    synthetic,
    web,
)

from pipeline.corpus import Corpus
from pipeline.download import key_of
from pipeline.select import Selector
from pipeline.selection.config import SelectConfig
from pipeline.why import KeyNotFoundError, tell
from pipeline.why_find import _indexes_of, find

IMAGES = [
    (
        raw_row("000420000", extra={"LICENSE": "cc0"}, final_url="http://elsewhere/a.jpg"),
        [
            web("write to a@b.de", itm=0.3, itc=0.25, clip=0.21),
            synthetic("a dog on a beach", 0, itm=0.93, itc=0.4, clip=0.31),
            synthetic("a cat", 1, itm=0.61, itc=0.3, clip=0.2),
        ],
    ),
    (raw_row("000420001", verdict="failed", reason="not_found",
             error_message="not_found: HTTP 404 of host"), []),
    (raw_row("000420002"), [lost()]),
    (raw_row("000420003"), [web("nothing of the kind", itm=0.02)]),
    (raw_row("000420004"), [human("a person wrote this")]),
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    return Corpus(str(tmp_path / "corpus"))


def text_of(corpus, key, source=None):
    return "\n".join(tell(corpus, key, source).lines())


def build(corpus, num_stages=3, **place):
    place = {"index": 42, **place}
    raw = commit_raw(corpus, [row for row, _ in IMAGES], **place)
    if num_stages > 1:
        scored = commit_captions(corpus, raw, IMAGES)
    if num_stages > 2:
        Selector(corpus, SelectConfig()).select(raw, scored)


def test_the_whole_story_of_a_kept_sample(corpus):
    build(corpus)
    lines = list(tell(corpus, "000420000").lines())
    text = "\n".join(lines)
    for part in (
        "sample 000420000 of source web",
        "http://host/000420000.jpg",
        "http://elsewhere/a.jpg",
        "kept, HTTP 200, 2 attempts",
        "4,321 bytes, sha256 " + IMAGES[0][0]["sha256"],
        "256 x 192 pixels, of 800 x 600",
        '{"LICENSE": "cc0"}',
        "kept; 2 of 3 captions kept",
        "policy blip",
        "itm_threshold 0.5",
        "image at bytes 512 to",
        "raw/web/00042: made by " + "r" * 16,
        f"captioner {'c' * 16}, filter {'f' * 16}, clip_model {'d' * 16}",
        "clean/web/00042: made by " + Selector(corpus, SelectConfig()).fingerprint,
    ):
        assert part in text
    captions = lines[lines.index("captions") + 1 :][:6]
    assert [" ".join(line.split()) for line in captions] == [
        "synthetic 0 itm 0.930 itc 0.400 clip 0.310 kept (seed 3, 7 tokens)",
        "a dog on a beach",
        "synthetic 1 itm 0.610 itc 0.300 clip 0.200 kept (seed 3, 7 tokens)",
        "a cat",
        "web 0 itm 0.300 itc 0.250 clip 0.210 dropped: itm_below_threshold (masked email)",
        "write to <EMAIL>",
    ]


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("000420001", ["failed: not_found, HTTP 404, 2 attempts, HTTP 404 of host"]),
        ("000420002", ["kept, HTTP 200", "verdict     failed: bad_image; 0 of 0 captions kept"]),
        ("000420003", ["dropped: itm_below_threshold", "nothing of the kind"]),
        ("000420004", ["human 0", "a person wrote this", "1 of 1 captions kept"]),
    ],
)
def test_what_was_not_kept_is_told_with_its_reason(corpus, key, parts):
    build(corpus)
    text = text_of(corpus, key)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("num_stages", "key", "part"),
    [
        (1, "000420000", "not scored yet"),
        (1, "000420001", "failed: not_found; it goes no further"),
        (2, "000420000", "not selected yet"),
        (2, "000420002", "not selected yet; failed: bad_image"),
    ],
)
def test_a_corpus_that_is_not_done_tells_what_it_has(corpus, num_stages, key, part):
    build(corpus, num_stages)
    text = text_of(corpus, key)
    assert part in text
    assert "clean/" not in text
    json.dumps(tell(corpus, key).to_json())


def test_json_has_every_column(corpus):
    build(corpus)
    story = json.loads(json.dumps(tell(corpus, "000420000").to_json()))
    (sample,) = story["samples"]
    assert story["key"] == sample["key"] == "000420000"
    assert sample["raw"]["attempts"] == 2
    assert [row["text"] for row in sample["captions"]] == [c["text"] for c in IMAGES[0][1]]
    assert sample["clean"]["num_kept"] == 2
    assert [shard["name"].split("/")[0] for shard in sample["shards"]] == [
        "raw",
        "captions",
        "clean",
    ]
    assert not any(shard["is_stale"] or shard["problem"] for shard in sample["shards"])


def test_nothing_of_the_web_can_act_on_a_terminal(corpus):
    hostile = "\x1b[2J\x07\r\n\u202eevil\u2028\x9b31m\x00 <script>"
    row = raw_row("000000000", extra={"alt": hostile})
    row |= {"url": f"http://host/{hostile}", "error_message": hostile, "final_url": hostile}
    raw, scored = commit(corpus, [(row, [web(hostile, itm=0.9), synthetic("x" * 9999, itm=0.1)])])
    Selector(corpus, SelectConfig()).select(raw, scored)
    lines = list(tell(corpus, "000000000").lines())
    assert all(line.isprintable() for line in lines)
    escaped = "\\x1b[2J\\x07\\r\\n\\u202eevil\\u2028\\x9b31m\\x00 <script>"
    assert sum(escaped in line for line in lines) == 4  # URLs, the fetch's message, the caption
    assert max(map(len, lines)) < 1000
    assert any("(9,999 characters)" in line for line in lines)


def test_a_key_in_several_sources_is_told_of_each(corpus):
    build(corpus, 1, source="first")
    build(corpus, 1, source="second")
    story = tell(corpus, "000420000")
    assert [sample.source for sample in story.samples] == ["first", "second"]
    assert list(story.lines())[-1].endswith("first, second; name one to see it alone")
    assert [sample.source for sample in tell(corpus, "000420000", "second").samples] == ["second"]


def test_an_unknown_key_is_told_which_keys_there_are(corpus):
    build(corpus, 1)
    message = (
        r"no row with key '000420009': web has keys 000420000 to 000420004 in 1 raw shards, "
        r"42 to 42"
    )
    with pytest.raises(KeyNotFoundError, match=message):
        tell(corpus, "000420009")
    for key in ("", "nope", "\x1b[2J", "9" * 50, "٠٠٠٤٢٠٠٠٠", "00042", "-0042000"):
        with pytest.raises(KeyNotFoundError) as caught:
            tell(corpus, key)
        assert str(caught.value).isprintable()


def test_an_unknown_source_and_an_empty_corpus_are_named(corpus):
    with pytest.raises(KeyNotFoundError, match="has no shards"):
        tell(corpus, "000420000")
    build(corpus, 1)
    with pytest.raises(KeyNotFoundError, match="no source 'wbe'; there is: web"):
        tell(corpus, "000420000", "wbe")


@pytest.mark.parametrize("rows_per_shard", [1, 10, 11, 1000, 10_000, 1_000_000])
@pytest.mark.parametrize("index", [0, 7, 42, 99_999, 100_000, 1_234_567])
def test_a_key_leads_to_its_shard(index, rows_per_shard):
    for number in (0, rows_per_shard - 1):
        assert index in _indexes_of(key_of(index, number, rows_per_shard))


def test_only_the_shard_of_the_key_is_opened(corpus):
    for index in range(3):
        rows = [raw_row(key_of(index, number, 10_000)) for number in range(3)]
        commit_raw(corpus, rows, index=index)
    opened = []
    real = corpus.store.open
    corpus.store.open = lambda path: opened.append(path) or real(path)
    assert find(corpus, key_of(1, 2, 10_000), "web")["raw"].record.index == 1
    assert {path for path in opened if ".parquet" in path and "00001" not in path} == set()


def test_a_key_of_another_numbering_is_found_by_looking(corpus):
    for index, name in enumerate(("apple", "pear")):
        commit_raw(corpus, [raw_row(f"{name}_{n}") for n in range(3)], index=index)
    assert "raw/web/00001" in text_of(corpus, "pear_2")


def test_what_is_stale_or_damaged_is_said_to_be(corpus):
    build(corpus)
    raw = corpus.record("raw", "web", 42)
    commit_raw(corpus, [row for row, _ in IMAGES[:4]], index=42, replace=raw)
    text = text_of(corpus, "000420000")
    assert "STALE: raw/web/00042 was replaced after it was made; run again" in text
    path = corpus.local_path(corpus.record("captions", "web", 42), "parquet")
    with open(path, "r+b") as stream:
        stream.write(b"no parquet")
        stream.seek(-10, 2)
        stream.write(b"no parquet")
    text = text_of(corpus, "000420000")
    assert "captions/web/00042: made by" in text
    assert "CANNOT BE READ" in text
    assert "a dog on a beach" in text
