"""Comparing corpora and calibrating scores: the statistics, and what the page is told."""

import dataclasses
import json
import math
import random
import tempfile
from collections import Counter
from statistics import fmean, variance
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_corpora import HOSTILE, build

from pipeline.corpus import Corpus
from pipeline.report.build import build_report
from pipeline.report.calibrate import (
    CalibrationConfig,
    calibrate,
    calibration_of,
)
from pipeline.report.compare import Z, mean, paired_share, share
from pipeline.report.compare import compare as compare_ledgers
from pipeline.report.labels import LabelledPair, read_labels
from pipeline.report.ledgers import Ledgers, Snapshot

SHAPE = {"laion": [80, 60], "coco": [20]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same rows under two policies: A keeps more than B."""
    folder = tmp_path_factory.mktemp("pair")
    return (
        build(folder / "a", SHAPE, threshold=0.5, texts=HOSTILE),
        build(folder / "b", SHAPE, threshold=0.8, texts=HOSTILE),
    )


def compare(a, b):
    with tempfile.TemporaryDirectory() as folder, Ledgers.open(a, Snapshot.take(a)) as ledgers:
        return compare_ledgers(ledgers, b, folder)


@pytest.fixture(scope="module")
def compared(pair):
    (a, _), (b, _) = pair
    return compare(a, b)


def measure_of(compared, name):
    (found,) = [m for m in compared["measures"] if m["name"] == name]
    return found


def test_what_left_and_what_came_in_is_counted_row_by_row(pair, compared):
    kept = [
        {(r["source"], r["key"]) for r in made["clean"] if r["verdict"] == "kept"}
        for _, made in pair
    ]
    moves = compared["moves"]
    assert moves["common"] == sum(map(sum, SHAPE.values()))
    assert moves["both"] == len(kept[0] & kept[1])
    assert moves["came"] == len(kept[0] - kept[1]) > 0
    assert moves["left"] == len(kept[1] - kept[0])
    came = {(e["source"], e["key"]) for e in moves["came_examples"]}
    assert came <= kept[0] - kept[1]
    assert {e["reason"] for e in moves["came_examples"]} == {"no_caption_kept"}


def per_sample(made, value):
    found = []
    for row in made["clean"]:
        texts = [value(c) for c in row["captions"] if c["verdict"] == "kept"]
        if row["verdict"] == "kept" and texts:
            found.append(fmean(texts))
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean ITM of kept captions", lambda c: float(np.float32(c["itm"]))),
        ("mean CLIP of kept captions", lambda c: float(np.float32(c["clip"]))),
        ("characters in a kept caption", lambda c: len(c["text"])),
    ],
)
def test_means_and_their_intervals_are_what_a_plain_recount_gives(pair, compared, name, value):
    a, b = (per_sample(made, value) for _, made in pair)
    found = measure_of(compared, name)
    half = Z * math.sqrt(variance(a) / len(a) + variance(b) / len(b))
    difference = fmean(a) - fmean(b)
    assert found["a"] == pytest.approx(fmean(a))
    assert found["difference"] == pytest.approx(difference)
    assert (found["low"], found["high"]) == pytest.approx((difference - half, difference + half))


def test_scores_that_both_corpora_share_differ_by_nothing(compared):
    found = measure_of(compared, "mean ITM of the first web caption")
    assert found["difference"] == 0
    assert found["low"] < 0 < found["high"]


def test_a_comparison_is_on_the_page_and_hostile_captions_are_text(pair):
    (a, _), (b, _) = pair
    build_report(a, compare=b)
    page = a.store.read("report/index.html").decode()
    assert 'id="comparison"' in page
    assert "What left, what came in" in page
    assert json.loads(a.store.read("report/report.json"))["comparison"]["other"] == b.root


def test_corpora_without_common_rows_are_compared_by_shares(pair, tmp_path):
    (a, made), _ = pair
    other, other_made = build(tmp_path, {"cc3m": [50]})
    found = compare(a, other)
    assert found["moves"] is None
    kept = measure_of(found, "samples kept")
    for side, rows in (("a", made["clean"]), ("b", other_made["clean"])):
        share_kept = sum(r["verdict"] == "kept" for r in rows) / len(rows)
        assert kept[side] == pytest.approx(share_kept)
    assert kept["low"] < kept["difference"] < kept["high"]


def test_rows_of_the_same_key_but_another_url_are_not_the_same(pair, tmp_path):
    (a, _), _ = pair
    other, _ = build(tmp_path, SHAPE, seed="another list")
    moves = compare(a, other)["moves"]
    assert moves is None or moves["common"] < sum(map(sum, SHAPE.values()))


def test_a_corpus_is_compared_with_one_that_is_empty(pair, tmp_path):
    (a, _), _ = pair
    found = compare(a, Corpus(str(tmp_path)))
    assert found["moves"] is None
    assert all(m["low"] is None for m in found["measures"])


def test_the_interval_of_two_shares_is_newcombes():
    """The worked example of Newcombe (1998), method 10: 56/70 against 48/80."""
    found = share("x", "y", (56, 70), (48, 80))
    assert found.difference == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)


def coverage(make, num_trials, truth):
    chance = random.Random(5)
    hits = 0
    for _ in range(num_trials):
        found = make(chance)
        hits += found.low <= truth <= found.high
    return hits / num_trials


def test_intervals_hold_the_truth_as_often_as_they_say():
    def two_shares(chance):
        a, b = (sum(chance.random() < p for _ in range(80)) for p in (0.9, 0.8))
        return share("", "", (a, 80), (b, 80))

    def two_means(chance):
        sides = [[chance.expovariate(1 / m) for _ in range(120)] for m in (2, 1)]
        return mean("", "", *((len(s), fmean(s), variance(s)) for s in sides))

    def same_rows(chance):
        rows = [(chance.random() < 0.7, chance.random() < 0.6) for _ in range(150)]
        tally = Counter(rows)
        moves = {
            "common": 150,
            "both": tally[True, True],
            "came": tally[True, False],
            "left": tally[False, True],
        }
        return paired_share("", "", moves)

    assert 0.92 < coverage(two_shares, 600, 0.1) < 0.98
    assert 0.92 < coverage(two_means, 600, 1.0) < 0.98
    assert 0.92 < coverage(same_rows, 600, 0.1) < 0.98


@given(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)))
def test_an_interval_holds_the_difference_itself(counts):
    a, b = sorted(counts[:2]), sorted(counts[2:])
    found = share("", "", tuple(a), tuple(b))
    if found.difference is not None:
        assert found.low <= found.difference + 1e-12
        assert found.high >= found.difference - 1e-12
        assert -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9


# Calibration.

SORTED = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(lambda s: np.array(s))


@given(SORTED, SORTED, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_precision_recall_and_auroc_are_what_counting_gives(right, wrong, wanted):
    found = calibration_of("itm", "x", (right, wrong), 0.5, wanted)
    for point in [*found.points, found.for_share]:
        r = fmean(value >= point.threshold for value in right)
        w = fmean(value >= point.threshold for value in wrong)
        assert point.recall == pytest.approx(r)
        assert point.precision == (pytest.approx(r / (r + w)) if r + w else None)
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    assert found.auroc == pytest.approx(fmean(pairs))
    if found.for_precision is not None:
        assert found.for_precision.precision >= wanted
        lower = [v for v in [*right, *wrong] if v < found.for_precision.threshold]
        for threshold in lower:
            r, w = fmean(right >= threshold), fmean(wrong >= threshold)
            assert r / (r + w) < wanted


class ColourScorer:
    """Scores by a hash of what it sees and reads: equal pairs have equal scores."""

    def __init__(self, own_texts):
        self.own_texts = own_texts
        self.num_shuffled = 0

    def preprocess(self, pixels):
        return float(pixels.mean())

    def score(self, images, texts):
        found = []
        for image, (own, other) in zip(images, texts, strict=True):
            assert 0 < image < 255
            assert own in self.own_texts
            assert other in self.own_texts
            assert own != other
            self.num_shuffled += 1
            good, bad = 0.5 + image / 600, image / 600
            found.append([SimpleNamespace(itm=s, itc=None, clip=s / 3) for s in (good, bad)])
        return found


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return build(tmp_path_factory.mktemp("scored"), {"laion": [60, 60]})


def test_calibration_sets_each_image_against_another_images_caption(scored):
    corpus, made = scored
    scorer = ColourScorer({row["text"] for row in made["captions"] if row.get("text")})
    config = CalibrationConfig(num_pairs=60, wanted_precision=1.0)
    found = calibrate(corpus, scorer=scorer, config=config)
    assert 40 <= found.num_pairs == found.num_shuffled == scorer.num_shuffled <= 60
    assert [(s.score, s.against) for s in found.scores] == [
        ("itm", "shuffled pairs"),
        ("clip", "shuffled pairs"),
    ]
    itm = found.scores[0]
    assert itm.auroc == 1.0
    assert itm.for_precision.threshold > 0.5
    assert itm.for_precision.recall == 1.0
    assert len(found.lines()) == 2
    stored = json.loads(corpus.store.read("report/calibration.json"))
    assert stored == json.loads(json.dumps(dataclasses.asdict(found)))
    build_report(corpus)
    page = corpus.store.read("report/index.html").decode()
    assert 'data-chart="calibration-0"' in page


def test_labelled_pairs_are_judged_by_their_stored_scores(scored):
    corpus, made = scored
    rows = [r for r in made["captions"] if r.get("itm") is not None and r["origin"] == "web"]
    labels = [
        LabelledPair(
            source=r["source"],
            key=r["key"],
            origin="web",
            index=0,
            is_match=r["itm"] > 0.4,
        )
        for r in rows
    ]
    stranger = LabelledPair(source="laion", key="none", origin="web", index=0, is_match=True)
    found = calibrate(corpus, [*labels, stranger])
    assert found.num_labelled == len(labels)
    itm = next(s for s in found.scores if s.score == "itm")
    assert (itm.against, itm.auroc) == ("labelled pairs", 1.0)
    assert itm.num_right + itm.num_wrong == len(labels)


def test_a_budget_keeps_the_share_that_was_asked_for(scored):
    corpus, made = scored
    values = [r["itm"] for r in made["captions"] if r.get("itm") is not None]
    labels = [
        LabelledPair(source="laion", key=r["key"], origin="web", index=0, is_match=bool(n % 2))
        for n, r in enumerate(made["captions"])
        if r.get("origin") == "web"
    ]
    found = calibrate(corpus, labels, config=CalibrationConfig(wanted_share=0.25))
    threshold = next(s for s in found.scores if s.score == "itm").for_share.threshold
    kept = sum(value >= threshold for value in values) / len(values)
    assert 0.25 <= kept < 0.27


def test_calibration_without_anything_to_compare_says_what_it_needs(scored, tmp_path):
    with pytest.raises(ValueError, match="needs a scorer"):
        calibrate(scored[0])
    corpus, _ = build(tmp_path, {"cc3m": [3]}, stages=1)
    label = LabelledPair(source="cc3m", key="0", origin="web", index=0, is_match=True)
    with pytest.raises(ValueError, match="no scored captions yet"):
        calibrate(corpus, [label])


def test_labels_are_read_from_a_table_and_keys_stay_text(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("key,source,is_match,index\n000042,laion,yes,3\n000043,laion,0,\n")
    first, second = read_labels(str(path))
    expected = {"source": "laion", "key": "000042", "origin": "web", "index": 3, "is_match": True}
    assert dataclasses.asdict(first) == expected | {"text": None}
    assert (second.key, second.index, second.is_match) == ("000043", 0, False)


def test_labels_in_json_lines_may_have_texts_and_leave_out_the_source(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"key": "000042", "caption": "a cat", "is_match": 1}\n')
    (label,) = read_labels(str(path), "coco")
    assert (label.key, label.source, label.text, label.is_match) == (
        "000042",
        "coco",
        "a cat",
        True,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key,source\n1,a\n", "has no column is_match"),
        ("key,source,is_match\n1,a,maybe\n", "row 1: is_match is 'maybe'"),
        ("key,source,is_match,index\n1,a,1,x\n", "row 1: index is 'x'"),
    ],
)
def test_labels_that_cannot_be_meant_are_named(tmp_path, text, said):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_labels(str(path))


def test_a_file_of_labels_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.parquet cannot be read"):
        read_labels(str(tmp_path / "none.parquet"))
