"""Figures of evaluation on cases worked out by hand, and exports as others load them."""

import numpy as np
import pytest
import torch

from jobs.evaluation.captions import caption_quality
from jobs.evaluation.matching import matching
from jobs.evaluation.retrieval import retrieval


def test_every_pair_that_finds_its_own_first_scores_one():
    similarity = torch.eye(12)
    found = retrieval(similarity, torch.arange(12), None, 3)
    assert found.to_json() == {
        "TR@1": 1.0, "TR@5": 1.0, "TR@10": 1.0, "IR@1": 1.0, "IR@5": 1.0, "IR@10": 1.0,
    }  # fmt: skip


def test_any_of_an_images_texts_counts_and_ranks_are_counted_to_the_last():
    # Two images with two texts each; image 0 finds its second text first, image 1 a wrong one.
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.1, 0.7, 0.2]])
    found = retrieval(similarity, torch.tensor([0, 0, 1, 1]), None, 4)
    assert found.text[1] == 0.5
    assert found.text[5] == 1.0
    # Text 0 prefers image 1, text 1 image 0, text 2 image 1, text 3 image 0.
    assert found.image[1] == 0.5


def test_a_model_that_cannot_tell_pairs_apart_finds_nothing():
    found = retrieval(torch.zeros(20, 20), torch.arange(20), None, 5)
    assert found.text[1] == found.image[1] == found.text[10] == 0.0


def test_matching_ranks_the_candidates_anew_and_looks_at_each_image_once():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.8, 0.9, 0.1], [0.2, 0.3, 0.1]])
    asked = []

    def rerank(image, texts):
        asked.append((image, texts.tolist()))
        truth = {0: 1, 1: 0, 2: 2}  # text of each image
        return torch.tensor([5.0 if text == truth[image] else -5.0 for text in texts.tolist()])

    found = retrieval(similarity, torch.tensor([1, 0, 2]), rerank, 2)
    assert [image for image, _ in asked] == [0, 1, 2]
    # Texts 0 and 1 are put right; image 2 and text 2 are no candidates of each other.
    assert found.image[1] == pytest.approx(2 / 3)
    assert found.text[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("num_candidates", [2, 7, 1000])
def test_more_candidates_than_there_are_is_all_of_them(num_candidates):
    torch.manual_seed(0)
    similarity = torch.rand(7, 7)
    found = retrieval(similarity, torch.arange(7), lambda i, t: torch.zeros(len(t)), num_candidates)
    plain = retrieval(similarity, torch.arange(7), None, 0)
    assert found.text[1] == plain.text[1]


def test_the_same_caption_scores_full_marks_and_another_less():
    references = [["a red star on a white wall"], ["a small green heart"], ["two pink squares"]]
    same = caption_quality([each[0] for each in references], references)
    other = caption_quality(["a red star", "a heart", "something else"], references)
    assert same.figures["BLEU-4"] > 0.75
    assert same.figures["CIDEr"] > other.figures["CIDEr"] > 0
    assert len(same.cider) == 3


def test_case_and_punctuation_do_not_matter():
    references = [["a red star, on a wall"], ["a heart"]]
    plain = caption_quality(["a red star on a wall", "a heart"], references)
    assert caption_quality(["A red STAR on a wall!", "a heart."], references).cider == plain.cider


@pytest.mark.slow  # starts four Java machines
def test_java_splits_words_as_the_coco_server_does_and_gives_meteor():
    references = [["a red star, on a wall"], ["a heart"]]
    found = caption_quality(["a red star on a wall", "a heart"], references, uses_java=True)
    assert found.figures["METEOR"] > 0.5
    assert found.tokenizer == "Stanford PTB"


def test_java_that_is_asked_for_and_missing_is_said_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="there is no `java`"):
        caption_quality(["a star"], [["a star"]], uses_java=True)


def test_a_caption_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="needs references"):
        caption_quality(["a star"], [[]])


def test_precision_and_recall_at_a_threshold():
    found = matching(
        np.array([0.9, 0.6, 0.4, 0.2]), np.array([True, False, True, False]), [0.5, 1.0]
    )
    half, none = found.thresholds
    assert (half.num_kept, half.precision, half.recall) == (2, 0.5, 0.5)
    assert (none.num_kept, none.precision, none.recall) == (0, None, 0.0)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        matching(np.array([0.5, np.nan]), np.array([True, False]))
