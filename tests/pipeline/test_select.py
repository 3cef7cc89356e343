"""Policies decide as the papers do, every row ends somewhere, and the clean shard can be read."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from select_corpora import (
    SOURCE,
    commit,
    commit_captions,
    commit_raw,
    human,
    image_of,
    kept_of,
    ledger_of,
    lost,
    raw_row,
    reasons_of,
    samples_of,
    synthetic,
    web,
)

from pipeline.corpus import Corpus
from pipeline.sample import Sample, ShardError
from pipeline.select import MissingScoresError, OtherPolicyError, Selector
from pipeline.selection.clean import CLEAN_SCHEMA
from pipeline.selection.config import SelectConfig
from pipeline.verify import verify

KEY = "000000000"


@pytest.fixture
def corpus(tmp_path):
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.write_run("a: run\n")
    return corpus


def select(corpus, images, rows_per_block=1000, **config):
    raw, scored = commit(corpus, images)
    selector = Selector(corpus, SelectConfig(**config), rows_per_block=rows_per_block)
    return selector.select(raw, scored)


def decide(corpus, captions, **config):
    """Return the kept texts in order, the others with their reasons, and the row's verdict."""
    done = select(corpus, [(raw_row(KEY), captions)], **config)
    (row,) = ledger_of(corpus, done.record)
    return kept_of(row), reasons_of(row), (row["verdict"], row["reason"])


ITM = "itm_below_threshold"
KEPT = ("kept", "")


@pytest.mark.parametrize(
    ("captions", "kept", "dropped", "verdict"),
    [
        ([web("w", itm=0.9), synthetic("s", itm=0.8)], ["w", "s"], {}, KEPT),
        ([web("w", itm=0.7), synthetic("s", itm=0.8)], ["s", "w"], {}, KEPT),
        ([web("w", itm=0.9), synthetic("s", itm=0.4)], ["w"], {"s": ITM}, KEPT),
        ([web("w", itm=0.1), synthetic("s", itm=0.6)], ["s"], {"w": ITM}, KEPT),
        ([web("w", itm=0.1), synthetic("s", itm=0.2)], [], {"w": ITM, "s": ITM}, ("dropped", ITM)),
        # At the threshold is in; the next float32 below it is out.
        ([web("w", itm=0.5), synthetic("s", itm=0.49999997)], ["w"], {"s": ITM}, KEPT),
        # Equals: the web's words come first, then the lower index.
        (
            [web("w", itm=0.8), synthetic("s0", 0, itm=0.8), synthetic("s1", 1, itm=0.8)],
            ["w", "s0", "s1"],
            {},
            KEPT,
        ),
        # Each on its own: two equal texts are two texts.
        ([web("t", itm=0.6), synthetic("t", itm=0.6)], ["t", "t"], {}, KEPT),
        ([synthetic("s", itm=0.6)], ["s"], {}, KEPT),
        ([human("h1", 0, itm=0.0), human("h0", 1, itm=0.9)], ["h1", "h0"], {}, KEPT),
        ([human("h", itm=0.1), synthetic("s", itm=0.9)], ["h", "s"], {}, KEPT),
        (
            [web("", verdict="dropped", reason="empty_caption"), synthetic("s", itm=0.9)],
            ["s"],
            {"": "empty_caption"},
            KEPT,
        ),
        (
            [web("", verdict="dropped", reason="empty_caption"), synthetic("s", itm=0.1)],
            [],
            {"": "empty_caption", "s": ITM},
            ("dropped", ITM),
        ),
        (
            [web("", verdict="dropped", reason="empty_caption")],
            [],
            {"": "empty_caption"},
            ("dropped", "empty_caption"),
        ),
        ([lost("failed", "bad_image")], [], {}, ("failed", "bad_image")),
        ([lost("dropped", "no_caption")], [], {}, ("dropped", "no_caption")),
    ],
)
def test_blip_keeps_each_caption_by_its_own_itm(corpus, captions, kept, dropped, verdict):
    assert decide(corpus, captions, policy="blip") == (kept, dropped, verdict)


