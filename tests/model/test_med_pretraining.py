import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from med_golden import (
    HIDDEN,
    LOGITS,
    LOSS,
    NO_DROPOUT,
    OBJECTIVES,
    D,
    batch,
    npz,
    recorded_negatives,
    reference_model,
    run_step,
    steps,
)
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model.losses import UNKNOWN_IMAGE, Negatives
from model.med_pretraining import (
    FILTER_FINE_TUNING,
    HardNegatives,
    MedPretraining,
    MedStep,
)
from model.names.blip import PRETRAINING_BLIP, med_to_theirs
from model.vision import TINY_VIT

FINE_TUNING = replace(FILTER_FINE_TUNING, joint_width=16, queue_size=24)
STEP = MedStep(alpha=0.4)
ONE_LAYER = {
    "vision": replace(TINY_VIT, num_layers=1),
    "med": replace(NO_DROPOUT, bert=replace(NO_DROPOUT.bert, num_layers=1)),
}


def new_model(objectives=OBJECTIVES, med=NO_DROPOUT, vision=TINY_VIT):
    torch.manual_seed(0)
    return MedPretraining(vision, med, objectives)


# --- equal to the reference --------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_step():
    """The reference's model after the losses of step 0 and their gradients."""
    model = reference_model().train()
    got = run_step(model)
    got.total.backward()
    return model, got


def test_the_losses_of_a_step_equal_the_reference(first_step):
    _, got = first_step
    expected = npz("step0.npz")
    for ours, theirs in (
        ("total", "loss"),
        ("itc", "loss_ita"),
        ("itm", "loss_itm"),
        ("lm", "loss_lm"),
    ):
        assert getattr(got, ours).item() == pytest.approx(expected[theirs].item(), **LOSS)


def test_the_losses_of_a_step_in_float64_equal_the_reference():
    model = reference_model().double()
    pixels, *rest = batch()
    got = model(pixels.double(), *rest, STEP, recorded_negatives(steps()[0]))
    assert got.total.dtype == torch.float64
    expected = json.loads((D / "step0_fp64_losses.json").read_text())
    assert got.total.item() == pytest.approx(expected["loss"], rel=1e-8)
    assert got.itc.item() == pytest.approx(expected["loss_ita"], rel=1e-8)
    assert got.itm.item() == pytest.approx(expected["loss_itm"], rel=1e-8)
    assert got.lm.item() == pytest.approx(expected["loss_lm"], rel=1e-8)


def test_similarities_and_matching_logits_equal_the_reference(first_step):
    _, got = first_step
    expected = npz("step0.npz")
    torch.testing.assert_close(got.sim_i2t, expected["sim_i2t"], **LOGITS)
    torch.testing.assert_close(got.sim_t2i, expected["sim_t2i"], **LOGITS)
    torch.testing.assert_close(got.itm_logits, expected["itm_logits"], **LOGITS)


def test_soft_targets_are_those_of_the_references_momentum_similarities():
    expected = npz("step0.npz")
    compared = captured_similarities(reference_model(), alpha=0.4)
    onehot = torch.eye(6, 30)
    for ours, theirs in (("i2t_targets", "sim_i2t_m"), ("t2i_targets", "sim_t2i_m")):
        soft = 0.4 * expected[theirs].softmax(dim=1) + 0.6 * onehot
        torch.testing.assert_close(getattr(compared, ours), soft, **HIDDEN)


def test_sampling_weights_equal_the_reference():
    model = reference_model()
    pairs, compared = captured(model)
    weights = model._negative_weights(pairs, compared)
    expected = npz("step0.npz")
    torch.testing.assert_close(weights.i2t, expected["weights_i2t"], **HIDDEN)
    torch.testing.assert_close(weights.t2i, expected["weights_t2i"], **HIDDEN)


def captured(model, alpha=0.4):
    """What a step compares, and the pairs it compares."""
    seen = []
    inner = model._compare

    def remember(pairs, *rest):
        seen.append((pairs, inner(pairs, *rest)))
        return seen[-1][1]

    model._compare = remember
    with torch.no_grad():
        model(*batch(), MedStep(alpha=alpha))
    return seen[0]


