"""A model judged as a filter by labelled pairs: worked out by hand, whatever the batch size."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from report_corpora import commit, drawing

from jobs.errors import UserError
from jobs.evaluation.labelled import filter_quality
from jobs.evaluation.matching import even_thresholds
from pipeline.corpus import Corpus
from pipeline.models import ImagePreprocessor

# P(match) of each text, whatever the image. Of 2 x 2 pairs, a red bus < a blue bus is out of order.
CHANCES = {"a cat": 0.9, "a red bus": 0.4, "a blue bus": 0.6, "noise": 0.2}
LABELS = [
    {"key": "000000001", "caption": "A cat", "is_match": True},
    {"key": "000000001", "caption": "noise", "is_match": False},
    {"key": "000000002", "origin": "synthetic", "index": 1, "is_match": True},  # a red bus
    {"key": "000000002", "is_match": 0},  # of the web, the first: a blue bus
    {"key": "000000099", "caption": "a cat", "is_match": True},
    {"key": "000000002", "origin": "synthetic", "index": 7, "is_match": True},
]


class Reader:
    """Matches by the text alone; its cosine is that of P(match), turned around."""

    def image_features(self, pixels):
        assert pixels.shape == (1, 3, 8, 8)
        return torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # of two queries the better one counts

    def text_features(self, texts):
        return torch.tensor([[1 - CHANCES[text], -1.0] for text in texts])

    def see(self, pixels):
        return pixels

    def match(self, seen, texts):
        chances = [CHANCES[text] for text in texts]
        return torch.tensor([[0.0, math.log(p / (1 - p))] for p in chances])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two images, of which the captions of the second were scored by CLIP."""
    made = Corpus(str(tmp_path_factory.mktemp("labelled")))
    keys = ["000000001", "000000002"]
    base = {"source": "test", "url": "http://host/x.jpg", "verdict": "kept", "reason": ""}
    raw = [base | {"key": key, "origin": "web", "status": "success"} for key in keys]
    images = {key: drawing(key) for key in keys}
    above = commit(made, ("raw", "test", 0), raw, images=images)
    scored = base | {"key": keys[1], "itm": 0.5}
    rows = [
        scored | {"origin": "web", "index": 0, "text": "a blue bus", "clip": 0.21},
        scored | {"origin": "synthetic", "index": 1, "text": "a red bus", "clip": 0.30},
    ]
    commit(made, ("captions", "test", 0), rows, inputs=above.sha256)
    return made


def judged(corpus, folder, labels=LABELS, batch_size=64):
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))
    look = ImagePreprocessor(8)
    return filter_quality(corpus, str(path), "test", Reader(), look, batch_size)


def test_scores_are_set_against_labels_and_what_is_not_there_is_counted(corpus, tmp_path):
    found = judged(corpus, tmp_path)
    assert (found.num_pairs, found.num_missing) == (4, 2)
    assert found.figures() == {"ITM AUC": 0.75, "ITC AUC": 0.25}
    assert found.scores["CLIP"].auc == 1.0  # of the two captions that the corpus has scored
    half = next(at for at in found.scores["ITM"].thresholds if at.threshold == 0.5)
    assert (half.num_kept, half.precision, half.recall) == (2, 0.5, 0.5)


def test_figures_do_not_depend_on_the_batch_size(corpus, tmp_path):
    assert judged(corpus, tmp_path).to_json() == judged(corpus, tmp_path, batch_size=1).to_json()


def test_numbers_are_json_and_a_table(corpus, tmp_path):
    found = judged(corpus, tmp_path)
    told = json.loads(json.dumps(found.to_json()))
    assert set(told["scores"]) == {"ITM", "ITC", "CLIP"}
    assert told["scores"]["ITM"]["auc"] == 0.75
    lines = list(found.lines())
    assert lines[0] == "4 labelled pairs, 2 not found or not readable"
    assert "  ITM: AUC 0.750, 2 right, 2 wrong" in lines


def test_labels_of_one_kind_have_no_area(corpus, tmp_path):
    found = judged(corpus, tmp_path, LABELS[:1])
    assert (found.figures(), found.scores["ITM"].auc) == ({}, None)


def test_labels_of_which_nothing_is_there_or_readable_say_so(corpus, tmp_path):
    with pytest.raises(UserError, match="has none of its 1 pairs"):
        judged(corpus, tmp_path, LABELS[4:5])
    with pytest.raises(UserError, match=r"evaluation\.labels: .* has no column is_match"):
        judged(corpus, tmp_path, [{"key": "1"}])


@pytest.mark.parametrize(("low", "high"), [(0.13, 0.31), (-0.4, 0.99), (0.2, 0.2), (0, 1)])
def test_thresholds_span_any_range_in_at_most_twenty_steps(low, high):
    found = even_thresholds(torch.tensor([low, high], dtype=torch.float64).numpy())
    assert 1 <= len(found) <= 20
    assert found[0] <= low + 0.05
    assert low - 1e-9 <= found[-1] + 0.1 >= high
    assert found == sorted(set(found))