BELOW = "below_top_k"


@pytest.mark.parametrize(
    ("captions", "top_k", "kept", "dropped"),
    [
        (
            [web("w", clip=0.2)] + [synthetic(f"s{i}", i, clip=0.30 + i / 100) for i in range(10)],
            2,
            ["s9", "s8"],
            {"w": BELOW} | {f"s{i}": BELOW for i in range(8)},
        ),
        (
            [web("w", clip=0.33), synthetic("s0", 0, clip=0.3), synthetic("s1", 1, clip=0.4)],
            2,
            ["s1", "w"],
            {"s0": BELOW},
        ),
        # Fewer than k: all of them. No threshold, so negative cosines too.
        ([web("w", clip=-0.2)], 2, ["w"], {}),
        # Of equal scores the web's comes first, then the lower index.
        (
            [web("w", clip=0.3), synthetic("s0", 0, clip=0.3), synthetic("s1", 1, clip=0.3)],
            2,
            ["w", "s0"],
            {"s1": BELOW},
        ),
        # An exact duplicate takes no second place.
        (
            [
                web("w", clip=0.1),
                synthetic("t", 0, clip=0.4),
                synthetic("t", 1, clip=0.4),
                synthetic("u", 2, clip=0.3),
            ],
            2,
            ["t", "u"],
            {"t": "duplicate", "w": BELOW},
        ),
        # The web's own words, generated: the web's stay.
        ([web("t", clip=0.4), synthetic("t", clip=0.4)], 2, ["t"], {"t": "duplicate"}),
        # Equal but for case is not equal.
        ([web("T", clip=0.4), synthetic("t", clip=0.5)], 2, ["t", "T"], {}),
        ([web("w", clip=0.3), synthetic("s", clip=0.4)], 1, ["s"], {"w": BELOW}),
        # Human captions take no place and need no score.
        ([human("h0", 0), human("h1", 1), human("h2", 2)], 2, ["h0", "h1", "h2"], {}),
    ],
)
def test_blip2_keeps_the_top_k_of_distinct_captions_by_clip(corpus, captions, top_k, kept, dropped):
    found = decide(corpus, captions, policy="blip2", top_k=top_k)
    assert found == (kept, dropped, KEPT)


def test_duplicates_of_other_images_are_no_duplicates(corpus):
    images = [(raw_row(f"{n:09d}"), [web("the same", clip=0.1)]) for n in range(3)]
    done = select(corpus, images, policy="blip2")
    assert done.record.counts.kept == 3


OTHER = "other_origin"
WEB_AND_SYNTHETIC = [
    web("w", itm=0.9),
    synthetic("s0", 0, itm=0.1),
    synthetic("s1", 1, itm=0.7),
]


@pytest.mark.parametrize(
    ("policy", "captions", "kept", "dropped"),
    [
        ("web_only", [web("w"), synthetic("s")], ["w"], {"s": OTHER}),
        ("web_only", [web("w0"), web("w1", index=1)], ["w0", "w1"], {}),
        (
            "caption_only",
            [web("w"), synthetic("s0"), synthetic("s1", 1)],
            ["s0", "s1"],
            {"w": OTHER},
        ),
        ("filter_only", WEB_AND_SYNTHETIC, ["w"], {"s0": OTHER, "s1": OTHER}),
        ("filter_only", [web("w", itm=0.3), synthetic("s")], [], {"w": ITM, "s": OTHER}),
        ("web_only", [human("h")], ["h"], {}),
        ("caption_only", [human("h")], ["h"], {}),
        ("filter_only", [human("h")], ["h"], {}),
    ],
)
def test_the_ablation_arms_use_one_half_each(corpus, policy, captions, kept, dropped):
    assert decide(corpus, captions, policy=policy)[:2] == (kept, dropped)