def captured_similarities(model, alpha):
    return captured(model, alpha)[1]


def test_the_queue_after_a_step_equals_the_reference(first_step):
    model, _ = first_step
    expected = npz("step0.npz")
    torch.testing.assert_close(model.queue.image_feats, expected["image_queue_after"], **HIDDEN)
    torch.testing.assert_close(model.queue.text_feats, expected["text_queue_after"], **HIDDEN)
    assert torch.equal(model.queue.pointer, expected["queue_ptr_after"])


def test_the_gradients_of_a_step_equal_the_reference(first_step):
    model, _ = first_step
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = med_to_theirs(grads, PRETRAINING_BLIP)
    theirs = load_file(D / "step0_grads.safetensors")
    assert len(theirs) == 154
    for name, expected in theirs.items():
        if not name.endswith("key.bias"):  # zero but for rounding: softmax ignores a shift
            error = (ours[name] - expected).norm()
            assert error < 1e-4 * expected.norm() or error < 1e-6, name


def test_three_steps_of_adamw_equal_the_reference():
    model = reference_model().train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05)
    for number, expected in enumerate(steps()):
        optimizer.zero_grad()
        got = run_step(model, number)
        assert model.temperature.item() == pytest.approx(expected["temp"], rel=1e-5)
        for ours, theirs in (
            ("total", "loss"),
            ("itc", "loss_ita"),
            ("itm", "loss_itm"),
            ("lm", "loss_lm"),
        ):
            assert getattr(got, ours).item() == pytest.approx(expected[theirs], rel=1e-4)
        assert model.queue.pointer.item() == expected["queue_ptr_after"]
        got.total.backward()
        optimizer.step()


# --- who is whose negative ---------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [OBJECTIVES, FINE_TUNING], ids=["pretraining", "filter"])
def test_10_pairs_of_one_image_are_never_drawn_against_each_other(objectives):
    model = new_model(objectives).train()
    ids = torch.tensor([5, 8, 5, UNKNOWN_IMAGE, UNKNOWN_IMAGE, 8])
    drawn = set()
    with torch.no_grad():
        for _ in range(40):
            negatives = model(*batch(image_ids=ids), STEP).negatives
            drawn |= set(enumerate(negatives.image_for_text.tolist()))
            drawn |= set(enumerate(negatives.text_for_image.tolist()))
    same = {(0, 2), (2, 0), (1, 5), (5, 1)} | {(row, row) for row in range(6)}
    assert drawn & same == set()
    assert {(3, 4), (4, 3)} <= drawn  # two unknown images are not the same image


@pytest.mark.parametrize("objectives", [OBJECTIVES, FINE_TUNING], ids=["pretraining", "filter"])
def test_a_batch_of_one_trains_without_negatives(objectives):  # D1
    model = new_model(objectives).train()
    got = model(*batch(0, 1), STEP)
    got.total.backward()
    assert got.sim_i2t.shape == (1, 25)
    assert got.itm.item() == pytest.approx(
        F.cross_entropy(got.itm_logits[:1], torch.tensor([1])).item()
    )
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_a_batch_of_one_image_leaves_the_negatives_out():
    model = new_model().train()
    got = model(*batch(image_ids=torch.full((6,), 3)), STEP)
    positives = F.cross_entropy(got.itm_logits[:6], torch.ones(6, dtype=torch.int64))
    assert got.itm.item() == pytest.approx(positives.item(), rel=1e-5)


def test_a_whole_step_reads_no_value_back_from_the_device():  # D9
    arguments = batch()
    with torch.device("meta"):
        model = MedPretraining(objectives=OBJECTIVES, **ONE_LAYER).train()
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: reading one raises
        model.to_empty(device="cpu")
        with pytest.raises(DataDependentOutputException):
            model.temperature.item()
        losses = model(*(torch.empty(a.shape, dtype=a.dtype) for a in arguments), STEP)
        losses.total.backward()
    assert losses.itm_logits.shape == (18, 2)


