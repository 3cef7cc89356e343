"""The momentum encoder, the queue, and what gradient accumulation does to both."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from med_golden import (
    HIDDEN,
    NO_DROPOUT,
    OBJECTIVES,
    batch,
    reference_model,
    run_step,
)

from model.med import TINY_MED
from model.med_pretraining import (
    PRETRAINING,
    MedPretraining,
    MedStep,
)
from model.momentum import NO_IMAGE, FeatureQueue
from model.vision import BLIP_VIT_B, BLIP_VIT_L, TINY_VIT

STEP = MedStep(alpha=0.4)


def new_model(objectives=OBJECTIVES, med=NO_DROPOUT, vision=TINY_VIT):
    torch.manual_seed(0)
    return MedPretraining(vision, med, objectives)


@pytest.fixture(scope="module")
def first_step():
    """The reference's model after the losses of step 0 and their gradients."""
    model = reference_model().train()
    got = run_step(model)
    got.total.backward()
    return model, got


# --- momentum ----------------------------------------------------------------------------------


def test_the_momentum_encoder_moves_once_before_it_is_asked():
    model = reference_model().train()
    before = {name: p.clone() for name, p in model.momentum.named_parameters()}
    online = dict(model.named_parameters())
    run_step(model)
    for name, after in model.momentum.named_parameters():
        expected = 0.995 * before[name] + 0.005 * online[name]
        torch.testing.assert_close(after, expected, atol=1e-7, rtol=1e-6)


def test_the_momentum_encoder_never_gets_a_gradient(first_step):
    model, _ = first_step
    assert all(not p.requires_grad and p.grad is None for p in model.momentum.parameters())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trainable)


def test_a_new_momentum_encoder_is_a_copy_and_can_be_made_one_again():
    model = new_model()
    online = dict(model.named_parameters())
    assert all(torch.equal(p, online[name]) for name, p in model.momentum.named_parameters())
    with torch.no_grad():
        model.vision_proj.weight.add_(1)
    assert not torch.equal(model.momentum.vision_proj.weight, model.vision_proj.weight)
    model.reset_momentum()
    assert torch.equal(model.momentum.vision_proj.weight, model.vision_proj.weight)


@pytest.mark.parametrize("follows", [True, False])
def test_dropout_of_the_momentum_encoder_is_a_documented_choice(follows):  # D22
    objectives = replace(OBJECTIVES, is_momentum_in_training_mode=follows)
    model = new_model(objectives, med=TINY_MED).train()  # dropout 0.1
    assert all(module.training == follows for module in model.momentum.modules())
    one, other = (model.momentum(*batch()[:3])[1] for _ in range(2))
    assert torch.equal(one, other) != follows
    model.eval()
    assert not model.momentum.training
    model.train()
    assert model.momentum.training == follows


def test_the_reference_runs_momentum_in_training_mode():
    assert PRETRAINING.is_momentum_in_training_mode


def test_stochastic_depth_is_what_the_config_says():  # D22: a zero asked for is a zero
    assert BLIP_VIT_B.drop_path == 0
    assert BLIP_VIT_L.drop_path == 0.1
    assert (
        new_model(vision=replace(TINY_VIT, drop_path=0.0)).image_encoder.layers[-1].drop_path == 0
    )


# --- queue -------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 12))
def test_the_queue_holds_the_newest_pairs(pairs_a_step, steps_to_fill, num_steps):
    size = pairs_a_step * steps_to_fill
    queue = FeatureQueue(joint_width=4, size=size)
    sent = torch.arange(num_steps * pairs_a_step)
    for ids in sent.split(pairs_a_step) if num_steps else ():
        queue.enqueue(ids[:, None].expand(-1, 4) + 0.0, ids[:, None].expand(-1, 4) + 0.5, ids)
    newest = sorted(sent.tolist())[-size:]
    held = queue.image_ids[0][queue.image_ids[0] != NO_IMAGE]
    assert sorted(held.tolist()) == newest
    is_filled = queue.image_ids[0] != NO_IMAGE
    assert torch.equal(queue.image_feats[0, is_filled], held.float())
    assert torch.equal(queue.text_feats[3, is_filled], held + 0.5)
    assert queue.pointer.item() == len(sent) % size


def test_a_new_queue_points_in_random_directions_of_length_one():
    queue = FeatureQueue(joint_width=16, size=24)
    for feats in (queue.image_feats, queue.text_feats):
        torch.testing.assert_close(feats.norm(dim=0), torch.ones(24))
    assert (queue.image_ids == NO_IMAGE).all()
    assert (queue.image_feats - queue.text_feats).abs().max() > 0.1


def test_a_global_batch_that_does_not_divide_the_queue_is_an_error_that_tells_a_size():
    model = new_model()
    with pytest.raises(
        ValueError, match=r"queue_size 24 is not a multiple of .* 5 pairs.*choose queue_size 20"
    ):
        model(*batch(0, 5), STEP)
    with pytest.raises(ValueError, match="30 pairs"):
        model(*batch(), MedStep(alpha=0.0, num_micro_batches=5))


def test_the_papers_queue_takes_the_papers_batches():
    queue = FeatureQueue(joint_width=1, size=PRETRAINING.queue_size)
    queue.require_divisible(2880)
    queue.require_divisible(2400)


# --- gradient accumulation (D11) ---------------------------------------------------------------


def test_accumulated_micro_batches_move_momentum_and_queue_as_one_batch_does():
    whole, parts = reference_model().train(), reference_model().train()
    whole(*batch(0, 12), STEP)
    for number in range(2):
        rows = batch(6 * number, 6 * number + 6)
        parts(*rows, MedStep(alpha=0.4, micro_batch=number, num_micro_batches=2))
        assert parts.queue.pointer.item() == (0 if number == 0 else 12)
    for name, expected in whole.momentum.named_parameters():
        assert torch.equal(parts.momentum.get_parameter(name), expected), name
    assert torch.equal(parts.queue.image_ids, whole.queue.image_ids)
    torch.testing.assert_close(parts.queue.image_feats, whole.queue.image_feats, **HIDDEN)
    torch.testing.assert_close(parts.queue.text_feats, whole.queue.text_feats, **HIDDEN)


def test_a_step_that_was_broken_off_leaves_nothing_in_the_queue():
    model = reference_model().train()
    model(*batch(0, 6), MedStep(alpha=0.4, micro_batch=0, num_micro_batches=2))
    model(*batch(6, 12), STEP)
    assert model.queue.pointer.item() == 6
    assert model.queue.image_ids[0, :6].tolist() == list(range(6, 12))


def test_a_micro_batch_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match="micro_batch is 2 of 2"):
        MedStep(alpha=0.4, micro_batch=2, num_micro_batches=2)


def test_without_a_queue_a_batch_is_compared_with_itself_alone():
    queue = FeatureQueue(joint_width=8, size=0)
    queue.require_divisible(7)
    queue.enqueue(torch.randn(7, 8), torch.randn(7, 8), torch.arange(7))
    assert queue.image_feats.shape == (8, 0)
    assert queue.pointer.tolist() == [0]