def test_another_threshold_is_met_in_the_precision_of_the_scores(corpus):
    # float32 holds 0.7 as 0.69999999; a caption that scored "0.7" is to pass a threshold of 0.7.
    assert decide(corpus, [web("w", itm=0.7)], itm_threshold=0.7)[0] == ["w"]


# The clean shard


IMAGES = [
    (raw_row("000000000", extra={"LICENSE": "cc0"}), WEB_AND_SYNTHETIC),
    (raw_row("000000001", verdict="failed", reason="not_found"), []),
    (raw_row("000000002"), [web("nothing", itm=0.1)]),
    (raw_row("000000003", verdict="dropped", reason="robots_txt"), []),
    (raw_row("000000004"), [lost()]),
    (raw_row("000000005"), [human("a person wrote this", 0, itm=0.2), human("and this", 1)]),
    (raw_row("000000006"), [web("mail me@host.org", itm=0.9, clip=0.25)]),
]


def test_every_row_ends_with_a_verdict_and_its_reason(corpus):
    done = select(corpus, IMAGES)
    rows = ledger_of(corpus, done.record)
    assert [(row["key"][-1], row["verdict"], row["reason"]) for row in rows] == [
        ("0", "kept", ""),
        ("1", "failed", "not_found"),
        ("2", "dropped", ITM),
        ("3", "dropped", "robots_txt"),
        ("4", "failed", "bad_image"),
        ("5", "kept", ""),
        ("6", "kept", ""),
    ]
    assert done.record.rows_in == 7
    assert done.record.counts.kept == 3
    assert done.record.counts.dropped == {ITM: 1, "robots_txt": 1}
    assert done.record.counts.failed == {"not_found": 1, "bad_image": 1}
    assert [(row["num_captions"], row["num_kept"]) for row in rows] == [
        (3, 2),
        (0, 0),
        (1, 0),
        (0, 0),
        (0, 0),
        (2, 2),
        (1, 1),
    ]
    assert list(verify(corpus)) == []


def test_the_ledgers_spans_are_the_bytes_of_the_tar(corpus):
    done = select(corpus, IMAGES)
    with corpus.open(done.record, "tar") as stream:
        tar = stream.read()
    for row in ledger_of(corpus, done.record):
        if row["verdict"] != "kept":
            assert row["image_offset"] is row["image_bytes"] is row["json_offset"] is None
            continue
        image = tar[row["image_offset"] :][: row["image_bytes"]]
        assert image == image_of(row["key"])
        stored = json.loads(tar[row["json_offset"] :][: row["json_bytes"]])
        assert [each["text"] for each in stored["captions"]] == kept_of(row)


def test_a_sample_says_where_it_is_from_and_who_made_its_captions(corpus):
    done = select(corpus, IMAGES)
    members = samples_of(corpus, done.record)["000000000"]
    stored = json.loads(members["json"])
    assert members["txt"] == b"w"
    assert stored["captions"] == [
        {"text": "w", "origin": "web", "scores": {"itm": 0.9}},
        {"text": "s1", "origin": "synthetic", "index": 1, "seed": 3, "scores": {"itm": 0.7}},
    ]
    assert stored["provenance"] == {
        "policy": "blip",
        "select": done.record.fingerprint,
        "captions": "s" * 16,
        "captioner": "c" * 16,
        "filter": "f" * 16,
        "clip_model": None,
    }
    assert stored["url"] == "http://host/000000000.jpg"
    assert stored["sha256"] == hashlib.sha256(image_of("000000000")).hexdigest()
    assert stored["extra"] == {"LICENSE": "cc0"}
    assert (stored["width"], stored["original_width"]) == (256, 800)
    assert Sample.from_members("000000000", members).captions[0].text == "w"


def test_a_sample_names_the_models_that_its_sidecar_names(corpus):
    models = {"captioner": {"name": "owner/captioner", "revision": "main"}}
    raw, scored = commit(corpus, IMAGES, stats={"models": models})
    done = Selector(corpus, SelectConfig()).select(raw, scored)
    for members in samples_of(corpus, done.record).values():
        assert json.loads(members["json"])["provenance"]["models"] == models