# --- ITC by image id (fine-tuning) -------------------------------------------------------------


def test_columns_of_the_same_image_share_the_target_in_fine_tuning():
    model = new_model(FINE_TUNING)
    model.queue.image_ids[0, 6:9] = torch.tensor([1, 1, 4])
    targets = model._positives(torch.tensor([0, 1, 0, 2, 3, 4]))
    assert targets.shape == (6, 30)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    columns = [row.nonzero().flatten().tolist() for row in targets]
    assert columns == [[0, 2], [1, 12, 13], [0, 2], [3], [4], [5, 14]]
    assert targets[1, 12].item() == pytest.approx(1 / 3)


def test_unknown_images_are_positives_of_themselves_alone():
    model = new_model(FINE_TUNING)
    model.queue.image_ids.fill_(UNKNOWN_IMAGE)
    targets = model._positives(torch.full((6,), UNKNOWN_IMAGE))
    assert torch.equal(targets, torch.eye(6, 30))


def test_08_itc_by_image_id_equals_itc_by_place_for_unique_images():
    by_id, by_place = reference_model(FINE_TUNING), reference_model()
    one, other = (
        model(*batch(), STEP, Negatives(torch.arange(6), torch.arange(6)))
        for model in (by_id, by_place)
    )
    assert one.itc.item() == pytest.approx(other.itc.item(), rel=1e-6)


def test_fine_tuning_draws_by_online_similarity_and_gives_what_is_forbidden_no_weight():
    model = reference_model(replace(FINE_TUNING, hard_negatives=HardNegatives.THIS_RANK))
    pairs, compared = captured(model)
    weights = model._negative_weights(pairs, compared)
    similarity = pairs.image_feats @ pairs.text_feats.t() / model.temperature
    released = similarity.softmax(dim=1).fill_diagonal_(0)  # BLIP masks after the softmax
    torch.testing.assert_close(weights.i2t, released / released.sum(dim=1, keepdim=True), **LOGITS)


def test_the_filter_has_no_language_model_and_no_decoder():
    model = new_model(FINE_TUNING)
    assert not [name for name in model.state_dict() if "decoder" in name or "head.dense" in name]
    got = model(*batch(), STEP)
    assert got.lm.item() == 0
    assert torch.equal(got.total, got.itc + got.itm)


def test_filter_fine_tuning_moves_every_trainable_parameter():
    model = new_model(FINE_TUNING)
    model(*batch(), STEP).total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(10.0, 0.5), (1e-6, 0.001), (0.07, 0.07)])
def test_the_temperature_is_clamped_before_it_is_used(start, end):  # D8
    model = new_model()
    with torch.no_grad():
        model.temperature.fill_(start)
    got = model(*batch(), STEP)
    assert model.temperature.item() == pytest.approx(end)
    assert got.sim_i2t.abs().max() <= 1 / model.temperature + 1e-3
    got.itc.backward()
    assert model.temperature.grad is not None


