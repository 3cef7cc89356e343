import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stage1_golden import A, B, npz
from torch.testing import assert_close

from model.losses import (
    IGNORED,
    contrastive_loss,
    draw,
    floored_negative_weights,
    label_smoothed,
    matching_loss,
    negative_weights,
    next_token_targets,
    query_similarity,
    same_image,
    token_losses,
)


def test_08_smoothed_cross_entropy_is_the_written_out_formula():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    targets[0, 2:] = IGNORED
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    expected = -(0.9 * own + 0.1 * log_probs.mean(-1))
    expected = expected.masked_fill(targets == IGNORED, 0)
    assert_close(token_losses(logits, targets, smoothing=0.1), expected)
    counted = (targets != IGNORED).sum()
    assert_close(label_smoothed(logits, targets, smoothing=0.1), expected.sum() / counted)


def test_08_itc_by_ids_is_label_smoothing_when_ids_are_unique():
    torch.manual_seed(0)
    similarity, ids = torch.randn(4, 9), torch.arange(9)
    positive = same_image(ids[3:7], ids, first=3)
    smoothed = F.cross_entropy(similarity, torch.arange(3, 7), label_smoothing=0.1)
    assert_close(contrastive_loss(similarity, positive, smoothing=0.1), smoothed)
    unknown = same_image(torch.full((4,), -1), torch.full((9,), -1), first=3)
    assert torch.equal(unknown, positive)


def test_itc_shares_its_target_among_pairs_of_one_image():
    torch.manual_seed(0)
    similarity, ids = torch.randn(3, 3), torch.tensor([5, 8, 5])
    targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]) * 0.9 + 0.1 / 3
    expected = -(targets * similarity.log_softmax(1)).sum(1).mean()
    assert_close(contrastive_loss(similarity, same_image(ids, ids, 0), smoothing=0.1), expected)


def test_caption_loss_equals_the_reference():
    golden = npz(A / "data.npz")
    is_real = golden["attention_mask"].bool()
    targets = next_token_targets(golden["iv_dec_input_ids"], is_real)
    assert torch.equal(targets, golden["iv_labels"][:, 1:])
    logits = golden["iv_logits"][:, :-1]
    assert_close(label_smoothed(logits, targets), golden["iv_loss"], rtol=1e-5, atol=2e-5)
    each = token_losses(logits, targets, smoothing=0.1).sum(1)
    assert_close(each, golden["iv_loss_none_persample_sum"], rtol=1e-5, atol=2e-5)


def test_similarity_equals_the_reference():
    golden, single = npz(A / "data.npz"), npz(B / "single.npz")
    image, text = golden["i_image_feats"], golden["ii_text_feat"]
    assert_close(query_similarity(image, text) / 0.07, single["sim_i2t"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["single.npz", "single_image_id.npz"])
def test_sampling_weights_equal_the_reference(name):
    single, golden = npz(B / "single.npz"), npz(B / name)
    ids = golden.get("image_id", torch.full((6,), -1))
    forbidden = same_image(ids, ids, first=0)
    for direction in ("i2t", "t2i"):
        weights = negative_weights(single[f"sim_{direction}"], forbidden)
        assert_close(weights, golden[f"weights_{direction}"], rtol=1e-4, atol=1e-6)


def test_floored_weights_equal_blips_formula():
    torch.manual_seed(0)
    similarity, own = torch.randn(4, 4), torch.eye(4, dtype=torch.bool)
    expected = (similarity.softmax(1) + 1e-4).masked_fill(own, 0)
    assert_close(floored_negative_weights(similarity, own), expected)


def test_draw_follows_the_weights():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 0.5, 0.3, 0.2, 0.0])
    counts = draw(weights.expand(40_000, -1)).bincount(minlength=5)
    assert counts[[0, 4]].tolist() == [0, 0]
    assert_close(counts / 40_000, weights, atol=0.01, rtol=0.0)


def test_draw_is_repeatable_from_a_generator():
    weights = torch.rand(20, 30)
    first, second = (draw(weights, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


# NaN, infinities and any magnitude may reach the sampler from a diverging model.
wild = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=200)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(wild, min_size=n * 4, max_size=n * 4)))
def test_d8_no_similarity_makes_weights_nan_or_draws_what_is_forbidden(values):
    """Defect D8: NaN in the weights ended the reference's runs with a multinomial assertion."""
    similarity = torch.tensor(values).view(-1, 4)
    forbidden = torch.zeros_like(similarity, dtype=torch.bool)
    forbidden[:, 1] = forbidden[0, 2] = True
    for weigh in (negative_weights, floored_negative_weights):
        weights = weigh(similarity, forbidden)
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert (weights[~forbidden.all(1)].sum(1) > 0).all()
        drawn = draw(weights)
        assert not forbidden[torch.arange(len(drawn)), drawn].any()


def test_row_that_forbids_everything_has_zero_weights_and_still_draws():
    weights = negative_weights(torch.randn(2, 3), torch.tensor([[True] * 3, [True, False, True]]))
    assert weights[0].tolist() == [0, 0, 0]
    assert draw(weights).tolist()[1] == 1


def test_half_precision_similarities_are_computed_in_float32():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 3, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = query_similarity(image.bfloat16(), text.bfloat16())
    assert similarity.dtype == torch.float32
    expected = (image.bfloat16().float() @ text.bfloat16().float().t()).amax(1)
    assert_close(similarity, expected, atol=1e-6, rtol=1e-6)


def test_matching_loss_leaves_out_pairs_that_do_not_count():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [5.0, -5.0]])
    is_match = torch.tensor([True, False, True])
    counts = torch.tensor([True, True, False])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert matching_loss(logits, is_match, counts).item() == pytest.approx(expected, rel=1e-6)
    assert matching_loss(logits, is_match, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_captions_without_a_target_cost_nothing():
    logits = torch.randn(1, 2, 7, requires_grad=True)
    loss = label_smoothed(logits, torch.full((1, 2), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_image_of_another_rank_is_the_same_image_by_its_id_only():
    ids = torch.tensor([3, -1, 3, -1])
    expected = [[True, False, True, False], [False, False, False, True]]
    assert same_image(ids[2:], ids, first=2).tolist() == expected