def test_webdataset_reads_what_was_written(corpus):
    done = select(corpus, IMAGES)
    path = corpus.local_path(done.record, "tar")
    samples = list(
        wds.WebDataset(path, shardshuffle=False).decode().to_tuple("__key__", "txt", "json")
    )
    assert [(key, text) for key, text, _ in samples] == [
        ("000000000", "w"),
        ("000000005", "a person wrote this"),
        ("000000006", "mail <EMAIL>"),
    ]
    assert [found["captions"][0]["text"] for _, _, found in samples] == [s[1] for s in samples]
    images = [raw["jpg"] for raw in wds.WebDataset(path, shardshuffle=False)]
    assert images == [image_of(key) for key, _, _ in samples]


def test_the_marker_counts_captions_by_origin_and_reason(corpus):
    done = select(corpus, IMAGES)
    assert done.record.stats["captions"] == {
        "kept": {"web": 2, "synthetic": 1, "human": 2},
        "dropped": {ITM: {"web": 1, "synthetic": 1}},
        "masked": {"email": 1},
    }
    assert done.record.stats["content"] == SelectConfig().content()


def test_a_shard_in_which_nothing_is_kept_is_a_shard(corpus):
    done = select(corpus, [(raw_row(KEY, verdict="failed", reason="not_found"), [])])
    assert samples_of(corpus, done.record) == {}
    assert [row["captions"] for row in ledger_of(corpus, done.record)] == [[]]
    assert list(verify(corpus)) == []


def test_an_empty_shard_is_a_shard(corpus):
    done = select(corpus, [])
    assert ledger_of(corpus, done.record) == []
    assert list(verify(corpus)) == []


# Rows in = rows out


scores = st.floats(0, 1, width=32)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@st.composite
def images(draw):
    made = []
    for number in range(draw(st.integers(0, 12))):
        key = f"{number:09d}"
        match draw(st.sampled_from(["failed", "dropped", "lost", "web", "human"])):
            case ("failed" | "dropped") as verdict:
                made.append((raw_row(key, verdict=verdict, reason=f"{verdict}_{number % 2}"), []))
            case "lost":
                verdict, reason = draw(
                    st.sampled_from([("failed", "bad_image"), ("dropped", "no_caption")])
                )
                made.append((raw_row(key), [lost(verdict, reason)]))
            case "human":
                found = draw(st.lists(texts, min_size=1, max_size=3))
                made.append((raw_row(key), [human(text, i) for i, text in enumerate(found)]))
            case "web":
                captions = [web(draw(texts), itm=draw(scores), clip=draw(scores))]
                if draw(st.booleans()):
                    captions = [web("", verdict="dropped", reason="empty_caption")]
                for index in range(draw(st.integers(0, 3))):
                    given_scores = {"itm": draw(scores), "clip": draw(scores)}
                    captions.append(synthetic(draw(texts), index, **given_scores))
                made.append((raw_row(key), captions))
    return made


configs = st.builds(
    dict,
    policy=st.sampled_from(["blip", "blip2", "web_only", "caption_only", "filter_only"]),
    top_k=st.integers(1, 3),
    itm_threshold=st.floats(0, 1),
    rules=st.sampled_from([{}, {"length": {"min_words": 2}, "boilerplate": {}, "characters": {}}]),
)