def test_the_lowest_temperature_under_bfloat16_autocast_gives_no_nan():  # D8
    model = reference_model().train()
    with torch.no_grad():
        model.temperature.fill_(0.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(*batch(), STEP)
    got.total.backward()
    assert got.sim_i2t.dtype == got.itc.dtype == got.total.dtype == torch.float32
    assert torch.isfinite(got.total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_losses_under_bfloat16_autocast_are_near_the_full_ones():
    full = run_step(reference_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run_step(reference_model())
    for name in ("itc", "itm", "lm"):
        assert getattr(half, name).item() == pytest.approx(getattr(full, name).item(), rel=0.02)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_equals_a_plain_one(backend):
    negatives = recorded_negatives(steps()[0])
    plain, model = (new_model(**ONE_LAYER).train() for _ in range(2))
    expected = plain(*batch(), STEP, negatives)
    expected.total.backward()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = compiled(*batch(), STEP, negatives)
    got.total.backward()
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            grad = model.get_parameter(name).grad
            torch.testing.assert_close(grad, parameter.grad, **HIDDEN, msg=name)
    assert torch.equal(model.queue.pointer, plain.queue.pointer)
    torch.testing.assert_close(model.momentum.text_proj.weight, plain.momentum.text_proj.weight)


# --- what a newcomer expects -------------------------------------------------------------------


def test_10_matching_that_knows_the_prior_alone_costs_what_it_should():
    model = new_model()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([math.log(2), 0.0]))  # two of three do not match
    assert model(*batch(), STEP).itm.item() == pytest.approx(0.6365, abs=1e-4)


def test_10_an_untrained_model_is_at_chance():
    model = new_model(replace(OBJECTIVES, temperature=0.5))
    got = model(*batch(), MedStep(alpha=0.0))
    assert got.itm.item() == pytest.approx(math.log(2), abs=0.15)
    assert got.itc.item() == pytest.approx(math.log(30), abs=0.7)
    assert got.lm.item() == pytest.approx(math.log(130), abs=0.3)


def test_without_soft_targets_itc_is_plain_cross_entropy():
    got = reference_model()(*batch(), MedStep(alpha=0.0))
    labels = torch.arange(6)
    plain = (F.cross_entropy(got.sim_i2t, labels) + F.cross_entropy(got.sim_t2i, labels)) / 2
    assert got.itc.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_copy_that_keeps_nothing_of_itself_gives_what_following_would():
    found = []
    for momentum in (0.0, 1e-12):  # the second moves and runs the copy
        model = new_model(replace(OBJECTIVES, momentum=momentum)).train()
        with torch.no_grad():
            for parameter in model.image_encoder.parameters():
                parameter.add_(0.01)  # an optimiser's step that the copy has not seen
        got = model(*batch(), STEP, negatives=recorded_negatives(steps()[0]))
        got.total.backward()
        found.append((got, [p.grad for p in model.parameters() if p.grad is not None], model.queue))
    (one, grads, queue), (other, other_grads, other_queue) = found
    for name in ("itc", "itm", "lm", "sim_i2t", "sim_t2i"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(grads, other_grads)
    torch.testing.assert_close(queue.image_feats, other_queue.image_feats)


def test_alpha_may_be_a_tensor():
    one = reference_model()(*batch(), MedStep(alpha=torch.tensor(0.4)))
    other = reference_model()(*batch(), MedStep(alpha=0.4))
    assert one.itc.item() == pytest.approx(other.itc.item(), rel=1e-6)


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped():
    model = reference_model().train()
    run_step(model)
    resumed = new_model().train()
    resumed.load_state_dict(model.state_dict())
    one, other = run_step(model, 1), run_step(resumed, 1)
    assert one.total.item() == other.total.item()


@pytest.mark.parametrize(
    ("number", "wrong", "message"),
    [
        (2, lambda t: t.long(), "text_is_real is torch.int64"),
        (2, lambda t: t[:, :5], "text_is_real is torch.bool .6, 5."),
        (3, lambda t: t.float(), "image_ids are torch.float32"),
        (3, lambda t: t[:5], r"image_ids are torch.int64 .5,."),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_was_expected(number, wrong, message):  # D4
    arguments = list(batch())
    arguments[number] = wrong(arguments[number])
    with pytest.raises(ValueError, match=message):
        new_model()(*arguments, STEP)


def test_a_few_steps_lower_every_loss():
    model = new_model().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    torch.manual_seed(0)
    history = []
    for _ in range(25):
        optimizer.zero_grad()
        got = model(*batch(), MedStep(alpha=0.0))
        got.total.backward()
        optimizer.step()
        history.append([got.itc.item(), got.lm.item()])
    (itc, lm), (itc_end, lm_end) = history[0], history[-1]
    assert itc_end < itc - 0.5
    assert lm_end < lm - 1.0