@given(made=images(), config=configs, num_rows=st.integers(1, 5))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_in_are_rows_out_whatever_is_decided(tmp_path_factory, made, config, num_rows):
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    corpus.write_run("a: run\n")
    done = select(corpus, made, num_rows, **config)
    rows, samples = ledger_of(corpus, done.record), samples_of(corpus, done.record)
    assert [row["key"] for row in rows] == [row["key"] for row, _ in made]
    assert list(samples) == [row["key"] for row in rows if row["verdict"] == "kept"]
    outcome = done.record.stats["captions"]
    dropped = [n for by_origin in outcome["dropped"].values() for n in by_origin.values()]
    num_captions = sum(bool(each["origin"]) for _, captions in made for each in captions)
    assert sum(outcome["kept"].values()) + sum(dropped) == num_captions
    for (raw, captions), row in zip(made, rows, strict=True):
        before = sorted((c["origin"], c["index"]) for c in captions if c["origin"])
        assert sorted((c["origin"], c["index"]) for c in row["captions"]) == before
        assert row["num_kept"] == len(kept_of(row))
        assert (row["verdict"] == "kept") == bool(kept_of(row))
        if raw["verdict"] != "kept":
            assert (row["verdict"], row["reason"]) == (raw["verdict"], raw["reason"])
        for caption in row["captions"]:
            assert (caption["verdict"] == "kept") == (caption["reason"] == "")
            assert caption["verdict"] == "kept" or caption["origin"] != "human"
    assert list(verify(corpus)) == []


def test_the_size_of_blocks_changes_no_decision(tmp_path):
    made = [
        (raw_row(f"{n:09d}"), [web(f"w{n}", itm=n % 10 / 10), synthetic(f"s{n}", itm=n % 7 / 7)])
        for n in range(60)
    ]
    tars, rows = set(), []
    for num_rows in (7, 60, 1):
        corpus = Corpus(str(tmp_path / str(num_rows)))
        record = select(corpus, made, num_rows).record
        tars.add(record.files["tar"].sha256)
        rows.append(ledger_of(corpus, record))
    assert len(tars) == 1
    assert rows[0] == rows[1] == rows[2]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    records = [
        select(Corpus(str(tmp_path / name)), IMAGES, policy="blip").record for name in ("a", "b")
    ]
    assert records[0] == records[1]


# Resuming and replacing


def test_what_is_there_is_left_alone(corpus):
    first = select(corpus, IMAGES)
    raw, scored = (corpus.record(stage, SOURCE, 0) for stage in ("raw", "captions"))
    again = Selector(corpus, SelectConfig()).select(raw, scored)
    assert (first.is_new, again.is_new) == (True, False)
    assert again.record == first.record


def test_another_policy_is_refused_and_what_differs_is_named(corpus):
    select(corpus, IMAGES)
    raw, scored = (corpus.record(stage, SOURCE, 0) for stage in ("raw", "captions"))
    selector = Selector(corpus, SelectConfig(itm_threshold=0.6))
    with pytest.raises(OtherPolicyError, match=r"itm_threshold was 0\.5, now 0\.6") as caught:
        selector.select(raw, scored)
    assert caught.value.differences == {"itm_threshold": (0.5, 0.6)}


def test_what_a_policy_does_not_read_may_change(corpus):
    first = select(corpus, IMAGES, policy="blip")
    raw, scored = (corpus.record(stage, SOURCE, 0) for stage in ("raw", "captions"))
    again = Selector(corpus, SelectConfig(policy="blip", top_k=5)).select(raw, scored)
    assert again.record == first.record


def test_another_policy_replaces_the_shard_when_asked(corpus, tmp_path):
    select(corpus, IMAGES)
    raw, scored = (corpus.record(stage, SOURCE, 0) for stage in ("raw", "captions"))
    config = SelectConfig(policy="web_only")
    done = Selector(corpus, config, replaces_other_policy=True).select(raw, scored)
    fresh = select(Corpus(str(tmp_path / "fresh")), IMAGES, policy="web_only")
    assert done.is_new
    assert done.record == fresh.record == corpus.record("clean", SOURCE, 0)
    assert list(verify(corpus)) == []


def test_a_sidecar_that_was_made_anew_makes_a_new_shard(corpus):
    first = select(corpus, IMAGES)
    raw, scored = (corpus.record(stage, SOURCE, 0) for stage in ("raw", "captions"))
    changed = [(row, [c | {"itm": 0.9} if c["itm"] else c for c in each]) for row, each in IMAGES]
    newer = commit_captions(corpus, raw, changed, replace=scored)
    done = Selector(corpus, SelectConfig()).select(raw, newer)
    assert done.is_new
    assert done.record.counts.kept == first.record.counts.kept + 1
    assert done.record.inputs == newer.sha256


# What cannot be selected from


def test_a_stale_sidecar_is_refused(corpus):
    raw, scored = commit(corpus, IMAGES)
    newer = commit_raw(corpus, [row for row, _ in IMAGES[:-1]], replace=raw)
    with pytest.raises(ShardError, match="stale"):
        Selector(corpus, SelectConfig()).select(newer, scored)


@pytest.mark.parametrize(
    ("policy", "score", "captions"),
    [
        ("blip", "itm", [web("w", clip=0.1)]),
        ("filter_only", "itm", [web("w", clip=0.1)]),
        ("blip2", "clip", [web("w", itm=0.9)]),
    ],
)
def test_a_score_that_is_missing_is_named_before_the_run(corpus, policy, score, captions):
    raw, scored = commit(corpus, [(raw_row(KEY), captions)])
    selector = Selector(corpus, SelectConfig(policy=policy))
    message = rf"captions/web/00000 has no {score} scores, which policy '{policy}' needs; score it"
    with pytest.raises(MissingScoresError, match=message):
        selector.check_scores([scored])
    with pytest.raises(MissingScoresError, match=message):
        selector.select(raw, scored)


@pytest.mark.parametrize("captions", [[human("h")], [lost()], [web("w", itm=0.1)]])
def test_scores_that_nothing_needs_may_be_missing(corpus, captions):
    _, scored = commit(corpus, [(raw_row(KEY), captions)])
    Selector(corpus, SelectConfig()).check_scores([scored])


def test_one_missing_score_among_many_names_its_caption(corpus):
    made = [(raw_row(KEY), [web("w", itm=0.9), synthetic("s", 1)])]
    with pytest.raises(ShardError, match="000000000, synthetic caption 1: it has no itm score"):
        select(corpus, made)


@pytest.mark.parametrize(
    ("raw", "scored", "message"),
    [
        ([0, 2], [0], "differ in 000000002"),
        ([0], [0, 2], "has captions of 000000002"),
        ([0, 2], [2], "differ in 000000000"),
        ([0], [], "nothing of 000000000"),
    ],
)
def test_a_sidecar_of_other_images_fails_the_shard(corpus, raw, scored, message):
    record = commit_raw(corpus, [IMAGES[n][0] for n in raw])
    captions = commit_captions(corpus, record, [IMAGES[n] for n in scored])
    with pytest.raises(ShardError, match=message):
        Selector(corpus, SelectConfig()).select(record, captions)
    assert corpus.record("clean", SOURCE, 0) is None


@pytest.mark.parametrize(
    ("stage", "suffix"), [("raw", "tar"), ("raw", "parquet"), ("captions", "parquet")]
)
def test_a_byte_that_changed_on_disk_fails_the_shard(corpus, stage, suffix):
    raw, scored = commit(corpus, IMAGES)
    path = corpus.local_path({"raw": raw, "captions": scored}[stage], suffix)
    with open(path, "r+b") as stream:
        stream.seek(600)
        byte = stream.read(1)[0]
        stream.seek(600)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(ShardError, match=f"{stage}/web/00000: its {suffix} does not have the hash"):
        Selector(corpus, SelectConfig()).select(raw, scored)
    assert corpus.record("clean", SOURCE, 0) is None


def test_an_expression_and_its_policy_need_each_other():
    for config in ({"policy": "expression"}, {"policy": "blip", "expression": "true"}):
        with pytest.raises(ValidationError, match="need each other"):
            SelectConfig(**config)


def test_every_column_of_the_contract_is_in_the_ledger(corpus):
    done = select(corpus, IMAGES)
    with corpus.open(done.record, "parquet") as stream:
        schema = pq.read_schema(stream)
    assert schema.equals(CLEAN_SCHEMA)
